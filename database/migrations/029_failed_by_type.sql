-- Failed events of one type, a few among what may be very many of another after an outage.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

CREATE INDEX IF NOT EXISTS webhook_events_failed_type ON webhook_events (event_type, created_at, seq)
    WHERE failed_at IS NOT NULL;

INSERT INTO webhook_migrations (name) VALUES ('029_failed_by_type') ON CONFLICT DO NOTHING;

COMMIT;
