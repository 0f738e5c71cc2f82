-- What a row has to remember of its events for when retention has taken them.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- Last shown: only where last_event_rank is that of such a deletion: the rank and the event (or read) that last showed the object, and
-- so made the other columns. -1: nothing ever did. Null: the deletion was applied before these columns were here.
-- Subscriptions have none: their deletion shows them.
ALTER TABLE billing.customers
    ADD COLUMN IF NOT EXISTS last_shown_rank bigint, ADD COLUMN IF NOT EXISTS last_shown_event_id text;
ALTER TABLE billing.invoices
    ADD COLUMN IF NOT EXISTS last_shown_rank bigint, ADD COLUMN IF NOT EXISTS last_shown_event_id text;
ALTER TABLE billing.payment_methods
    ADD COLUMN IF NOT EXISTS last_shown_rank bigint, ADD COLUMN IF NOT EXISTS last_shown_event_id text;

-- Contested by: only where order_evidence is 'undecided', the events that were weighed for it. Without one of them the rest
-- may look as if it decided.
ALTER TABLE billing.customers ADD COLUMN IF NOT EXISTS contested_by text[];
ALTER TABLE billing.subscriptions ADD COLUMN IF NOT EXISTS contested_by text[];
ALTER TABLE billing.invoices ADD COLUMN IF NOT EXISTS contested_by text[];
ALTER TABLE billing.payment_methods ADD COLUMN IF NOT EXISTS contested_by text[];

INSERT INTO webhook_migrations (name) VALUES ('028_what_rows_remember') ON CONFLICT DO NOTHING;

COMMIT;
