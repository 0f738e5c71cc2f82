BEGIN;
SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

CREATE TABLE IF NOT EXISTS webhook_unfinished (
    created_at  timestamptz NOT NULL,
    next_try_at timestamptz,
    seq         bigint      NOT NULL,
    lane        integer     NOT NULL,
    failed      boolean     NOT NULL,
    event_id    text        COLLATE "C" NOT NULL,
    PRIMARY KEY (created_at, seq)
);
CREATE INDEX IF NOT EXISTS webhook_unfinished_due ON webhook_unfinished (next_try_at, seq) WHERE next_try_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS webhook_unfinished_dead ON webhook_unfinished (created_at, seq) WHERE next_try_at IS NULL;

INSERT INTO webhook_unfinished
SELECT created_at, next_try_at, seq, lane, failed_at IS NOT NULL, event_id FROM webhook_events WHERE next_try_at IS NOT NULL OR failed_at IS NOT NULL
ON CONFLICT DO NOTHING;

DROP INDEX IF EXISTS webhook_events_due, webhook_events_dead;

CREATE OR REPLACE FUNCTION webhook_count_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_count_changes
    SELECT date_trunc('minute', created_at), event_type, count(*), count(*) FILTER (WHERE status = 'processed'),
           count(*) FILTER (WHERE status = 'failed'), sum(processing_us)
    FROM came GROUP BY 1, 2;
    INSERT INTO webhook_unfinished (created_at, next_try_at, seq, lane, failed, event_id)
    SELECT created_at, next_try_at, seq, lane, failed_at IS NOT NULL, event_id FROM came WHERE status <> 'processed';
    IF FOUND AND current_setting('kamiyo.notices', true) IS DISTINCT FROM 'off' THEN
        PERFORM pg_notify('webhook_events', '');
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION webhook_unfinished_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' OR NEW.status = 'processed' THEN
        DELETE FROM webhook_unfinished WHERE created_at = OLD.created_at AND seq = OLD.seq;
    ELSIF OLD.status = 'processed' THEN
        INSERT INTO webhook_unfinished (created_at, next_try_at, seq, lane, failed, event_id)
        VALUES (NEW.created_at, NEW.next_try_at, NEW.seq, NEW.lane, NEW.failed_at IS NOT NULL, NEW.event_id);
    ELSE
        UPDATE webhook_unfinished SET next_try_at = NEW.next_try_at, lane = NEW.lane, failed = NEW.failed_at IS NOT NULL
        WHERE created_at = OLD.created_at AND seq = OLD.seq;
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER webhook_events_unfinished_updated AFTER UPDATE ON webhook_events FOR EACH ROW
    WHEN (OLD.next_try_at IS DISTINCT FROM NEW.next_try_at OR OLD.lane <> NEW.lane
          OR (OLD.failed_at IS NULL) <> (NEW.failed_at IS NULL) OR (OLD.status = 'processed') <> (NEW.status = 'processed'))
    EXECUTE FUNCTION webhook_unfinished_changed();
CREATE OR REPLACE TRIGGER webhook_events_unfinished_deleted AFTER DELETE ON webhook_events FOR EACH ROW
    WHEN (OLD.status <> 'processed')
    EXECUTE FUNCTION webhook_unfinished_changed();

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
    INSERT INTO webhook_unfinished (created_at, next_try_at, seq, lane, failed, event_id)
    SELECT created_at, next_try_at, seq, lane, failed_at IS NOT NULL, event_id FROM webhook_events WHERE status <> 'processed';
$$;

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
            -- Worded so that the index of what is due is no way to it: a plan from a quiet moment would look through all of
            -- a backlog for each claim.
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
