-- The inbox: the durable table of events, and everything that changes it.
--
--   pending ──claim──▶ processing ──succeed──▶ processed
--                       │   ▲
--                      fail  └──claim── failed, with a next try        after five tries, or buried: failed, dead
--
-- Lanes are locked with session-level advisory locks of class 1800432 ('kmy' read as a number), one for each lane:
-- a lock dies with its session, so what a dead worker held is free at once.

-- name: put
-- Stores new events with their bodies, for the workers; one statement, one commit. Returns what is already known.
WITH incoming AS (
    SELECT a.*, a.unnest AS body FROM ROWS FROM (unnest($1::webhook_arrival[]), unnest($2::bytea[])) AS a
), stored AS (
    INSERT INTO webhook_events (
        event_id, event_type, stripe_created, livemode, thin, account, context, api_version,
        object_type, object_id, customer, snapshot_event, lane, next_try_at, source
    )
    SELECT event_id, event_type, to_timestamp(stripe_created), livemode, thin, account, context, api_version,
           object_type, object_id, customer, snapshot_event, lane, now(), $3
    FROM incoming
    WHERE NOT EXISTS (SELECT FROM webhook_tombstones AS t WHERE t.event_id = incoming.event_id)
    -- Two servers may store the same events at once; in one order they cannot wait for each other in a ring.
    ORDER BY event_id
    ON CONFLICT (event_id) DO NOTHING
    RETURNING event_id, seq, created_at
), bodies AS (
    INSERT INTO webhook_payloads (seq, created_at, body)
    SELECT seq, created_at, body FROM stored JOIN incoming USING (event_id)
)
SELECT i.event_id,
       -- Neither in the ledger as this statement sees it nor a tombstone: a neighbour stored it a moment ago.
       CASE WHEN e.event_id IS NOT NULL THEN e.status
            WHEN t.event_id IS NOT NULL THEN 'processed'
            ELSE 'pending' END AS status
FROM incoming AS i
LEFT JOIN stored AS s USING (event_id)
LEFT JOIN webhook_events AS e ON e.event_id = i.event_id
LEFT JOIN webhook_tombstones AS t ON t.event_id = i.event_id
WHERE s.event_id IS NULL;

-- name: receive
-- Stores new events, and processes those whose billing row is all they need: see 024_late_copies.sql.
SELECT known_event_id, known_status, is_new FROM webhook_receive(
    $1::webhook_arrival[], $2::bytea[], $3::integer[], $4::billing.customers_row[], $5::billing.subscriptions_row[],
    $6::billing.invoices_row[], $7::billing.payment_methods_row[], $8
);

-- name: claim
-- Lets go of the lanes of the last turn, and takes up to $1 due events: see 032_claim_passes_held_rows.sql. $2: types with a handler. An
-- event that a person made due at '-infinity' is none to reckon from.
SELECT claim, due_in, greatest(first_due, 'epoch') AS first_due, seq, created_at, event_id, event_type, stripe_created, livemode, thin, account, context,
       api_version, object_type, object_id, customer, snapshot_event, lane, attempts, suspect, abandoned, was_running,
       started, body
FROM webhook_claim($1, $2, coalesce($3, '-infinity'::timestamptz));

-- name: wake_own
-- From now on storing over this session sends no notice: see 026_unfinished.sql.
SELECT set_config('kamiyo.notices', 'off', false);

-- name: notify
-- Wakes the workers of every process.
SELECT pg_notify('webhook_events', '');

-- name: unlock
SELECT pg_advisory_unlock_all();

-- name: end_silent
-- Ends the sessions of this application, commands and all, that fell silent in the middle of a question, or of an answer, over $1 seconds
-- ago: their process was cut off or frozen there. PostgreSQL's own limits for silent sessions count between questions
-- only, so such a session would keep its lanes and its row locks for as long as TCP believes in it, for hours.
SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
  AND starts_with(application_name, current_setting('application_name'))
  AND state = 'active' AND wait_event_type = 'Client' AND state_change < clock_timestamp() - make_interval(secs => $1);

-- name: start
-- Counts a try before it is run, for an event that runs alone: should it take the process down, the try has counted.
UPDATE webhook_events SET attempts = $3, started_at = clock_timestamp()
WHERE event_id = $1 AND claim = $2 AND status = 'processing'
RETURNING attempts;

