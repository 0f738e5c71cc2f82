-- A claim begins to look where the queue began a moment ago. See docs/decisions/0033.
--
-- The function that claims, webhook_claim(), stood here; it is in 032_claim_passes_held_rows.sql, which also takes away the one
-- from before.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

INSERT INTO webhook_migrations (name) VALUES ('031_claim_since') ON CONFLICT DO NOTHING;

COMMIT;
