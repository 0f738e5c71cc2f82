-- A claim takes only what is in a lane that it locked. The function that claims, webhook_claim(), stood here; it is in
-- 032_claim_passes_held_rows.sql.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

INSERT INTO webhook_migrations (name) VALUES ('025_claim_in_its_lane') ON CONFLICT DO NOTHING;

COMMIT;
