-- The webhook tables: the ledger of events, their bodies, their failures, their counts.
--
-- Runs alone:  psql "$DATABASE_URL" -f database/migrations/004_webhook_tables.sql   (or \i inside psql).
-- Running it again changes nothing. It touches nothing that it did not make. PostgreSQL 14 or newer.

BEGIN;

SET LOCAL client_min_messages = warning;

-- Two servers that start at once must not both create the tables. The key is 'kamiyo' in ASCII.
SELECT pg_advisory_xact_lock(118038671810927);

-- The record itself can be someone else's too.
DO $$
BEGIN
    IF to_regclass('webhook_migrations') IS NOT NULL
       AND NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('webhook_migrations') AND attname = 'applied_at') THEN
        RAISE EXCEPTION 'a table webhook_migrations is already here that Kamiyo did not make'
            USING HINT = 'Rename it, or give Kamiyo a database or a schema (search_path) of its own. Nothing was changed.';
    END IF;
END $$;

-- Which migrations this database has; each file writes its own line in the transaction that does its work.
CREATE TABLE IF NOT EXISTS webhook_migrations (
    name       text        PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- What is already here under these names, while this file has left no record, is someone else's.
DO $$
DECLARE
    foreign_table text;
BEGIN
    SELECT name INTO foreign_table
    FROM unnest(ARRAY['webhook_events', 'webhook_payloads', 'webhook_failures', 'webhook_tombstones', 'webhook_audit',
                                'webhook_count_changes', 'webhook_counts_by_minute', 'webhook_counts_by_hour']) AS name
    WHERE to_regclass(name) IS NOT NULL
      AND NOT EXISTS (SELECT FROM webhook_migrations AS m WHERE m.name = '004_webhook_tables');
    IF FOUND THEN
        RAISE EXCEPTION 'a table % is already here that Kamiyo did not make', foreign_table
            USING HINT = 'Rename it, or give Kamiyo a database or a schema (search_path) of its own. Nothing was changed.';
    END IF;
END $$;

-- The inbox: one row for each event Stripe sent, and all there is to know about where it stands.
-- Rows are small (the body lives in webhook_payloads), because each is written up to three times.
CREATE TABLE IF NOT EXISTS webhook_events (
    -- Order of arrival. Also the key of the body.
    seq            bigint      GENERATED ALWAYS AS IDENTITY,
    -- When it was committed here. The guide's queries order by it.
    created_at     timestamptz NOT NULL DEFAULT now(),
    -- Stripe's `created`: whole seconds, so two events of one object can share it.
    stripe_created timestamptz NOT NULL,
    -- When a worker should take it. Null: nothing happens by itself any more (processed, or dead).
    next_try_at    timestamptz,
    processed_at   timestamptz,
    -- Since when it has been failed; null unless status is 'failed'. A column of its own so that the index of
    -- failed events does not depend on status: updates of status alone can then stay heap-only (HOT).
    failed_at      timestamptz,
    -- When the current try began; set before a handler that could take its process down with it is run.
    started_at     timestamptz,
    -- Number of the claim that holds it. Settling asks for it: a worker presumed dead settles nothing.
    claim          bigint,
    -- Events of one customer share a lane and run one at a time: see kamiyo/event.py.
    lane           integer     NOT NULL,
    -- Time spent processing, over all tries, in microseconds.
    processing_us  bigint      NOT NULL DEFAULT 0,
    attempts       smallint    NOT NULL DEFAULT 0,
    livemode       boolean     NOT NULL DEFAULT false,
    thin           boolean     NOT NULL DEFAULT false,
    -- True once a worker died with this event in its batch: from then on it runs alone, so that the one that
    -- kills is told from its neighbours.
    suspect        boolean     NOT NULL DEFAULT false,
    -- Ids are compared byte by byte: faster than by a language's rules, and no index goes stale when those change.
    event_id       text        COLLATE "C" PRIMARY KEY,
    event_type     text        NOT NULL,
    status         text        NOT NULL DEFAULT 'pending',
    -- What processing it meant: 'projected', 'handled', 'ignored'. Null until it is processed.
    outcome        text,
    object_type    text,
    object_id      text        COLLATE "C",
    customer       text        COLLATE "C",
    -- Connect: the connected account; empty for one's own. Context: organisations.
    account        text        NOT NULL DEFAULT '',
    context        text        NOT NULL DEFAULT '',
    api_version    text,
    -- The twin snapshot of a thin event.
    snapshot_event text,
    -- The door it came through: 'webhook', 'reconcile', 'simulator'…
    source         text        NOT NULL DEFAULT 'webhook',
    CONSTRAINT webhook_events_status_known
        CHECK (status IN ('pending', 'processing', 'processed', 'failed')),
    CONSTRAINT webhook_events_outcome_with_processed
        CHECK ((status = 'processed') = (outcome IS NOT NULL)),
    CONSTRAINT webhook_events_failed_at_with_failed
        CHECK ((status = 'failed') = (failed_at IS NOT NULL)),
    -- An event that is not finished must be due some day, or be dead; otherwise it would be stuck for ever.
    CONSTRAINT webhook_events_waiting_is_due
        CHECK (next_try_at IS NOT NULL OR status IN ('processed', 'failed')),
    CONSTRAINT webhook_events_processed_is_done
        CHECK (status <> 'processed' OR next_try_at IS NULL),
    CONSTRAINT webhook_events_attempts_to_five
        CHECK (attempts BETWEEN 0 AND 5)
) WITH (fillfactor = 85);

-- Newest first, for the guide's queries, the list of events and its pages.
CREATE INDEX IF NOT EXISTS webhook_events_created_at ON webhook_events (created_at, seq);
-- What needs a person.
CREATE INDEX IF NOT EXISTS webhook_events_failed ON webhook_events (created_at, seq) WHERE failed_at IS NOT NULL;
-- A customer's time line.
CREATE INDEX IF NOT EXISTS webhook_events_customer ON webhook_events (customer, created_at) WHERE customer IS NOT NULL;
-- An object's history; also finds the events of one object within one of Stripe's seconds.
CREATE INDEX IF NOT EXISTS webhook_events_object ON webhook_events (object_id, stripe_created)
    WHERE object_id IS NOT NULL;
-- "The last invoice.payment_failed", among millions.
CREATE INDEX IF NOT EXISTS webhook_events_type ON webhook_events (event_type, created_at);

CREATE SEQUENCE IF NOT EXISTS webhook_claims;

-- One event as it arrives, for handing a whole batch to a statement.
DO $$
BEGIN
    IF to_regtype('webhook_arrival') IS NULL THEN
        CREATE TYPE webhook_arrival AS (
            event_id text, event_type text, stripe_created bigint, livemode boolean, thin boolean, account text,
            context text, api_version text, object_type text, object_id text, customer text, snapshot_event text,
            lane integer,
            -- What processing it comes to if its billing row is all it needs; null leaves it to the workers.
            outcome text, processing_us bigint
        );
    END IF;
END $$;

-- The body of each event, exactly as it was received: bytes, because jsonb refuses \u0000, reorders keys and
-- costs more to write; apart from the ledger, so that a day of bodies is dropped as a table while the ledger,
-- and with it the memory of what was seen, stays.
CREATE TABLE IF NOT EXISTS webhook_payloads (
    seq        bigint      NOT NULL,
    created_at timestamptz NOT NULL,
    body       bytea       NOT NULL,
    PRIMARY KEY (seq, created_at)
) PARTITION BY RANGE (created_at);

-- Makes the partitions for `first` and the days after it; returns how many are new.
-- CREATE and ATTACH instead of CREATE … PARTITION OF: attaching does not lock the parent against inserts.
-- Running this file again leaves it alone: the owner may have made it SECURITY DEFINER, see docs/deploy.md.
DO $do$
BEGIN
    IF to_regprocedure('webhook_ensure_partitions(date, integer)') IS NULL THEN
        CREATE FUNCTION webhook_ensure_partitions(first date, days integer) RETURNS integer
        LANGUAGE plpgsql AS $$
        DECLARE
            day  date;
            part text;
            made integer := 0;
        BEGIN
            PERFORM pg_advisory_xact_lock(118038671810928);
            FOR day IN SELECT first + n FROM generate_series(0, days - 1) AS n LOOP
                part := 'webhook_payloads_' || to_char(day, 'YYYYMMDD');
                CONTINUE WHEN to_regclass(part) IS NOT NULL;
                EXECUTE format('CREATE TABLE %I (LIKE webhook_payloads INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', part);
                -- Compressing costs more CPU here than the bytes it saves: see docs/performance.md.
                EXECUTE format('ALTER TABLE %I ALTER body SET STORAGE EXTERNAL', part);
                -- Bodies of up to 8 KB, which is nearly all of Stripe's, stay in the row: moving each into the TOAST table cost
                -- half as much again.
                EXECUTE format('ALTER TABLE %I SET (toast_tuple_target = 8160, autovacuum_vacuum_insert_scale_factor = 1)', part);
                EXECUTE format('ALTER TABLE webhook_payloads ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                               part, day::timestamp AT TIME ZONE 'UTC', (day + 1)::timestamp AT TIME ZONE 'UTC');
                made := made + 1;
            END LOOP;
            RETURN made;
        END $$;
    END IF;
END $do$;

SELECT webhook_ensure_partitions((now() AT TIME ZONE 'UTC')::date - 1, 9);

-- The body as jsonb, for people. Where jsonb cannot hold it (\u0000), the refused character becomes U+FFFD.
-- Not parallel: PostgreSQL up to 16 begins no subtransaction there, which is what catching an error takes.
CREATE OR REPLACE FUNCTION webhook_body_as_json(body bytea) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL UNSAFE AS $$
BEGIN
    RETURN convert_from(body, 'UTF8')::jsonb;
EXCEPTION WHEN others THEN
    BEGIN
        RETURN regexp_replace(convert_from(body, 'UTF8'), '\\u(0000|[dD][89a-fA-F][0-9a-fA-F]{2})', '\\ufffd', 'g')::jsonb;
    EXCEPTION WHEN others THEN
        RETURN NULL;
    END;
END $$;

CREATE OR REPLACE VIEW webhook_event_payloads AS
    SELECT e.event_id, e.event_type, e.created_at, webhook_body_as_json(p.body) AS payload
    FROM webhook_events e
    JOIN webhook_payloads p ON p.seq = e.seq AND p.created_at = e.created_at;

-- Every failed try, with its error. retry_count is the number of the try, from 1; at 5 the event is dead.
CREATE TABLE IF NOT EXISTS webhook_failures (
    id            bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    event_id      text        COLLATE "C" NOT NULL REFERENCES webhook_events ON DELETE CASCADE,
    event_type    text        NOT NULL,
    retry_count   smallint    NOT NULL CHECK (retry_count BETWEEN 1 AND 5),
    -- When it was to be tried again; null: this was the last try.
    next_try_at   timestamptz,
    error_type    text        NOT NULL,
    error_message text        NOT NULL,
    traceback     text        NOT NULL DEFAULT '',
    -- The same for failures with one cause: the type of the error and where in the code it was raised.
    fingerprint   text        NOT NULL
);
CREATE INDEX IF NOT EXISTS webhook_failures_event ON webhook_failures (event_id, id);
CREATE INDEX IF NOT EXISTS webhook_failures_fingerprint ON webhook_failures (fingerprint, created_at);
CREATE INDEX IF NOT EXISTS webhook_failures_created_at ON webhook_failures (created_at);

-- Ids of events that were cleaned up while Stripe could still send them again (it does so for 30 days), so that
-- a late copy is known for what it is.
CREATE TABLE IF NOT EXISTS webhook_tombstones (
    event_id       text        COLLATE "C" PRIMARY KEY,
    stripe_created timestamptz NOT NULL
);
CREATE INDEX IF NOT EXISTS webhook_tombstones_stripe_created ON webhook_tombstones (stripe_created);

-- What operators did by hand.
CREATE TABLE IF NOT EXISTS webhook_audit (
    id      bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at      timestamptz NOT NULL DEFAULT now(),
    action  text        NOT NULL,
    filters jsonb       NOT NULL,
    count   bigint      NOT NULL
);

-- ── Counts ──────────────────────────────────────────────────────────────────────────────────────────────────
-- Statistics never scan the ledger: each statement that changes it adds a few lines here (by trigger, so that
-- the counts are right whoever changes it), and a maintenance turn folds them into minutes and hours.
-- Appending lines instead of updating a counter keeps writers from waiting for one another.

CREATE TABLE IF NOT EXISTS webhook_count_changes (
    minute        timestamptz NOT NULL,   -- of the event's created_at
    event_type    text        NOT NULL,
    received      integer     NOT NULL,
    processed     integer     NOT NULL,
    failed        integer     NOT NULL,
    processing_us bigint      NOT NULL
);

CREATE TABLE IF NOT EXISTS webhook_counts_by_minute (
    minute        timestamptz NOT NULL,
    event_type    text        NOT NULL,
    received      bigint      NOT NULL,
    processed     bigint      NOT NULL,
    failed        bigint      NOT NULL,
    processing_us bigint      NOT NULL,
    PRIMARY KEY (minute, event_type)
);

CREATE TABLE IF NOT EXISTS webhook_counts_by_hour (
    hour          timestamptz NOT NULL,
    event_type    text        NOT NULL,
    received      bigint      NOT NULL,
    processed     bigint      NOT NULL,
    failed        bigint      NOT NULL,
    processing_us bigint      NOT NULL,
    PRIMARY KEY (hour, event_type)
);

-- A later migration may have made another of it, and running this file again must not undo that.
DO $do$
BEGIN
    IF to_regprocedure('webhook_count_inserted()') IS NULL THEN
        CREATE FUNCTION webhook_count_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO webhook_count_changes
            SELECT date_trunc('minute', created_at), event_type, count(*), count(*) FILTER (WHERE status = 'processed'),
                   count(*) FILTER (WHERE status = 'failed'), sum(processing_us)
            FROM came GROUP BY 1, 2;
            -- Whoever stores an event wakes the workers; equal notices of one transaction arrive as one.
            IF EXISTS (SELECT FROM came WHERE next_try_at IS NOT NULL) THEN
                PERFORM pg_notify('webhook_events', '');
            END IF;
            RETURN NULL;
        END $$;
    END IF;
END $do$;

CREATE OR REPLACE FUNCTION webhook_count_updated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_count_changes
    SELECT minute, event_type, sum(received), sum(processed), sum(failed), sum(processing_us)
    FROM (SELECT date_trunc('minute', created_at) AS minute, event_type, 1 AS received,
                 (status = 'processed')::int AS processed, (status = 'failed')::int AS failed, processing_us
          FROM came
          UNION ALL
          SELECT date_trunc('minute', created_at), event_type, -1,
                 -(status = 'processed')::int, -(status = 'failed')::int, -processing_us
          FROM went) AS changes
    GROUP BY minute, event_type
    HAVING sum(received) <> 0 OR sum(processed) <> 0 OR sum(failed) <> 0 OR sum(processing_us) <> 0;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION webhook_count_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_count_changes
    SELECT date_trunc('minute', created_at), event_type, -count(*), -count(*) FILTER (WHERE status = 'processed'),
           -count(*) FILTER (WHERE status = 'failed'), -sum(processing_us)
    FROM went GROUP BY 1, 2;
    RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER webhook_events_count_inserted AFTER INSERT ON webhook_events
    REFERENCING NEW TABLE AS came FOR EACH STATEMENT EXECUTE FUNCTION webhook_count_inserted();
CREATE OR REPLACE TRIGGER webhook_events_count_updated AFTER UPDATE ON webhook_events
    REFERENCING NEW TABLE AS came OLD TABLE AS went FOR EACH STATEMENT EXECUTE FUNCTION webhook_count_updated();
CREATE OR REPLACE TRIGGER webhook_events_count_deleted AFTER DELETE ON webhook_events
    REFERENCING OLD TABLE AS went FOR EACH STATEMENT EXECUTE FUNCTION webhook_count_deleted();

-- Folds the changes into the counts; returns how many lines it folded. One caller at a time; others return 0.
CREATE OR REPLACE FUNCTION webhook_fold_counts() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    folded bigint;
BEGIN
    IF NOT pg_try_advisory_xact_lock(118038671810929) THEN
        RETURN 0;
    END IF;
    WITH gone AS (
        DELETE FROM webhook_count_changes RETURNING *
    ), summed AS (
        SELECT minute, event_type, sum(received) AS received, sum(processed) AS processed, sum(failed) AS failed,
               sum(processing_us) AS processing_us, count(*) AS lines
        FROM gone GROUP BY minute, event_type
    ), by_minute AS (
        INSERT INTO webhook_counts_by_minute AS c
        SELECT minute, event_type, received, processed, failed, processing_us FROM summed
        WHERE minute > now() - interval '8 days'
        ON CONFLICT (minute, event_type) DO UPDATE SET
            received = c.received + excluded.received, processed = c.processed + excluded.processed,
            failed = c.failed + excluded.failed, processing_us = c.processing_us + excluded.processing_us
    ), by_hour AS (
        INSERT INTO webhook_counts_by_hour AS c
        SELECT date_trunc('hour', minute), event_type, sum(received), sum(processed), sum(failed), sum(processing_us)
        FROM summed GROUP BY 1, 2
        ON CONFLICT (hour, event_type) DO UPDATE SET
            received = c.received + excluded.received, processed = c.processed + excluded.processed,
            failed = c.failed + excluded.failed, processing_us = c.processing_us + excluded.processing_us
    )
    SELECT coalesce(sum(lines), 0) INTO folded FROM summed;
    -- Minutes serve the last week's pictures; hours are kept for good.
    DELETE FROM webhook_counts_by_minute WHERE minute < now() - interval '8 days';
    RETURN folded;
END $$;

-- Counts by type of the events received since a moment within the last week (older: to the hour).
CREATE OR REPLACE FUNCTION webhook_counts_since(since timestamptz)
RETURNS TABLE (event_type text, received bigint, processed bigint, failed bigint, processing_us bigint)
LANGUAGE sql STABLE AS $$
    WITH edge AS (SELECT date_trunc('hour', since) + interval '1 hour' AS at)
    SELECT event_type, sum(received)::bigint, sum(processed)::bigint, sum(failed)::bigint, sum(processing_us)::bigint
    FROM (SELECT event_type, received, processed, failed, processing_us
          FROM webhook_counts_by_hour, edge WHERE hour >= edge.at
          UNION ALL
          SELECT event_type, received, processed, failed, processing_us
          FROM webhook_counts_by_minute, edge
          WHERE minute >= date_trunc('minute', since) AND minute < edge.at
          UNION ALL
          SELECT event_type, received, processed, failed, processing_us
          FROM webhook_count_changes WHERE minute >= date_trunc('minute', since)) AS parts
    GROUP BY event_type
    HAVING sum(received) <> 0 OR sum(processed) <> 0 OR sum(failed) <> 0
$$;

-- Overall statistics, a line for each type of event.
CREATE OR REPLACE VIEW webhook_statistics AS
    SELECT event_type,
           received AS total_events,
           processed,
           failed,
           received - processed - failed AS pending,
           round(100.0 * processed / nullif(processed + failed, 0), 2) AS success_rate,
           round(processing_us / 1000.0 / nullif(processed, 0), 2) AS avg_processing_time_ms
    FROM webhook_counts_since('-infinity')
    ORDER BY received DESC, event_type;

-- How things are, in one line; /health says the same. A later migration has made another of it.
DO $do$
BEGIN
    IF to_regclass('webhook_health_check') IS NULL THEN
        CREATE VIEW webhook_health_check AS
            WITH day AS (
                SELECT coalesce(sum(received), 0)::bigint AS events, coalesce(sum(failed), 0)::bigint AS failed
                FROM webhook_counts_since(now() - interval '24 hours')
            ), due AS (
                SELECT greatest(extract(epoch FROM now() - min(next_try_at)), 0)::float8 AS seconds
                FROM webhook_events WHERE next_try_at IS NOT NULL
            )
            SELECT CASE WHEN day.failed > 0.20 * day.events THEN 'unhealthy'
                        WHEN day.failed > 0.10 * day.events OR coalesce(due.seconds, 0) > 300 THEN 'degraded'
                        ELSE 'healthy' END AS status,
                   day.events AS events_last_24h,
                   day.failed AS failed_events_last_24h,
                   coalesce(due.seconds, 0) AS oldest_due_seconds
            FROM day, due;
    END IF;
END $do$;

INSERT INTO webhook_migrations (name) VALUES ('004_webhook_tables') ON CONFLICT DO NOTHING;

COMMIT;
