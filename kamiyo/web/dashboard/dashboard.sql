-- What the dashboard asks. Each question is bounded, and served by an index: the ledger may hold ten million events.

-- name: limits
-- For the transaction of one page: nobody who only looks may hold the database up; each plan is made for its values,
-- because the filters are optional; and compiling a plan takes longer than any of these takes to run.
SELECT set_config('statement_timeout', $1, true), set_config('plan_cache_mode', 'force_custom_plan', true),
       set_config('jit', 'off', true);

-- name: dead
-- How many events are dead, up to $1.
SELECT count(*) FROM (SELECT FROM webhook_unfinished WHERE next_try_at IS NULL LIMIT $1) AS dead;

-- ── Overview ────────────────────────────────────────────────────────────────────────────────────────────────

-- name: standing
-- How things stand now, one row. Counts go up to $1.
WITH queue AS (
    SELECT count(*) FILTER (WHERE NOT failed) AS waiting, count(*) FILTER (WHERE failed) AS retrying,
           min(next_try_at) FILTER (WHERE failed) AS next_retry_at
    FROM (SELECT failed, next_try_at FROM webhook_unfinished WHERE next_try_at IS NOT NULL
          ORDER BY next_try_at LIMIT $1) AS waiting
), oldest AS (
    SELECT event_id, next_try_at FROM webhook_unfinished WHERE next_try_at IS NOT NULL ORDER BY next_try_at, seq LIMIT 1
), latest AS (
    SELECT created_at, processed_at FROM webhook_events ORDER BY created_at DESC, seq DESC LIMIT 1000
)
SELECT queue.*, oldest.event_id AS oldest_event_id,
       coalesce(greatest(extract(epoch FROM now() - oldest.next_try_at), 0), 0)::float8 AS oldest_due_seconds,
       (SELECT max(created_at) FROM latest) AS last_event_at,
       -- From being committed to being processed, of the latest thousand.
       (SELECT percentile_cont(ARRAY[0.5, 0.95])
               WITHIN GROUP (ORDER BY extract(epoch FROM processed_at - created_at)::float8)
        FROM latest WHERE processed_at IS NOT NULL) AS seconds_to_processed,
       -- Lanes in the hands of workers: none, while events are overdue, says that no worker is at work.
       (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1800432 AND objsubid = 2
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())) AS lanes_held,
       -- What waits for Stripe's API, and since when that does not answer.
       (SELECT count(*) FROM (SELECT FROM webhook_events WHERE read_due_at <= now() LIMIT $1) AS unread) AS unread,
       coalesce((SELECT greatest(extract(epoch FROM now() - min(read_due_at)), 0) FROM webhook_events
                 WHERE read_due_at IS NOT NULL), 0)::float8 AS oldest_unread_seconds,
       webhook_circuit_opened_at() AS circuit_opened_at,
       now() AS now
FROM queue LEFT JOIN oldest ON true;

-- name: traffic_by_minute
-- Counts of the events received since $1, in steps of $2 seconds.
SELECT to_timestamp(floor(extract(epoch FROM minute) / $2::bigint) * $2::bigint) AS at, sum(received)::bigint AS received,
       sum(processed)::bigint AS processed, sum(failed)::bigint AS failed, sum(processing_us)::bigint AS processing_us
FROM (SELECT minute, received, processed, failed, processing_us FROM webhook_counts_by_minute WHERE minute >= $1
      UNION ALL
      SELECT minute, received, processed, failed, processing_us FROM webhook_count_changes WHERE minute >= $1) AS parts
GROUP BY 1;

-- name: traffic_by_hour
-- The same from the counts by the hour, for long ranges. $1 must be a full hour, $2 whole hours.
SELECT to_timestamp(floor(extract(epoch FROM hour) / $2::bigint) * $2::bigint) AS at, sum(received)::bigint AS received,
       sum(processed)::bigint AS processed, sum(failed)::bigint AS failed, sum(processing_us)::bigint AS processing_us
FROM (SELECT hour, received, processed, failed, processing_us FROM webhook_counts_by_hour WHERE hour >= $1
      UNION ALL
      SELECT minute, received, processed, failed, processing_us FROM webhook_count_changes WHERE minute >= $1) AS parts
