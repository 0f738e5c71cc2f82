-- Events that wait until what they name was read from Stripe's API, and how asking goes. The function that stores and projects
-- in one commit, webhook_receive(), stood here; it is in 024_late_copies.sql.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- A thin event only names its object. Until that was read, nobody claims the event: next_try_at lies far ahead.
--   read_due_at  since when its object may be read; null: it waits for no read. It is what the event is late by
--   read_try_at  when a reader takes it up next: moved on while one is at it, and while Stripe is away
ALTER TABLE webhook_events
    ADD COLUMN IF NOT EXISTS read_due_at timestamptz,
    ADD COLUMN IF NOT EXISTS read_try_at timestamptz;
-- NOT VALID: the columns are new, so there is nothing to look through the ledger for.
DO $$
BEGIN
    ALTER TABLE webhook_events ADD CONSTRAINT webhook_events_read_due_is_tried
        CHECK ((read_due_at IS NULL) = (read_try_at IS NULL)) NOT VALID;
    -- Waiting for a read is a way of being pending; whoever runs an event has what was read.
    ALTER TABLE webhook_events ADD CONSTRAINT webhook_events_waits_for_read_unfinished
        CHECK (read_due_at IS NULL OR status IN ('pending', 'processing')) NOT VALID;
EXCEPTION WHEN duplicate_object THEN NULL;
END $$;

-- When a read surely shows what an event tells: once Stripe's second of it is over, as every answer counts as asked in a
-- second that had begun before. An event from the future (a test clock, a clock that is wrong) is not waited for.
CREATE OR REPLACE FUNCTION webhook_second_over(stripe_created timestamptz, created_at timestamptz) RETURNS timestamptz
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT least(stripe_created, date_trunc('second', created_at) + interval '5 seconds') + interval '2 seconds'
$$;

-- What is to be read next; what has waited longest; what waits for one object. Nothing but waiting events is in them.
CREATE INDEX IF NOT EXISTS webhook_events_read_try ON webhook_events (read_try_at) WHERE read_try_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS webhook_events_read_due ON webhook_events (read_due_at) WHERE read_due_at IS NOT NULL;
-- From a snapshot to its thin twin.
CREATE INDEX IF NOT EXISTS webhook_events_snapshot_event ON webhook_events (snapshot_event)
    WHERE snapshot_event IS NOT NULL;

-- How asking goes, beside how much of it is allowed.
ALTER TABLE webhook_api_budget
    -- The circuit: open since this moment. Everybody waits, and now and then one request goes out to try.
    ADD COLUMN IF NOT EXISTS opened_at     timestamptz,
    -- That request is on its way; nobody else asks before open_until.
    ADD COLUMN IF NOT EXISTS probing       boolean NOT NULL DEFAULT false,
    -- Stripe refuses the key: since when, and for what ('GET /v1/customers (403)'). A person must act.
    ADD COLUMN IF NOT EXISTS refused_at    timestamptz,
    -- When it last did. What nobody asks for any more is not told for ever.
    ADD COLUMN IF NOT EXISTS refused_last_at timestamptz,
    ADD COLUMN IF NOT EXISTS refused_what  text,
    -- When undecided rows are looked for next; moved on by the process that does it.
    ADD COLUMN IF NOT EXISTS undecided_try_at timestamptz NOT NULL DEFAULT now();

INSERT INTO webhook_migrations (name) VALUES ('020_thin_events') ON CONFLICT DO NOTHING;

COMMIT;
