-- What is not finished has a table of its own, so that to settle an event writes none of the ledger's indexes.
--
-- Whatever changes on the common road is in no index of the ledger now: claiming and settling both leave the new version of a
-- row beside the old one (HOT). See docs/decisions/0031.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- What is already here under this name, while this file has left no record, is someone else's.
DO $$
BEGIN
    IF to_regclass('webhook_unfinished') IS NOT NULL
       AND NOT EXISTS (SELECT FROM webhook_migrations WHERE name = '026_unfinished') THEN
        RAISE EXCEPTION 'a table webhook_unfinished is already here that Kamiyo did not make'
            USING HINT = 'Rename it, or give Kamiyo a database or a schema (search_path) of its own. Nothing was changed.';
    END IF;
END $$;

-- One row for each event that is not processed: waiting, in work, retrying, or dead. The ledger says what is true; triggers
-- keep these rows like it, whoever changes it. Rows are changed by whoever holds the event's row in the ledger, never first.
CREATE TABLE IF NOT EXISTS webhook_unfinished (
    created_at  timestamptz NOT NULL,
    seq         bigint      NOT NULL,
    -- Null: dead.
    next_try_at timestamptz,
    lane        integer     NOT NULL,
    -- Its last try failed: it is retrying, or dead.
    failed      boolean     NOT NULL,
    event_id    text        COLLATE "C" NOT NULL,
    PRIMARY KEY (created_at, seq)
-- Every event that a worker handles passes through: many dead rows among few that live, and each claim begins there.
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);

-- Nobody changes the ledger from here on until the triggers see to it. As strong as what follows needs: to ask for more later
-- could be a deadlock.
LOCK TABLE webhook_events IN ACCESS EXCLUSIVE MODE;

INSERT INTO webhook_unfinished (created_at, seq, next_try_at, lane, failed, event_id)
SELECT created_at, seq, next_try_at, lane, failed_at IS NOT NULL, event_id FROM webhook_events
-- By the indexes that go now; what is not processed is one of the two.
WHERE next_try_at IS NOT NULL OR failed_at IS NOT NULL
ON CONFLICT DO NOTHING;

-- The queue.
CREATE INDEX IF NOT EXISTS webhook_unfinished_due ON webhook_unfinished (next_try_at, seq) WHERE next_try_at IS NOT NULL;
-- The dead, a few among what may be very many after an outage.
CREATE INDEX IF NOT EXISTS webhook_unfinished_dead ON webhook_unfinished (created_at, seq) WHERE next_try_at IS NULL;

-- For lists of them: what a list shows of the ledger, found and put in order by the little table.
CREATE OR REPLACE VIEW webhook_unfinished_events AS
    SELECT u.seq, u.event_id, e.event_type, e.status, e.outcome, u.created_at, e.stripe_created, e.processed_at, e.failed_at,
           u.next_try_at, e.attempts, e.processing_us, e.object_type, e.object_id, e.customer, e.account, e.context, e.livemode,
           e.api_version, e.thin, e.source, e.read_due_at
    FROM webhook_unfinished AS u JOIN webhook_events AS e ON e.event_id = u.event_id;

DROP INDEX IF EXISTS webhook_events_due;
DROP INDEX IF EXISTS webhook_events_dead;

CREATE OR REPLACE FUNCTION webhook_count_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_count_changes
    SELECT date_trunc('minute', created_at), event_type, count(*), count(*) FILTER (WHERE status = 'processed'),
           count(*) FILTER (WHERE status = 'failed'), sum(processing_us)
    FROM came GROUP BY 1, 2;
    INSERT INTO webhook_unfinished (created_at, seq, next_try_at, lane, failed, event_id)
    SELECT created_at, seq, next_try_at, lane, failed_at IS NOT NULL, event_id FROM came WHERE status <> 'processed';
    -- Whoever stores an event wakes the workers; equal notices of one transaction arrive as one. A server that has a worker
    -- wakes that one by itself, and says so: all who send a notice take one lock in turn when they commit, and each notice
    -- costs every listener a wake-up.
    IF FOUND AND current_setting('kamiyo.notices', true) IS DISTINCT FROM 'off' THEN
        PERFORM pg_notify('webhook_events', '');
    END IF;
    RETURN NULL;
END $$;

-- For each row, because the condition below is then looked at without calling anything: a claim changes nothing here.
CREATE OR REPLACE FUNCTION webhook_unfinished_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' OR NEW.status = 'processed' THEN
        DELETE FROM webhook_unfinished WHERE created_at = OLD.created_at AND seq = OLD.seq;
    ELSIF OLD.status = 'processed' THEN
        INSERT INTO webhook_unfinished (created_at, seq, next_try_at, lane, failed, event_id)
        VALUES (NEW.created_at, NEW.seq, NEW.next_try_at, NEW.lane, NEW.failed_at IS NOT NULL, NEW.event_id);
    ELSE
        UPDATE webhook_unfinished
        SET created_at = NEW.created_at, next_try_at = NEW.next_try_at, lane = NEW.lane, failed = NEW.failed_at IS NOT NULL
        WHERE created_at = OLD.created_at AND seq = OLD.seq;
    END IF;
    RETURN NULL;