GROUP BY 1;

-- name: backlog
-- The backlog since $1, at its highest in each step of $2 seconds.
SELECT to_timestamp(floor(extract(epoch FROM minute) / $2::bigint) * $2::bigint) AS at, max(waiting) AS waiting,
       max(retrying) AS retrying, max(oldest_due_seconds) AS oldest_due_seconds
FROM webhook_backlog_by_minute WHERE minute >= $1 GROUP BY 1;

-- name: sample_backlog
SELECT webhook_sample_backlog();

-- name: types
-- The types received since $1, most frequent first.
SELECT event_type, received, processed, failed, received - processed - failed AS pending, processing_us
FROM webhook_counts_since($1) ORDER BY received DESC, event_type LIMIT $2;

-- name: day
-- Received and failed in the 24 hours before now.
SELECT coalesce(sum(received), 0)::bigint AS received, coalesce(sum(failed), 0)::bigint AS failed
FROM webhook_counts_since(now() - interval '24 hours');

-- name: undecided
-- Rows of the billing tables that two events of one second contradict each other about.
SELECT kind, id, account, livemode, customer, last_webhook_event_id, last_webhook_updated_at FROM (
    (SELECT 'customer' AS kind, id, account, livemode, id AS customer, last_webhook_event_id, last_webhook_updated_at
     FROM billing.customers WHERE order_evidence = 'undecided' LIMIT $1)
    UNION ALL
    (SELECT 'subscription', id, account, livemode, customer, last_webhook_event_id, last_webhook_updated_at
     FROM billing.subscriptions WHERE order_evidence = 'undecided' LIMIT $1)
    UNION ALL
    (SELECT 'invoice', id, account, livemode, customer, last_webhook_event_id, last_webhook_updated_at
     FROM billing.invoices WHERE order_evidence = 'undecided' LIMIT $1)
    UNION ALL
    (SELECT 'payment_method', id, account, livemode, customer, last_webhook_event_id, last_webhook_updated_at
     FROM billing.payment_methods WHERE order_evidence = 'undecided' LIMIT $1)
) AS found ORDER BY last_webhook_updated_at DESC LIMIT $1;

-- ── Events ──────────────────────────────────────────────────────────────────────────────────────────────────

-- name: newer_events
-- The page above the position ($10, $11), for going back: the list of the inbox in the other direction, oldest first.
SELECT e.*, f.error_type FROM (
    SELECT seq, event_id, event_type, status, outcome, created_at, processed_at, failed_at, next_try_at, attempts,
           processing_us, object_type, object_id, customer, account, livemode, read_due_at
    FROM webhook_events
    WHERE CASE WHEN $1::text IS NULL THEN true
               WHEN $1 IN ('failed', 'retrying', 'dead') THEN failed_at IS NOT NULL
               WHEN $1 = 'unread' THEN read_due_at IS NOT NULL
               ELSE status = $1 END
      AND ($1 IS NULL OR $1 NOT IN ('pending', 'processing', 'retrying') OR next_try_at IS NOT NULL)
      AND ($1 IS DISTINCT FROM 'dead' OR next_try_at IS NULL)
      AND ($2::text IS NULL OR event_type = $2)
      AND ($3::text IS NULL OR customer = $3 AND webhook_day(created_at) = ANY ((SELECT webhook_days())::date[]))
      AND ($4::text IS NULL OR object_id = $4)
      AND ($5::text IS NULL OR account = $5 AND ($5 = '' OR account <> ''))
      AND ($6::text IS NULL OR context = $6 AND context <> '')
      AND ($7::boolean IS NULL OR livemode = $7)
      AND ($8::timestamptz IS NULL OR created_at >= $8)
      AND ($9::timestamptz IS NULL OR created_at < $9)
      AND (created_at, seq) > ($10::timestamptz, $11::bigint)
    ORDER BY CASE WHEN $3 IS NOT NULL THEN webhook_day(created_at) END, created_at, seq
    LIMIT $12
) AS e
LEFT JOIN LATERAL (SELECT error_type FROM webhook_failures
                   WHERE event_id = e.event_id AND e.failed_at IS NOT NULL ORDER BY id DESC LIMIT 1) AS f ON true
ORDER BY e.created_at, e.seq;

