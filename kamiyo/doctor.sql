-- What the doctor looks at in PostgreSQL. Reads only.

-- name: server
SELECT current_setting('server_version_num')::int AS version_number,
       current_setting('server_version') AS version,
       current_setting('fsync') = 'on' AS fsync,
       current_setting('full_page_writes') = 'on' AS full_page_writes,
       current_setting('synchronous_commit') AS synchronous_commit,
       current_setting('wal_compression') AS wal_compression,
       pg_is_in_recovery() OR current_setting('default_transaction_read_only') = 'on' AS read_only;

-- name: clock
SELECT extract(epoch FROM clock_timestamp())::float8;

-- name: role
SELECT rolname AS name, rolsuper AS superuser FROM pg_roles WHERE rolname = current_user;

-- name: rights
-- Tables of ours on which this role lacks a right that a running Kamiyo needs, and whether it owns all of them.
WITH ours AS (
    SELECT c.oid, c.oid::regclass::text AS name, c.relowner FROM pg_class AS c
    WHERE c.relkind IN ('r', 'p') AND c.relname <> 'webhook_migrations'
      AND (c.relnamespace = to_regnamespace('billing')
           OR c.relname LIKE 'webhook\_%' AND c.relname !~ '_\d{8}$' AND c.oid = to_regclass(quote_ident(c.relname)))
)
SELECT coalesce(array_agg(name ORDER BY name) FILTER (WHERE NOT (
           has_schema_privilege(relnamespace, 'USAGE')
           AND has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT')
           AND has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE'))), '{}') AS lacking,
       coalesce(bool_and(pg_has_role(relowner, 'USAGE')), false) AS owner
FROM (SELECT ours.*, c.relnamespace FROM ours JOIN pg_class AS c USING (oid)) AS tables;

-- name: workers
-- A worker listens for new events on a session of its own.
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'kamiyo listener';

-- name: processed
SELECT count(*) FROM (SELECT FROM webhook_events WHERE status = 'processed' LIMIT 1000) AS done;

-- name: unfinished
-- Events that are not finished, by the counts and by the table of them; apart only where the ledger's triggers were off.
SELECT (SELECT coalesce(sum(received - processed), 0) FROM webhook_counts_since('-infinity'))::bigint AS counted,
       (SELECT count(*) FROM webhook_unfinished) AS noted;

-- name: failures
-- The causes of the last day's failures, the most frequent first.
SELECT fingerprint, error_type, count(DISTINCT event_id) AS events FROM webhook_failures
WHERE created_at > now() - interval '1 day' GROUP BY fingerprint, error_type ORDER BY events DESC, fingerprint LIMIT 3;

-- name: compared
SELECT account, livemode, extract(epoch FROM now() - finished_at)::float8 AS seconds_ago, missed,
       refused_at > coalesce(finished_at, '-infinity') AS refused
FROM webhook_reconciliation ORDER BY account, livemode;

-- name: asking
-- What Stripe refuses the key for, if it did within the last hour, and for how long the circuit has been open.
SELECT CASE WHEN refused_last_at > now() - interval '1 hour' THEN refused_what END AS refused_what,
       extract(epoch FROM now() - webhook_circuit_opened_at())::float8 AS open_seconds
FROM webhook_api_budget;
