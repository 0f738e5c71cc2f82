-- What the operators' dashboard needs beside the ledger: the backlog as it was, replays that are under way, and an index for
-- one of its questions. The function that writes down how the queue stands, webhook_sample_backlog(), stood here; it is in
-- 026_unfinished.sql.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- What is already here under these names, while this file has left no record, is someone else's.
DO $$
DECLARE
    foreign_table text;
BEGIN
    SELECT name INTO foreign_table
    FROM unnest(ARRAY['webhook_backlog_by_minute', 'webhook_replays']) AS name
    WHERE to_regclass(name) IS NOT NULL
      AND NOT EXISTS (SELECT FROM webhook_migrations AS m WHERE m.name = '007_dashboard');
    IF FOUND THEN
        RAISE EXCEPTION 'a table % is already here that Kamiyo did not make', foreign_table
            USING HINT = 'Rename it, or give Kamiyo a database or a schema (search_path) of its own. Nothing was changed.';
    END IF;
END $$;

-- The events of one connected account. One's own account, '', is not in it: there every index on time will do.
CREATE INDEX IF NOT EXISTS webhook_events_account ON webhook_events (account, created_at) WHERE account <> '';

-- How the queue stood, once a minute. The counts say what became of the events of a minute; how many were waiting at
-- some moment nothing else remembers. A minute that is missing is one in which no server was up to look.
CREATE TABLE IF NOT EXISTS webhook_backlog_by_minute (
    minute             timestamptz PRIMARY KEY,
    -- Pending or being processed.
    waiting            bigint           NOT NULL,
    -- Failed, to be tried again by itself.
    retrying           bigint           NOT NULL,
    -- Seconds since the oldest of them was due.
    oldest_due_seconds double precision NOT NULL
);

-- Replays that a person began in the dashboard, so that any server process can say how far they are.
CREATE TABLE IF NOT EXISTS webhook_replays (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    started_at  timestamptz NOT NULL DEFAULT now(),
    -- The last sign of life of the process that does it. Long ago and not finished: that process is gone.
    heard_at    timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    -- Which failures: see webhook_failures.
    fingerprint text        NOT NULL,
    -- How many matched when it began, and how many are back in line so far.
    total       bigint      NOT NULL,
    done        bigint      NOT NULL DEFAULT 0,
    -- Why it stopped before its end: the type of the error.
    stopped_by  text
);

INSERT INTO webhook_migrations (name) VALUES ('007_dashboard') ON CONFLICT DO NOTHING;

COMMIT;