-- name: known_types
-- Types received in the last week, for the filter to suggest.
SELECT event_type FROM webhook_counts_since(now() - interval '7 days') ORDER BY event_type LIMIT 300;

-- name: found
-- What has the id $1, or begins with it ($2 is the end of that range), up to $3 of each kind. Ids compare by bytes, so
-- a range of the primary keys serves the beginnings. Objects of other kinds are found by their whole id.
SELECT kind, id, detail FROM (
    (SELECT 1 AS place, 'event' AS kind, event_id AS id, event_type AS detail
     FROM webhook_events WHERE event_id >= $1 AND event_id < $2 ORDER BY event_id LIMIT $3)
    UNION ALL
    (SELECT DISTINCT 2, 'customer', id, ''
     FROM billing.customers WHERE id >= $1 AND id < $2 ORDER BY id LIMIT $3)
    UNION ALL
    (SELECT 2, 'customer', customer, ''
     FROM webhook_events_of($1) LIMIT 1)
    UNION ALL
    (SELECT DISTINCT 3, 'object', id, 'subscription'
     FROM billing.subscriptions WHERE id >= $1 AND id < $2 ORDER BY id LIMIT $3)
    UNION ALL
    (SELECT DISTINCT 3, 'object', id, 'invoice'
     FROM billing.invoices WHERE id >= $1 AND id < $2 ORDER BY id LIMIT $3)
    UNION ALL
    (SELECT DISTINCT 3, 'object', id, 'payment_method'
     FROM billing.payment_methods WHERE id >= $1 AND id < $2 ORDER BY id LIMIT $3)
    UNION ALL
    (SELECT 3, 'object', object_id, coalesce(object_type, '')
     FROM webhook_events WHERE object_id = $1 LIMIT 1)
    UNION ALL
    (SELECT 4, 'account', account, ''
     FROM webhook_events WHERE account = $1 AND account <> '' LIMIT 1)
) AS found
GROUP BY place, kind, id, detail ORDER BY place, id;

-- ── Event ───────────────────────────────────────────────────────────────────────────────────────────────────

-- name: around_customer
-- The customer's events around the position ($2, $3): up to $4 on either side, newest first, itself included; of the
-- same account ($5) and mode ($6), for an id may be known in several.
SELECT * FROM (
    (SELECT seq, event_id, event_type, status, outcome, created_at, failed_at, next_try_at, object_id, processing_us
     FROM webhook_events_of($1)
     WHERE account = $5 AND livemode = $6 AND (created_at, seq) > ($2::timestamptz, $3::bigint)
     ORDER BY webhook_day(created_at), created_at, seq LIMIT $4)
    UNION ALL
    (SELECT seq, event_id, event_type, status, outcome, created_at, failed_at, next_try_at, object_id, processing_us
     FROM webhook_events_of($1)
     WHERE account = $5 AND livemode = $6 AND (created_at, seq) <= ($2::timestamptz, $3::bigint)
     ORDER BY webhook_day(created_at) DESC, created_at DESC, seq DESC LIMIT $4 + 1)
) AS around ORDER BY created_at DESC, seq DESC;

-- name: around_object
-- The same for an object that is nobody's. By Stripe's time, for that is what the index of objects has.
SELECT * FROM (
    (SELECT seq, event_id, event_type, status, outcome, created_at, failed_at, next_try_at, object_id, processing_us
     FROM webhook_events
     WHERE object_id = $1 AND account = $5 AND livemode = $6 AND (stripe_created, seq) > ($2::timestamptz, $3::bigint)
     ORDER BY stripe_created, seq LIMIT $4)
    UNION ALL
    (SELECT seq, event_id, event_type, status, outcome, created_at, failed_at, next_try_at, object_id, processing_us
     FROM webhook_events
     WHERE object_id = $1 AND account = $5 AND livemode = $6 AND (stripe_created, seq) <= ($2::timestamptz, $3::bigint)
     ORDER BY stripe_created DESC, seq DESC LIMIT $4 + 1)
) AS around ORDER BY created_at DESC, seq DESC;

