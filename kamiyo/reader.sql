-- What waits to be read from Stripe's API.
--
-- Some of what waits is due for a worker as well: it looks again after an hour. So whatever changes several events here
-- passes over those that somebody else is just changing. Whoever settles takes rows in another order, and to wait for one with
-- others in hand could be a deadlock. What is passed over still waits, and its turn comes a few seconds later.

-- name: alone
-- One process of many looks for what is due, so that no two read the same; the lock goes with the transaction.
SELECT pg_try_advisory_xact_lock(118038671810932);

-- name: told
-- Events whose snapshot twin was processed meanwhile need no read: to the workers, unless they have handlers ($1: their
-- types) that the twin did not run. Looked for among the newest, as twins come close together.
WITH told AS MATERIALIZED (
    SELECT e.event_id
    FROM (SELECT event_id, snapshot_event, event_type FROM webhook_events
          WHERE read_due_at IS NOT NULL AND snapshot_event IS NOT NULL ORDER BY read_due_at DESC LIMIT 1000) AS due
    JOIN webhook_events AS s ON s.event_id = due.snapshot_event
    JOIN webhook_events AS e ON e.event_id = due.event_id
    WHERE s.status = 'processed' AND e.status = 'pending' AND (s.outcome = 'handled' OR due.event_type <> ALL ($1::text[]))
    FOR UPDATE OF e SKIP LOCKED
)
UPDATE webhook_events AS e
SET read_due_at = NULL, read_try_at = NULL, next_try_at = now()
FROM told WHERE e.event_id = told.event_id
RETURNING pg_notify('webhook_events', '');

-- name: take
-- The objects that have waited longest, up to $1, each with what there is to know for reading it. All that is due of
-- them is left to this reader for $2 seconds: should it die, somebody else takes them then.
WITH due AS MATERIALIZED (
    SELECT event_id, coalesce(object_id, event_id) AS object_id, account, livemode, read_try_at FROM webhook_events
    WHERE read_try_at <= now() AND status = 'pending'
      AND (livemode = ANY ($4::boolean[]) OR (account, livemode) IN (SELECT * FROM unnest($5::text[], $6::boolean[])))
    ORDER BY read_try_at LIMIT 500
), objects AS MATERIALIZED (
    SELECT object_id, account, livemode, min(read_try_at) AS since, min(event_id) AS example FROM due
    GROUP BY 1, 2, 3 ORDER BY since LIMIT $1
), free AS MATERIALIZED (
    SELECT e.event_id, due.object_id FROM due JOIN objects USING (object_id, account, livemode)
    JOIN webhook_events AS e ON e.event_id = due.event_id
    -- Said again of the row as it is when it is locked; worded so that the index of what is to be read is no way to it.
    WHERE e.status = 'pending' AND (e.read_try_at <= now()) IS TRUE
    FOR UPDATE OF e SKIP LOCKED
), taken AS (
    UPDATE webhook_events AS e SET read_try_at = now() + make_interval(secs => $2)
    FROM free WHERE e.event_id = free.event_id
    RETURNING e.event_id, free.object_id, e.account, e.livemode
)
SELECT o.object_id AS asked_id, o.account, o.livemode, e.event_id, e.event_type, e.thin, e.context, e.api_version,
       e.object_type, e.object_id, e.customer, e.snapshot_event, extract(epoch FROM e.stripe_created)::bigint AS stripe_created,
       ARRAY(SELECT t.event_id FROM taken AS t
             WHERE t.object_id = o.object_id AND t.account = o.account AND t.livemode = o.livemode) AS taken,
       (SELECT p.body FROM webhook_payloads AS p WHERE p.seq = e.seq AND p.created_at = e.created_at) AS body,
       -- When an event that waits says that the object's life has ended.
       (SELECT extract(epoch FROM min(w.stripe_created))::bigint FROM webhook_events AS w
        WHERE w.object_id = o.object_id AND w.account = o.account AND w.livemode = o.livemode
          AND w.read_due_at IS NOT NULL AND w.event_type = ANY ($3::text[])) AS ended
FROM objects AS o JOIN webhook_events AS e ON e.event_id = o.example
WHERE EXISTS (SELECT FROM taken AS t
              WHERE t.object_id = o.object_id AND t.account = o.account AND t.livemode = o.livemode);

-- name: renew
-- These are still being read: nobody else takes them for $2 seconds more.
-- By id alone: named as a condition, read_try_at would tempt the planner to go through all that waits.
UPDATE webhook_events
SET read_try_at = CASE WHEN read_try_at IS NOT NULL
                       THEN greatest(read_try_at, clock_timestamp() + make_interval(secs => $2)) END
WHERE event_id = ANY (ARRAY(SELECT event_id FROM webhook_events WHERE event_id = ANY ($1::text[]) AND status = 'pending'
                            FOR UPDATE SKIP LOCKED));

-- name: ready
-- What was read is there: events that it shows, because their second was over when it was asked, go to the workers, in
-- the lane of the customer that it names. Not those that a worker is just about to look at by itself: it finds what was
-- read, and may have locked the lane that they are in.
UPDATE webhook_events AS e
SET read_due_at = NULL, read_try_at = NULL, next_try_at = now(), customer = coalesce(e.customer, $5),
    lane = CASE WHEN e.customer IS NULL AND $5::text IS NOT NULL THEN $6 ELSE e.lane END
