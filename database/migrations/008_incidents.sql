-- What a person was told, and what they are still to be told.
--
-- One row for each incident while it lasts, so that many processes tell of it once, and again when it is over.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- What is already here under these names, while this file has left no record, is someone else's.
DO $$
DECLARE
    foreign_table text;
BEGIN
    SELECT name INTO foreign_table
    FROM unnest(ARRAY['webhook_incidents']) AS name
    WHERE to_regclass(name) IS NOT NULL
      AND NOT EXISTS (SELECT FROM webhook_migrations AS m WHERE m.name = '008_incidents');
    IF FOUND THEN
        RAISE EXCEPTION 'a table % is already here that Kamiyo did not make', foreign_table
            USING HINT = 'Rename it, or give Kamiyo a database or a schema (search_path) of its own. Nothing was changed.';
    END IF;
END $$;

CREATE TABLE IF NOT EXISTS webhook_incidents (
    -- What it is about: 'event_died:<fingerprint>', 'failure_rate:<type>', 'overdue'…
    key          text        PRIMARY KEY,
    title        text        NOT NULL,
    -- What happened, to what, what to do. Ids, types, counts and times; never a payload.
    body         text        NOT NULL,
    -- The page of the dashboard that helps.
    page         text        NOT NULL,
    opened_at    timestamptz NOT NULL DEFAULT now(),
    -- When it was last seen to be so.
    seen_at      timestamptz NOT NULL DEFAULT now(),
    -- When it ended; the row goes once that was told as well.
    closed_at    timestamptz,
    -- When people were told; null: not yet.
    told_at      timestamptz,
    -- Tries at telling that failed; the next waits longer.
    misses       integer     NOT NULL DEFAULT 0,
    next_try_at  timestamptz NOT NULL DEFAULT now()
);

INSERT INTO webhook_migrations (name) VALUES ('008_incidents') ON CONFLICT DO NOTHING;

COMMIT;
