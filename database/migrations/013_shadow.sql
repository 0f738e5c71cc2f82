-- What a twin endpoint delivers: the same events as the real one, worded in an API version that is to be tried.
--
-- Apart from everything else: no event here is in the ledger, is counted, is processed, or touches a billing row. They
-- are kept for seven days and compared with the real ones by `kamiyo upgrade-report`.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- What is already here under these names, while this file has left no record, is someone else's.
DO $$
DECLARE
    foreign_table text;
BEGIN
    SELECT name INTO foreign_table
    FROM unnest(ARRAY['webhook_shadow_events']) AS name
    WHERE to_regclass(name) IS NOT NULL
      AND NOT EXISTS (SELECT FROM webhook_migrations AS m WHERE m.name = '013_shadow');
    IF FOUND THEN
        RAISE EXCEPTION 'a table % is already here that Kamiyo did not make', foreign_table
            USING HINT = 'Rename it, or give Kamiyo a database or a schema (search_path) of its own. Nothing was changed.';
    END IF;
END $$;

CREATE TABLE IF NOT EXISTS webhook_shadow_events (
    -- Stripe's id of the twin; that of the real event is another.
    event_id       text        COLLATE "C" PRIMARY KEY,
    event_type     text        NOT NULL,
    stripe_created timestamptz NOT NULL,
    livemode       boolean     NOT NULL,
    account        text        NOT NULL,
    context        text        NOT NULL,
    -- The version that is tried.
    api_version    text,
    object_type    text,
    object_id      text        COLLATE "C",
    customer       text,
    -- The API request that caused it, where one did: with type, object and second it tells which real event is its twin.
    request_id     text,
    created_at     timestamptz NOT NULL DEFAULT now(),
    body           bytea       NOT NULL
);

-- Read second by second, as twins are paired.
CREATE INDEX IF NOT EXISTS webhook_shadow_events_second ON webhook_shadow_events (stripe_created, event_id);
-- Forgotten after seven days.
CREATE INDEX IF NOT EXISTS webhook_shadow_events_created_at ON webhook_shadow_events (created_at);

INSERT INTO webhook_migrations (name) VALUES ('013_shadow') ON CONFLICT DO NOTHING;

COMMIT;
