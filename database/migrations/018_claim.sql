-- Who has a worker of its own wakes that one without a notice. The function that claims, webhook_claim(), stood here; it is in
-- 025_claim_in_its_lane.sql.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

CREATE OR REPLACE FUNCTION webhook_count_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_count_changes
    SELECT date_trunc('minute', created_at), event_type, count(*), count(*) FILTER (WHERE status = 'processed'),
           count(*) FILTER (WHERE status = 'failed'), sum(processing_us)
    FROM came GROUP BY 1, 2;
    -- Whoever stores an event wakes the workers; equal notices of one transaction arrive as one. A server that has a worker
    -- wakes that one by itself, and says so: all who send a notice take one lock in turn when they commit, and each notice
    -- costs every listener a wake-up.
    IF current_setting('kamiyo.notices', true) IS DISTINCT FROM 'off'
       AND EXISTS (SELECT FROM came WHERE next_try_at IS NOT NULL) THEN
        PERFORM pg_notify('webhook_events', '');
    END IF;
    RETURN NULL;
END $$;

INSERT INTO webhook_migrations (name) VALUES ('018_claim') ON CONFLICT DO NOTHING;

COMMIT;