-- name: succeed
-- Settles processed events, in the transaction of their effects. Returns one row for each; fewer than asked for
-- means that the claim is lost, and the caller must roll back.
UPDATE webhook_events AS e
SET status = 'processed', outcome = d.outcome, processed_at = clock_timestamp(), next_try_at = NULL, started_at = NULL,
    read_due_at = NULL, read_try_at = NULL, suspect = false, attempts = d.attempts, processing_us = e.processing_us + d.processing_us
FROM unnest($2::text[], $3::text[], $4::smallint[], $5::bigint[]) AS d (event_id, outcome, attempts, processing_us)
WHERE e.event_id = d.event_id AND e.claim = $1 AND e.status = 'processing'
RETURNING e.event_id;

-- name: fail
-- Records a failed try with its error. With seconds to wait the event stays in line; without, it is dead.
WITH failed AS (
    UPDATE webhook_events
    SET status = 'failed', failed_at = clock_timestamp(), started_at = NULL, attempts = $3,
        read_due_at = NULL, read_try_at = NULL,
        next_try_at = clock_timestamp() + make_interval(secs => $4), processing_us = processing_us + $5
    WHERE event_id = $1 AND claim = $2 AND status = 'processing'
    RETURNING event_id, event_type, next_try_at
)
INSERT INTO webhook_failures
    (event_id, event_type, retry_count, next_try_at, error_type, error_message, traceback, fingerprint)
SELECT event_id, event_type, $3, next_try_at, $6, $7, $8, $9 FROM failed
RETURNING id;

-- name: release
-- Gives claimed events back untried, as they were. A try that had begun does not count: it was stopped, not failed.
UPDATE webhook_events
SET status = CASE WHEN attempts > (started_at IS NOT NULL)::int THEN 'failed' ELSE 'pending' END,
    failed_at = CASE WHEN attempts > (started_at IS NOT NULL)::int THEN clock_timestamp() END,
    attempts = attempts - (started_at IS NOT NULL)::int, claim = NULL, started_at = NULL,
    read_due_at = NULL, read_try_at = NULL,
    next_try_at = CASE WHEN $3 > 0 THEN now() + make_interval(secs => $3) ELSE next_try_at END
WHERE event_id = ANY ($1::text[]) AND claim = $2 AND status = 'processing';

-- name: move
-- Gives claimed events back untried, to be run at once in the lane of the customer whose they turned out to be.
UPDATE webhook_events AS e
SET status = 'pending', claim = NULL, started_at = NULL, attempts = attempts - (started_at IS NOT NULL)::int,
    customer = m.customer, lane = m.lane, read_due_at = NULL, read_try_at = NULL, next_try_at = now()
FROM unnest($2::text[], $3::text[], $4::integer[]) AS m (event_id, customer, lane)
WHERE e.event_id = m.event_id AND e.claim = $1 AND e.status = 'processing';

-- name: await_read
-- Puts claimed events aside until their object was read. Stripe's second of the event must be over before it is asked;
-- where its clock is far from ours, ours counts. Should nobody ever read it, a worker looks at it again in an hour.
UPDATE webhook_events
SET status = 'pending', claim = NULL, started_at = NULL, next_try_at = now() + interval '1 hour',
    attempts = attempts - (started_at IS NOT NULL)::int,
    read_due_at = coalesce(read_due_at, greatest(now(), webhook_second_over(stripe_created, created_at))),
    read_try_at = coalesce(read_try_at, greatest(now(), webhook_second_over(stripe_created, created_at)))
WHERE event_id = ANY ($1::text[]) AND claim = $2 AND status = 'processing';

-- name: twins
-- Of these occurrences (ids of snapshots), what is known of the snapshot and of its thin twins: status and outcome.
-- One that was cleaned up had been processed; what came of it nobody knows, so it counts as handled.
SELECT event_id AS occurrence, event_id, thin, status, outcome FROM webhook_events WHERE event_id = ANY ($1::text[])
UNION ALL
SELECT snapshot_event, event_id, thin, status, outcome FROM webhook_events WHERE snapshot_event = ANY ($1::text[])
UNION ALL
SELECT event_id, event_id, false, 'processed', 'handled' FROM webhook_tombstones WHERE event_id = ANY ($1::text[]);

-- name: try_occurrences
-- Those of these occurrences that nobody else runs handlers for, held until this transaction ends.
SELECT occurrence FROM unnest($1::text[]) AS occurrence
WHERE pg_try_advisory_xact_lock(1800433, hashtext(occurrence));