-- name: earlier_of_object
-- The bodies of the events that Stripe made of this object up to then, latest first: what it was like before.
SELECT e.event_id, e.created_at, p.body
FROM webhook_events AS e
JOIN webhook_payloads AS p ON p.seq = e.seq AND p.created_at = e.created_at
WHERE e.object_id = $1 AND e.account = $2 AND e.livemode = $3 AND e.stripe_created <= $4 AND NOT e.thin
  AND e.event_id <> $5
ORDER BY e.stripe_created DESC, e.seq DESC
LIMIT 20;

-- name: now_customers
SELECT * FROM billing.customers WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: now_subscriptions
SELECT * FROM billing.subscriptions WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: now_invoices
SELECT * FROM billing.invoices WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: now_payment_methods
SELECT * FROM billing.payment_methods WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: mirrored
-- What KAMIYO_MIRROR keeps of an object.
SELECT last_webhook_event_id, deleted, order_evidence FROM stripe_objects
WHERE id = $1 AND object = $2 AND account = $3 AND livemode = $4;

-- ── Failures ────────────────────────────────────────────────────────────────────────────────────────────────

-- name: groups
-- What is failed now, by the fingerprint of its last failure: of the $1 events that came last, so that an outage of a
-- million costs no more to look at. With $2 only the dead. First and last seen are over everything that is remembered.
WITH failed AS MATERIALIZED (
    (SELECT event_id, event_type, next_try_at FROM webhook_events
     WHERE NOT $2::boolean AND failed_at IS NOT NULL ORDER BY created_at DESC, seq DESC LIMIT $1)
    UNION ALL
    (SELECT event_id, e.event_type, e.next_try_at
     FROM (SELECT event_id FROM webhook_unfinished WHERE $2 AND next_try_at IS NULL
           ORDER BY created_at DESC, seq DESC LIMIT $1) AS dead JOIN webhook_events AS e USING (event_id))
), last AS MATERIALIZED (
    SELECT failed.event_type, failed.next_try_at, f.id, f.fingerprint
    FROM failed CROSS JOIN LATERAL (
        SELECT id, fingerprint FROM webhook_failures WHERE event_id = failed.event_id ORDER BY id DESC LIMIT 1
    ) AS f
), groups AS (
    SELECT fingerprint, count(*) AS events, count(*) FILTER (WHERE next_try_at IS NULL) AS dead,
           min(next_try_at) AS next_try_at, max(id) AS example, array_agg(DISTINCT event_type) AS types
    FROM last GROUP BY fingerprint
)
SELECT g.fingerprint, g.events, g.dead, g.next_try_at, g.types, f.event_id, f.error_type, f.error_message, f.traceback,
       (SELECT min(created_at) FROM webhook_failures WHERE fingerprint = g.fingerprint) AS first_seen,
       (SELECT max(created_at) FROM webhook_failures WHERE fingerprint = g.fingerprint) AS last_seen
FROM groups AS g JOIN webhook_failures AS f ON f.id = g.example
ORDER BY g.dead DESC, g.events DESC, g.fingerprint;

-- name: failed_counts
-- How many events are failed, up to $1, and how many of them are dead.
SELECT count(*) AS failed, count(*) FILTER (WHERE next_try_at IS NULL) AS dead, min(created_at) AS oldest
FROM (SELECT next_try_at, created_at FROM webhook_events WHERE failed_at IS NOT NULL
      ORDER BY created_at DESC, seq DESC LIMIT $1) AS failed;

-- name: group_example
-- The latest failure with this fingerprint, and when it was first seen.
SELECT error_type, error_message, traceback, event_id, created_at AS last_seen,
       (SELECT min(created_at) FROM webhook_failures WHERE fingerprint = $1) AS first_seen
FROM webhook_failures WHERE fingerprint = $1 ORDER BY created_at DESC LIMIT 1;

-- name: group_events
-- The events that are failed now and whose last failure has this fingerprint, the latest failure first; up to $2.
SELECT e.seq, e.event_id, e.event_type, e.status, e.outcome, e.created_at, e.processed_at, e.failed_at, e.next_try_at,
       e.attempts, e.processing_us, e.object_type, e.object_id, e.customer, e.account, e.livemode,
       f.error_type, f.error_message
