-- Many accounts, two modes: the comparison with Stripe's list has a place of its own for each, and the events of one
-- context are found without reading all.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- The events of one context (organisations, Connect). Most have none, and are not in it.
CREATE INDEX IF NOT EXISTS webhook_events_context ON webhook_events (context, created_at) WHERE context <> '';

-- How far the comparison with Stripe's own list of events has come: one row for each account and mode.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'webhook_reconciliation'::regclass AND attname = 'only_row'
                                          AND NOT attisdropped) THEN
        ALTER TABLE webhook_reconciliation
            DROP COLUMN only_row,
            -- Empty: one's own.
            ADD COLUMN account text COLLATE "C" NOT NULL DEFAULT '',
            ADD COLUMN livemode boolean NOT NULL DEFAULT false,
            -- Number of the comparison that is going on, or was last: whoever writes down how far it is must name it, so
            -- that one that another process has taken over writes nothing more.
            ADD COLUMN run bigint NOT NULL DEFAULT 0,
            -- Its last sign of life.
            ADD COLUMN heard_at timestamptz,
            -- What it compares: events created from one second to another; and the last event it has compared, from the
            -- newest down. Null when it is through. After a kill the next one goes on there.
            ADD COLUMN window_from timestamptz,
            ADD COLUMN window_to timestamptz,
            ADD COLUMN after_event text,
            -- Events found missing by it so far; `missed` is what the last complete one had found.
            ADD COLUMN found integer NOT NULL DEFAULT 0,
            -- When Stripe last refused this account (a connected account that has left, say): asked again after a day.
            ADD COLUMN refused_at timestamptz,
            ADD PRIMARY KEY (account, livemode);
    END IF;
END $$;
-- The row that 009 makes: which mode it was of, nothing tells. The first comparison of each account begins anew.
DELETE FROM webhook_reconciliation WHERE run = 0;

INSERT INTO webhook_migrations (name) VALUES ('011_accounts') ON CONFLICT DO NOTHING;

COMMIT;