-- name: next_due
-- Seconds until something is due; null when nothing waits.
SELECT extract(epoch FROM min(next_try_at) - now())::float8 FROM webhook_unfinished WHERE next_try_at IS NOT NULL;

-- name: of_second
-- All events of one object within one of Stripe's seconds, processed or not: what a tie is decided by.
SELECT e.seq, e.created_at, e.event_id, e.event_type, extract(epoch FROM e.stripe_created)::bigint AS stripe_created,
       e.livemode, e.thin, e.account, e.context, e.api_version, e.object_type, e.object_id, e.customer,
       e.snapshot_event, p.body
FROM webhook_events AS e
JOIN webhook_payloads AS p ON p.seq = e.seq AND p.created_at = e.created_at
WHERE e.object_id = $1 AND e.account = $2 AND e.livemode = $3 AND e.stripe_created = to_timestamp($4) AND NOT e.thin
ORDER BY e.seq
LIMIT 1000;

-- name: of_object
-- The latest events of one object, by Stripe's time.
SELECT e.seq, e.created_at, e.event_id, e.event_type, extract(epoch FROM e.stripe_created)::bigint AS stripe_created,
       e.livemode, e.thin, e.account, e.context, e.api_version, e.object_type, e.object_id, e.customer,
       e.snapshot_event, p.body
FROM webhook_events AS e
JOIN webhook_payloads AS p ON p.seq = e.seq AND p.created_at = e.created_at
WHERE e.object_id = $1 AND e.account = $2 AND e.livemode = $3 AND NOT e.thin
ORDER BY e.stripe_created DESC, e.seq DESC
LIMIT 200;

-- name: after
-- The ledger in order of arrival, for rebuilding what is made from it.
SELECT e.seq, e.created_at, e.event_id, e.event_type, extract(epoch FROM e.stripe_created)::bigint AS stripe_created,
       e.livemode, e.thin, e.account, e.context, e.api_version, e.object_type, e.object_id, e.customer,
       e.snapshot_event, p.body
FROM webhook_events AS e
JOIN webhook_payloads AS p ON p.seq = e.seq AND p.created_at = e.created_at
WHERE (e.created_at, e.seq) > ($1, $2) AND NOT e.thin
ORDER BY e.created_at, e.seq
LIMIT $3;

-- name: retry
-- A person says: run it again. It gets its five tries anew. $2: what it must be, failed or processed.
WITH again AS (
    UPDATE webhook_events
    SET status = 'pending', outcome = NULL, processed_at = NULL, failed_at = NULL, next_try_at = now(), attempts = 0
    WHERE event_id = $1 AND status = ANY ($2::text[])
    RETURNING event_id
)
SELECT event_id, pg_notify('webhook_events', '') FROM again;

-- name: list
-- Newest first, below the position ($10, $11); every filter may be null. $1 is a status, or 'retrying' or 'dead', the two
-- kinds of failed, or 'unread', a kind of pending. What is not finished is listed by the same words of the view of that name,
-- webhook_unfinished_events, which has these columns of the ledger. The conditions that only repeat a filter name the partial index that
-- serves it; failed is asked for by failed_at alone, which says the same (a check holds it): asked for twice, the planner
-- would believe that half as many are left. A customer's events are looked up day by day, and put in order by day first, which is
-- the order of their index; where no customer is asked for, that is a constant. error_type is that of the last try, where it failed.
SELECT e.*, f.error_type FROM (
    SELECT seq, event_id, event_type, status, outcome, created_at, stripe_created, processed_at, failed_at, next_try_at,
           attempts, processing_us, object_type, object_id, customer, account, context, livemode, api_version, thin, source,
           read_due_at
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
      AND ($10::timestamptz IS NULL OR (created_at, seq) < ($10, $11::bigint))
    ORDER BY CASE WHEN $3 IS NOT NULL THEN webhook_day(created_at) END DESC, created_at DESC, seq DESC
    LIMIT $12
) AS e
LEFT JOIN LATERAL (SELECT error_type FROM webhook_failures
                   WHERE event_id = e.event_id AND e.failed_at IS NOT NULL ORDER BY id DESC LIMIT 1) AS f ON true
ORDER BY e.created_at DESC, e.seq DESC;

