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

-- A worker's turn begins with one call: let go of the last turn's lanes, lock the lanes of what is due, take the events. A
-- function, because each of its statements sees what was committed before it began: what the last holder of a lane left behind
-- shows only to a statement that begins after the lane was locked.
--
-- Takes up to `most` due events, oldest first, under a claim number of their own, and holds their lanes (advisory locks of
-- class 1800432) on this session. Lanes that another worker holds are passed over, so that a busy customer never keeps the
-- others waiting. An event found in 'processing' was abandoned: its worker died. started_at stays until that death is
-- recorded, should this worker die before it has done so.
--
-- An event that is alone in its claim and runs alone (`handled`: types with a handler; or a suspect) has its try counted
-- here, before it begins: should it take the process down, the try has counted.
--
-- Where nothing could be taken, one row says in how many seconds the next event is due; null: nothing waits.
CREATE OR REPLACE FUNCTION webhook_claim(most integer, handled text[]) RETURNS TABLE (
    claim bigint, due_in float8, seq bigint, created_at timestamptz, event_id text, event_type text,
    stripe_created bigint, livemode boolean, thin boolean, account text, context text, api_version text,
    object_type text, object_id text, customer text, snapshot_event text, lane integer, attempts smallint,
    suspect boolean, abandoned boolean, was_running boolean, started boolean, body bytea
)
LANGUAGE plpgsql
-- Planned once in a session, and right however large the tables grow: every look-up is by its index.
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    seen   integer;
    held   text[];
    -- The lanes that this session got.
    ours   integer[];
    more   integer[];
    number bigint;
BEGIN
    PERFORM pg_advisory_unlock_all();

    WITH due AS MATERIALIZED (
        SELECT e.event_id, e.lane FROM webhook_unfinished AS e
        WHERE e.next_try_at <= now() ORDER BY e.next_try_at, e.seq LIMIT most
    ), mine AS MATERIALIZED (
        SELECT l.lane FROM (SELECT DISTINCT d.lane FROM due AS d) AS l WHERE pg_try_advisory_lock(1800432, l.lane)
    )
    SELECT count(*), array_agg(d.event_id) FILTER (WHERE d.lane IN (SELECT m.lane FROM mine AS m)),
           (SELECT array_agg(m.lane) FROM mine AS m)
    INTO seen, held, ours FROM due AS d;

    -- The head of the line is another worker's: look behind it. Not in the first place, because reading the table of locks
    -- holds up everyone who takes one.
    IF seen = most AND cardinality(coalesce(held, '{}')) < seen THEN
        WITH theirs AS MATERIALIZED (
            SELECT objid::bigint::integer AS lane FROM pg_locks
            WHERE locktype = 'advisory' AND classid = 1800432 AND objsubid = 2 AND pid <> pg_backend_pid()
              AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        ), due AS MATERIALIZED (
            SELECT e.event_id, e.lane FROM webhook_unfinished AS e
            WHERE e.next_try_at <= now() AND e.lane NOT IN (SELECT t.lane FROM theirs AS t)
            ORDER BY e.next_try_at, e.seq LIMIT most
        ), mine AS MATERIALIZED (
            SELECT l.lane FROM (SELECT DISTINCT d.lane FROM due AS d) AS l WHERE pg_try_advisory_lock(1800432, l.lane)
        )
        SELECT array_agg(d.event_id) FILTER (WHERE d.lane IN (SELECT m.lane FROM mine AS m)),
               (SELECT array_agg(m.lane) FROM mine AS m)
        INTO held, more FROM due AS d;
        ours := ours || more;
    END IF;

    IF held IS NOT NULL THEN
        number := nextval('webhook_claims');
        RETURN QUERY
        WITH found AS (
            SELECT e.event_id, e.lane, e.status = 'processing' AS abandoned, e.started_at IS NOT NULL AS was_running,
                   cardinality(held) = 1 AND NOT (e.status = 'processing' AND e.started_at IS NOT NULL)
                       AND (e.suspect OR e.status = 'processing' OR e.event_type = ANY (handled)) AS starts
            FROM webhook_events AS e
            WHERE e.event_id = ANY (held) AND e.next_try_at <= now()
              -- Its last holder may have moved it: then it is in a lane that somebody else may hold.
              AND e.lane = ANY (ours)
        ), claimed AS (
            UPDATE webhook_events AS e
            SET status = 'processing', claim = number, failed_at = NULL, suspect = e.suspect OR f.abandoned,
                attempts = e.attempts + f.starts::int,
                started_at = CASE WHEN f.starts THEN clock_timestamp() ELSE e.started_at END
            -- Said again of the row as it is once it can be had: a reader may have given it up, or moved it, meanwhile.
            FROM found AS f WHERE e.event_id = f.event_id AND e.lane = f.lane AND e.next_try_at <= now()
            RETURNING e.*, f.abandoned, f.was_running, f.starts
        )
        SELECT number, NULL::float8, c.seq, c.created_at, c.event_id, c.event_type,
               extract(epoch FROM c.stripe_created)::bigint, c.livemode, c.thin, c.account, c.context, c.api_version,
               c.object_type, c.object_id, c.customer, c.snapshot_event, c.lane, (c.attempts - c.starts::int)::smallint,
               c.suspect, c.abandoned, c.abandoned AND c.was_running, c.starts,
               -- A subquery, so that each body is looked up by its key in the one partition that has it.
               (SELECT p.body FROM webhook_payloads AS p WHERE p.seq = c.seq AND p.created_at = c.created_at)
        -- Put in order before they have their bodies, which are a lot to carry.
        FROM (SELECT * FROM claimed ORDER BY stripe_created, seq) AS c;
        IF FOUND THEN
            RETURN;
        END IF;
    END IF;
    -- Who takes nothing holds nothing: whatever made the lanes seem due is over.
    PERFORM pg_advisory_unlock_all();
    RETURN QUERY
    SELECT 0::bigint, extract(epoch FROM min(e.next_try_at) - now())::float8, NULL::bigint, NULL::timestamptz,
           NULL, NULL, NULL::bigint, NULL::boolean, NULL::boolean, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
           NULL::integer, NULL::smallint, NULL::boolean, NULL::boolean, NULL::boolean, NULL::boolean, NULL::bytea
    FROM webhook_unfinished AS e WHERE e.next_try_at IS NOT NULL;
END $$;

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
