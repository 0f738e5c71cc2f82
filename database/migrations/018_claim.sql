-- Who has a worker of its own wakes that one without a notice. The functions that say so, webhook_count_inserted(), and that
-- claim, webhook_claim(), stood here; they are in 026_unfinished.sql and 032_claim_passes_held_rows.sql.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

INSERT INTO webhook_migrations (name) VALUES ('018_claim') ON CONFLICT DO NOTHING;

COMMIT;