-- name: count_matching
-- How many events a replay would run again: processed ones, or failed ones, or of these the retrying or the dead alone.
SELECT count(*) FROM webhook_events
WHERE CASE WHEN $1::text IN ('failed', 'retrying', 'dead') THEN failed_at IS NOT NULL
           ELSE status = $1 AND $1 = 'processed' END
  AND ($1 <> 'retrying' OR next_try_at IS NOT NULL) AND ($1 <> 'dead' OR next_try_at IS NULL)
  AND ($2::text IS NULL OR event_type = $2)
  AND ($3::text IS NULL OR customer = $3 AND webhook_day(created_at) = ANY ((SELECT webhook_days())::date[]))
  AND ($4::text IS NULL OR object_id = $4)
  AND ($5::text IS NULL OR account = $5)
  AND ($6::text IS NULL OR context = $6 AND context <> '')
  AND ($7::boolean IS NULL OR livemode = $7)
  AND ($8::timestamptz IS NULL OR created_at >= $8)
  AND ($9::timestamptz IS NULL OR created_at < $9)
  AND ($10::text IS NULL OR EXISTS (SELECT FROM webhook_failures AS f
                                    WHERE f.event_id = webhook_events.event_id AND f.fingerprint = $10));

-- name: replay
-- Puts a bounded number of matching events back in line, oldest first, and says where it got to, so that the next
-- call goes on from there and none is taken twice. One that a worker is just claiming is being run again already: to wait
-- for it here could be a deadlock, since whoever settles takes rows in another order.
WITH picked AS (
    SELECT event_id, created_at, seq FROM webhook_events
    WHERE CASE WHEN $1::text IN ('failed', 'retrying', 'dead') THEN failed_at IS NOT NULL
               ELSE status = $1 AND $1 = 'processed' END
      AND ($1 <> 'retrying' OR next_try_at IS NOT NULL) AND ($1 <> 'dead' OR next_try_at IS NULL)
      AND ($2::text IS NULL OR event_type = $2)
      AND ($3::text IS NULL OR customer = $3 AND webhook_day(created_at) = ANY ((SELECT webhook_days())::date[]))
      AND ($4::text IS NULL OR object_id = $4)
      AND ($5::text IS NULL OR account = $5)
      AND ($6::text IS NULL OR context = $6 AND context <> '')
      AND ($7::boolean IS NULL OR livemode = $7)
      AND ($8::timestamptz IS NULL OR created_at >= $8)
      AND ($9::timestamptz IS NULL OR created_at < $9)
      AND ($10::text IS NULL OR EXISTS (SELECT FROM webhook_failures AS f
                                        WHERE f.event_id = webhook_events.event_id AND f.fingerprint = $10))
      AND (created_at, seq) > ($11, $12::bigint)
    ORDER BY CASE WHEN $3 IS NOT NULL THEN webhook_day(created_at) END, created_at, seq LIMIT $13
    FOR UPDATE SKIP LOCKED
), again AS (
    UPDATE webhook_events AS e
    SET status = 'pending', outcome = NULL, processed_at = NULL, failed_at = NULL, next_try_at = now(), attempts = 0
    FROM picked
    WHERE e.event_id = picked.event_id AND e.status = CASE WHEN $1 = 'processed' THEN 'processed' ELSE 'failed' END
    RETURNING e.created_at, e.seq
)
SELECT count(*) AS count, max(created_at) AS created_at,
       (SELECT seq FROM again ORDER BY created_at DESC, seq DESC LIMIT 1) AS seq, pg_notify('webhook_events', '')
FROM again;

-- name: audit
INSERT INTO webhook_audit (action, filters, count) VALUES ($1, $2::jsonb, $3) RETURNING id;

-- name: audit_part
-- Adds a part that was done.
UPDATE webhook_audit SET count = count + $2 WHERE id = $1;

-- name: event
SELECT e.*, extract(epoch FROM e.stripe_created)::bigint AS stripe_second,
       (SELECT p.body FROM webhook_payloads AS p WHERE p.seq = e.seq AND p.created_at = e.created_at) AS body
FROM webhook_events AS e WHERE e.event_id = $1;

-- name: status
SELECT status FROM webhook_events WHERE event_id = $1;

-- name: failures_of
SELECT id, created_at, retry_count, next_try_at, error_type, error_message, traceback, fingerprint
FROM webhook_failures WHERE event_id = $1 ORDER BY id;

-- name: failed
-- Failed events, newest first, each with its last error.
SELECT e.event_id, e.event_type, e.status, e.created_at, e.failed_at, e.next_try_at, e.attempts, e.object_id, e.customer,
       e.account, f.error_type, f.error_message, f.retry_count, f.fingerprint