WHERE (e.object_id = $1 OR e.event_id = $1) AND e.account = $2 AND e.livemode = $3 AND e.read_due_at IS NOT NULL
  AND e.status = 'pending' AND e.next_try_at > clock_timestamp() + interval '5 seconds'
  AND webhook_second_over(e.stripe_created, e.created_at) <= to_timestamp($4) + interval '1 second'
RETURNING e.event_id, pg_notify('webhook_events', '');

-- name: not_yet
-- The others of that object are to be read again in $4 seconds, or later the longer they wait: up to $5.
UPDATE webhook_events
SET read_try_at = clock_timestamp()
                  + make_interval(secs => greatest($4, least(extract(epoch FROM now() - read_due_at)::float8 / 4, $5)))
WHERE event_id = ANY (ARRAY(
    SELECT event_id FROM webhook_events
    WHERE (object_id = $1 OR event_id = $1) AND account = $2 AND livemode = $3 AND read_due_at IS NOT NULL
      AND status = 'pending'
    FOR UPDATE SKIP LOCKED));

-- name: not_yet_alike
-- The key is refused for others like it as well: all that is due of this account ($1) and mode, and of this type of object,
-- where these are not null, is put off for $4 seconds, or longer the longer it waits, up to $5; a bounded number at a time.
UPDATE webhook_events
SET read_try_at = now() + make_interval(
        secs => CASE WHEN read_due_at IS NOT NULL
                     THEN greatest($4, least(extract(epoch FROM now() - read_due_at)::float8 / 4, $5)) END)
WHERE event_id = ANY (ARRAY(SELECT event_id FROM webhook_events
                            WHERE read_try_at <= now() AND livemode = $2 AND status = 'pending'
                              AND ($1::text IS NULL OR account = $1)
                              AND ($3::text IS NULL OR object_type = $3)
                            ORDER BY read_try_at LIMIT 10000
                            FOR UPDATE SKIP LOCKED));

-- name: refuse
-- Stripe will never give what these events are about: they are dead, each with the reason.
WITH refused AS (
    UPDATE webhook_events
    SET status = 'failed', failed_at = clock_timestamp(), next_try_at = NULL, read_due_at = NULL, read_try_at = NULL,
        attempts = greatest(attempts, 1)
    WHERE event_id = ANY (ARRAY(
        SELECT event_id FROM webhook_events
        WHERE (object_id = $1 OR event_id = $1) AND account = $2 AND livemode = $3 AND read_due_at IS NOT NULL
          AND status = 'pending'
        FOR UPDATE SKIP LOCKED))
    RETURNING event_id, event_type, attempts
)
INSERT INTO webhook_failures (event_id, event_type, retry_count, error_type, error_message, fingerprint)
SELECT event_id, event_type, attempts, $4, $5, $6 FROM refused
RETURNING event_id;

-- name: next_in
-- Seconds until something is to be read; null when nothing waits.
SELECT extract(epoch FROM min(read_try_at) - now())::float8 FROM webhook_events
WHERE read_try_at IS NOT NULL
  AND (livemode = ANY ($1::boolean[]) OR (account, livemode) IN (SELECT * FROM unnest($2::text[], $3::boolean[])));

-- name: take_undecided
-- Takes the turn of looking for undecided rows, for $1 seconds; the caller that gets no row leaves it to another.
UPDATE webhook_api_budget SET undecided_try_at = now() + make_interval(secs => $1)
WHERE undecided_try_at <= now() RETURNING true;

-- name: undecided
-- Rows that nothing in their events decides, a few at a time. Drawn, so that those that Stripe does not give are not in the
-- way of the others. Not those that Stripe was asked about since, unless what it said was never applied: the thin event that
-- it was asked for had no use for it any more, since its twin was handled meanwhile (`is_known`).
WITH rows AS (
    (SELECT 'customer' AS object_type, id, account, livemode, last_webhook_event_id, last_event_rank
     FROM billing.customers WHERE order_evidence = 'undecided')
    UNION ALL
    (SELECT 'subscription', id, account, livemode, last_webhook_event_id, last_event_rank
     FROM billing.subscriptions WHERE order_evidence = 'undecided')
    UNION ALL
    (SELECT 'invoice', id, account, livemode, last_webhook_event_id, last_event_rank
     FROM billing.invoices WHERE order_evidence = 'undecided')
    UNION ALL
    (SELECT 'payment_method', id, account, livemode, last_webhook_event_id, last_event_rank
     FROM billing.payment_methods WHERE order_evidence = 'undecided')
)
SELECT object_type, id, account, livemode, last_webhook_event_id, last_event_rank, r.rank IS NOT NULL AS is_known
FROM rows LEFT JOIN LATERAL (
    SELECT CASE WHEN length(r.body) > 0 THEN r.rank ELSE 0 END AS rank FROM webhook_reads AS r
    WHERE r.object_id = rows.id AND r.account = rows.account AND r.livemode = rows.livemode
      AND extract(epoch FROM r.asked_to) > billing.second_of(rows.last_event_rank)
    ORDER BY 1 DESC LIMIT 1
) AS r ON true
WHERE (livemode = ANY ($2::boolean[]) OR (account, livemode) IN (SELECT * FROM unnest($3::text[], $4::boolean[])))
  AND (r.rank IS NULL OR r.rank > last_event_rank)
ORDER BY random() LIMIT $1;
