-- What the testing kit asks of the database under test.

-- name: create_database
SELECT format('CREATE DATABASE %I', $1::text);

-- name: drop_database
SELECT format('DROP DATABASE IF EXISTS %I WITH (FORCE)', $1::text);

-- name: prepare
-- Functions that keep what the tables hold, and bring it back. They know nobody's tables by name: whatever is in the
-- database is kept, Kamiyo's tables and those of the application under test alike.
CREATE SCHEMA kamiyo_testing;

CREATE FUNCTION kamiyo_testing.tables(OUT relation regclass, OUT source text) RETURNS SETOF record
LANGUAGE sql STABLE AS $function$
    SELECT c.oid::regclass, CASE c.relkind WHEN 'r' THEN format('ONLY %s', c.oid::regclass) ELSE c.oid::regclass::text END
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition
      AND n.nspname !~ '^(pg_|information_schema$|kamiyo_testing$|kamiyo_kept_)'
      -- What an extension brought along is no test's to change.
      AND NOT EXISTS (SELECT FROM pg_depend AS d
                      WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
$function$;

CREATE FUNCTION kamiyo_testing.keep(name text) RETURNS void LANGUAGE plpgsql AS $function$
DECLARE
    place text := quote_ident('kamiyo_kept_' || name);
    relation regclass;
    source text;
    filled boolean;
BEGIN
    EXECUTE format('DROP SCHEMA IF EXISTS %s CASCADE', place);
    EXECUTE format('CREATE SCHEMA %s', place);
    EXECUTE format('CREATE TABLE %s.sequences AS SELECT format(''%%I.%%I'', schemaname, sequencename)::regclass AS '
                   'sequence, last_value, start_value FROM pg_sequences', place);
    FOR relation, source IN SELECT * FROM kamiyo_testing.tables() LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM %s)', source) INTO filled;
        IF filled THEN
            EXECUTE format('CREATE TABLE %s.%I AS SELECT * FROM %s', place, relation::oid, source);
        END IF;
    END LOOP;
END
$function$;

CREATE FUNCTION kamiyo_testing.bring_back(name text) RETURNS void LANGUAGE plpgsql AS $function$
DECLARE
    place text := quote_ident('kamiyo_kept_' || name);
    relation regclass;
    source text;
    columns text;
BEGIN
    -- Neither triggers nor foreign keys have a say in this: the rows were right when they were kept.
    PERFORM set_config('session_replication_role', 'replica', true);
    PERFORM set_config('lock_timeout', '5s', true);
    FOR relation, source IN SELECT * FROM kamiyo_testing.tables() LOOP
        -- DELETE, because the tables are small: half a millisecond for them all, where TRUNCATE takes 43.
        EXECUTE format('DELETE FROM %s', source);
        IF to_regclass(format('%s.%I', place, relation::oid)) IS NOT NULL THEN
            SELECT string_agg(quote_ident(attname), ', ') INTO columns FROM pg_attribute
            WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped AND attgenerated = '';
            EXECUTE format('INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT %2$s FROM %s.%I',
                           relation, columns, place, relation::oid);
        END IF;
    END LOOP;
    EXECUTE format('SELECT setval(sequence, coalesce(last_value, start_value), last_value IS NOT NULL) FROM %s.sequences',
                   place);
END
$function$;

-- name: keep
SELECT kamiyo_testing.keep($1);

-- name: bring_back
SELECT kamiyo_testing.bring_back($1);

-- name: may_prepare
-- Whether this role may set triggers aside.
SELECT rolsuper FROM pg_roles WHERE rolname = current_user;

-- name: standing
-- How many events are in line or in work, and in how many seconds the next failed one is tried again.
SELECT count(*) FILTER (WHERE status IN ('pending', 'processing')) AS unfinished,
       extract(epoch FROM min(next_try_at) FILTER (WHERE status = 'failed') - now())::float8 AS next_try_in
FROM webhook_events;

-- name: let_time_pass
-- Everything that waits for its time comes so many seconds nearer, and keeps its order. What a worker is just taking waits no
-- more; and to wait for it could be a deadlock, since whoever settles takes rows in another order.
UPDATE webhook_events SET next_try_at = next_try_at - make_interval(secs => $1)
WHERE event_id IN (
    SELECT event_id FROM webhook_events WHERE status = 'failed' AND next_try_at IS NOT NULL FOR UPDATE SKIP LOCKED
);

-- name: wake
SELECT pg_notify('webhook_events', '');

-- name: settled
SELECT e.event_id, e.event_type, e.outcome, e.attempts, e.status = 'failed' AS dead, f.error_type, f.error_message,
       f.traceback
FROM webhook_events AS e
LEFT JOIN LATERAL (SELECT * FROM webhook_failures AS f WHERE f.event_id = e.event_id ORDER BY f.id DESC LIMIT 1) AS f
    ON e.status = 'failed'
ORDER BY e.seq;

-- name: waiting
-- For the sentence about a wait that was too long.
SELECT event_id, event_type, status FROM webhook_events
WHERE status IN ('pending', 'processing') OR next_try_at IS NOT NULL
ORDER BY seq LIMIT 5;