FROM webhook_events AS e
LEFT JOIN LATERAL (
    SELECT error_type, error_message, retry_count, fingerprint FROM webhook_failures
    WHERE event_id = e.event_id ORDER BY id DESC LIMIT 1
) AS f ON true
WHERE e.failed_at IS NOT NULL
ORDER BY e.created_at DESC, e.seq DESC
LIMIT $1;

-- name: begin_prune
-- In the transaction of a prune: what is stored meanwhile is looked at once more for copies of what is removed (see
-- webhook_receive).
SELECT pg_advisory_xact_lock(118038671810933);

-- name: prune
-- Removes processed events from before a moment, with their bodies; a bounded number, to hold no lock for long.
-- Stripe sends an event again for up to 30 days: until then a tombstone remembers its id.
WITH old AS (
    SELECT event_id, seq, created_at, stripe_created FROM webhook_events
    WHERE created_at < $1 AND status = 'processed'
    ORDER BY created_at, seq LIMIT $2
    FOR UPDATE SKIP LOCKED
), bodies AS (
    DELETE FROM webhook_payloads AS p USING old WHERE p.seq = old.seq AND p.created_at = old.created_at
), buried AS (
    INSERT INTO webhook_tombstones (event_id, stripe_created)
    SELECT event_id, stripe_created FROM old WHERE stripe_created > now() - interval '35 days'
    ON CONFLICT DO NOTHING
), gone AS (
    DELETE FROM webhook_events AS e USING old WHERE e.event_id = old.event_id RETURNING 1
)
SELECT count(*) FROM gone;

-- name: count_prunable
-- What a prune would remove: how many events, how many of their bodies, and from when to when they were received.
SELECT count(*) AS events, count(p.seq) AS bodies, min(e.created_at) AS first, max(e.created_at) AS last
FROM webhook_events AS e
LEFT JOIN webhook_payloads AS p ON p.seq = e.seq AND p.created_at = e.created_at
WHERE e.created_at < $1 AND e.status = 'processed';

-- name: prune_tombstones
DELETE FROM webhook_tombstones WHERE stripe_created < now() - interval '35 days';

-- name: health
SELECT status, events_last_24h, failed_events_last_24h, oldest_due_seconds FROM webhook_health_check;

-- name: statistics
SELECT event_type, received, processed, failed, received - processed - failed AS pending, processing_us
FROM webhook_counts_since(now() - make_interval(days => $1)) ORDER BY received DESC, event_type;

-- name: queue
-- How the queue stands: events waiting or in work, seconds since the oldest was due; events that wait to be read from
-- Stripe, seconds since the oldest of those was due, and how asking goes; events that are dead.
SELECT (SELECT coalesce(sum(received - processed - failed), 0) FROM webhook_counts_since('-infinity'))::bigint AS backlog,
       coalesce(greatest((SELECT extract(epoch FROM now() - min(next_try_at)) FROM webhook_unfinished
                          WHERE next_try_at IS NOT NULL), 0), 0)::float8 AS oldest_due_seconds,
       (SELECT count(*) FROM (SELECT FROM webhook_events WHERE read_due_at IS NOT NULL LIMIT 100000) AS waiting)::bigint
           AS waiting_reads,
       coalesce(greatest((SELECT extract(epoch FROM now() - min(read_due_at)) FROM webhook_events
                          WHERE read_due_at IS NOT NULL), 0), 0)::float8 AS oldest_unread_seconds,
       (webhook_circuit_opened_at() IS NOT NULL)::int AS circuit_open,
       (SELECT count(*) FROM (SELECT FROM webhook_unfinished WHERE next_try_at IS NULL LIMIT 100000) AS dead)::bigint AS dead,
       coalesce((SELECT sum(greatest(missed, found)) FROM webhook_reconciliation
                 WHERE heard_at > now() - interval '1 day'), 0)::bigint AS missed;

-- name: fold
SELECT webhook_fold_counts();

-- name: days_ahead
-- For how many days after today bodies can be stored. Names tell, because a bound is only text to be parsed.
SELECT max(to_date(right(c.relname, 8), 'YYYYMMDD')) - (now() AT TIME ZONE 'UTC')::date
FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid WHERE i.inhparent = to_regclass('webhook_payloads');

-- name: ensure_partitions
SELECT webhook_ensure_partitions((now() AT TIME ZONE 'UTC')::date - 1, 9);
