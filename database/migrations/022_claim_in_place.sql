-- A claim writes no index. The function that claims, webhook_claim(), stood here; it is in 032_claim_passes_held_rows.sql.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- Half of each page stays free for claims: what they write is in no index, so that the new version of a row, where it finds
-- room beside the old one, is none to them (HOT). Holds for pages that are filled from now on. See docs/decisions/0028.
ALTER TABLE webhook_events SET (fillfactor = 50);

INSERT INTO webhook_migrations (name) VALUES ('022_claim_in_place') ON CONFLICT DO NOTHING;

COMMIT;
