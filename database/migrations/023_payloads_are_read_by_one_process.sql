-- A question about payloads (the view webhook_event_payloads) is answered by one process.
--
-- The function that reads a body as JSON catches what cannot be read, for which it begins a subtransaction; PostgreSQL up to
-- 16 refuses that wherever it shares out a question among processes, as it does when tables are large. Said of the function
-- in 004 as well, for whoever begins with this version. Source: PostgreSQL's documentation, "Parallel Labeling for Functions".

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

ALTER FUNCTION webhook_body_as_json(bytea) PARALLEL UNSAFE;

INSERT INTO webhook_migrations (name) VALUES ('023_payloads_are_read_by_one_process') ON CONFLICT DO NOTHING;

COMMIT;