END $$;
CREATE OR REPLACE TRIGGER webhook_events_unfinished_updated AFTER UPDATE ON webhook_events FOR EACH ROW
    WHEN ((OLD.created_at, OLD.status = 'processed', OLD.next_try_at, OLD.lane, OLD.failed_at IS NULL)
          IS DISTINCT FROM (NEW.created_at, NEW.status = 'processed', NEW.next_try_at, NEW.lane, NEW.failed_at IS NULL))
    EXECUTE FUNCTION webhook_unfinished_changed();
CREATE OR REPLACE TRIGGER webhook_events_unfinished_deleted AFTER DELETE ON webhook_events FOR EACH ROW
    WHEN (OLD.status <> 'processed') EXECUTE FUNCTION webhook_unfinished_changed();

CREATE OR REPLACE FUNCTION webhook_unfinished_emptied() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM webhook_unfinished;
    RETURN NULL;
END $$;
CREATE OR REPLACE TRIGGER webhook_events_unfinished_emptied AFTER TRUNCATE ON webhook_events
    FOR EACH STATEMENT EXECUTE FUNCTION webhook_unfinished_emptied();

-- Counts again from the ledger, and notes again what is not finished, for a database that was filled with the triggers off.
CREATE OR REPLACE FUNCTION webhook_recount() RETURNS void LANGUAGE sql AS $$
    LOCK TABLE webhook_events IN SHARE MODE;
    DELETE FROM webhook_count_changes;
    DELETE FROM webhook_counts_by_minute;
    DELETE FROM webhook_counts_by_hour;
    DELETE FROM webhook_unfinished;
    INSERT INTO webhook_count_changes
    SELECT date_trunc('minute', created_at), event_type, count(*), count(*) FILTER (WHERE status = 'processed'),
           count(*) FILTER (WHERE status = 'failed'), sum(processing_us)
    FROM webhook_events GROUP BY 1, 2;
    INSERT INTO webhook_unfinished (created_at, seq, next_try_at, lane, failed, event_id)
    SELECT created_at, seq, next_try_at, lane, failed_at IS NOT NULL, event_id FROM webhook_events WHERE status <> 'processed';
$$;

-- The function that claims, webhook_claim(), stood here; it is in 032_claim_passes_held_rows.sql.

-- How things are, in one line; /health says the same.
CREATE OR REPLACE VIEW webhook_health_check AS
    WITH day AS (
        SELECT coalesce(sum(received), 0)::bigint AS events, coalesce(sum(failed), 0)::bigint AS failed
        FROM webhook_counts_since(now() - interval '24 hours')
    ), due AS (
        SELECT greatest(extract(epoch FROM now() - min(next_try_at)), 0)::float8 AS seconds
        FROM webhook_unfinished WHERE next_try_at IS NOT NULL
    )
    SELECT CASE WHEN day.failed > 0.20 * day.events THEN 'unhealthy'
                WHEN day.failed > 0.10 * day.events OR coalesce(due.seconds, 0) > 300 THEN 'degraded'
                ELSE 'healthy' END AS status,
           day.events AS events_last_24h,
           day.failed AS failed_events_last_24h,
           coalesce(due.seconds, 0) AS oldest_due_seconds
    FROM day, due;

-- Writes down how the queue stands now, unless somebody has in this minute. Counts a million at most, so that it stays
-- cheap on the worst of days.
CREATE OR REPLACE FUNCTION webhook_sample_backlog() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM webhook_backlog_by_minute WHERE minute = date_trunc('minute', now())) THEN
        RETURN;
    END IF;
    INSERT INTO webhook_backlog_by_minute (minute, waiting, retrying, oldest_due_seconds)
    SELECT date_trunc('minute', now()), count(*) FILTER (WHERE NOT failed), count(*) FILTER (WHERE failed),
           coalesce(greatest(extract(epoch FROM now() - min(next_try_at)), 0), 0)
    FROM (SELECT failed, next_try_at FROM webhook_unfinished WHERE next_try_at IS NOT NULL
          ORDER BY next_try_at LIMIT 1000000) AS queue
    ON CONFLICT (minute) DO NOTHING;
    -- The pictures reach back seven days.
    DELETE FROM webhook_backlog_by_minute WHERE minute < now() - interval '8 days';
END $$;

INSERT INTO webhook_migrations (name) VALUES ('026_unfinished') ON CONFLICT DO NOTHING;

COMMIT;