FROM webhook_failures AS f
JOIN webhook_events AS e ON e.event_id = f.event_id AND e.failed_at IS NOT NULL
WHERE f.fingerprint = $1
  AND NOT EXISTS (SELECT FROM webhook_failures AS later WHERE later.event_id = f.event_id AND later.id > f.id)
ORDER BY f.created_at DESC
LIMIT $2;

-- name: by_hand
-- What people did lately.
SELECT at, action, filters, count FROM webhook_audit ORDER BY id DESC LIMIT $1;

-- name: begin_replay
INSERT INTO webhook_replays (fingerprint, total) VALUES ($1, $2) RETURNING id;

-- name: tell_replay
-- A sign of life of a replay.
UPDATE webhook_replays SET done = $2, heard_at = now() WHERE id = $1;

-- name: end_replay
UPDATE webhook_replays SET done = $2, stopped_by = $3, heard_at = now(), finished_at = now() WHERE id = $1;

-- name: replay
SELECT *, extract(epoch FROM now() - heard_at)::float8 AS silent_seconds FROM webhook_replays WHERE id = $1;

-- name: replay_outcome
-- What became of the events that were put back in line: those that had failed with this fingerprint ($1) before it began
-- ($2), by where they stand now. Of very many, only those of the first $3 failures: they are also put back first.
WITH followed AS MATERIALIZED (
    SELECT event_id FROM webhook_failures
    WHERE fingerprint = $1 AND created_at < $2
    ORDER BY created_at LIMIT $3
)
SELECT count(*) AS followed,
       (SELECT count(*) FROM followed) < $3 AS all_followed,
       count(*) FILTER (WHERE e.status = 'processed' AND e.processed_at >= $2) AS processed,
       count(*) FILTER (WHERE e.status IN ('pending', 'processing')) AS waiting,
       count(*) FILTER (WHERE e.status = 'failed' AND e.failed_at >= $2) AS failed
FROM (SELECT DISTINCT event_id FROM followed) AS was
JOIN webhook_events AS e USING (event_id);

-- ── Customer ────────────────────────────────────────────────────────────────────────────────────────────────

-- name: whose_customer
-- The accounts and modes in which a customer of this id is known: from the billing tables, and from the latest of the
-- events that name them. Nearly always one.
SELECT account, livemode FROM (
    (SELECT account, livemode FROM billing.customers WHERE id = $1 LIMIT 20)
    UNION
    (SELECT account, livemode FROM billing.subscriptions WHERE customer = $1 LIMIT 200)
    UNION
    (SELECT account, livemode FROM billing.invoices WHERE customer = $1 LIMIT 200)
    UNION
    (SELECT account, livemode FROM billing.payment_methods WHERE customer = $1 LIMIT 200)
    UNION
    (SELECT account, livemode FROM webhook_events_of($1) ORDER BY webhook_day(created_at) DESC, created_at DESC LIMIT 200)
) AS known ORDER BY account, livemode DESC;

-- name: customer
SELECT * FROM billing.customers WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: subscriptions
SELECT * FROM billing.subscriptions WHERE customer = $1 AND account = $2 AND livemode = $3
ORDER BY ended_at DESC NULLS FIRST, created DESC LIMIT $4;

-- name: invoices
SELECT * FROM billing.invoices WHERE customer = $1 AND account = $2 AND livemode = $3
ORDER BY created DESC NULLS LAST, id LIMIT $4;

-- name: payment_methods
SELECT * FROM billing.payment_methods WHERE customer = $1 AND account = $2 AND livemode = $3
ORDER BY created DESC NULLS LAST, id LIMIT $4;

-- name: timeline
-- A customer's events with their bodies, newest first, below the position ($4, $5).
SELECT e.seq, e.event_id, e.event_type, e.status, e.outcome, e.created_at, e.failed_at, e.next_try_at, e.object_id,
       e.account, e.livemode,
       (SELECT p.body FROM webhook_payloads AS p WHERE p.seq = e.seq AND p.created_at = e.created_at) AS body
FROM webhook_events_of($1) AS e
WHERE e.account = $2 AND e.livemode = $3
  AND ($4::timestamptz IS NULL OR (e.created_at, e.seq) < ($4, $5::bigint))
ORDER BY webhook_day(e.created_at) DESC, e.created_at DESC, e.seq DESC
LIMIT $6;
