-- What a person should hear, and what they have heard.

-- name: alone
-- One process of many looks and tells; the lock goes with the transaction.
SELECT pg_try_advisory_xact_lock(118038671810931);

-- name: dead
-- Dead events by cause: the last failure of each, grouped by fingerprint. Bounded: beyond ten thousand the count
-- says "many" as well as any other number.
WITH dead AS (
    SELECT event_id, e.event_type, e.failed_at
    FROM (SELECT event_id FROM webhook_unfinished WHERE next_try_at IS NULL ORDER BY created_at DESC, seq DESC LIMIT 10000) AS u
    JOIN webhook_events AS e USING (event_id)
)
SELECT f.fingerprint, f.error_type, count(*) AS count, min(d.failed_at) AS first, max(d.failed_at) AS last,
       (array_agg(d.event_id ORDER BY d.failed_at DESC))[1] AS example,
       (array_agg(DISTINCT d.event_type))[1:3] AS types
FROM dead AS d
CROSS JOIN LATERAL (
    SELECT fingerprint, error_type FROM webhook_failures WHERE event_id = d.event_id ORDER BY id DESC LIMIT 1
) AS f
GROUP BY f.fingerprint, f.error_type;

-- name: failure_rates
-- Types of which many fail: received in the last quarter of an hour, and finished or failed by now.
SELECT event_type, processed, failed FROM webhook_counts_since(now() - interval '15 minutes')
WHERE failed >= 5 AND failed > 0.2 * (processed + failed);

-- name: overdue
-- How long the oldest due event has waited, in seconds, which it is, and how many are due (10000: as many, or more).
SELECT event_id, extract(epoch FROM now() - next_try_at)::float8 AS seconds,
       (SELECT count(*) FROM (SELECT FROM webhook_unfinished WHERE next_try_at <= now() LIMIT 10000) AS due) AS due
FROM webhook_unfinished
WHERE next_try_at IS NOT NULL ORDER BY next_try_at, seq LIMIT 1;

-- name: reads_overdue
-- How many events wait until their object is read (100,000 at most), which of them longest and how long, and what is known
-- of why.
SELECT oldest.event_id, extract(epoch FROM now() - oldest.read_due_at)::float8 AS seconds,
       webhook_circuit_opened_at() AS opened_at,
       CASE WHEN b.refused_last_at > now() - interval '1 hour' THEN b.refused_what END AS refused_what,
       (SELECT count(*) FROM (SELECT FROM webhook_events WHERE read_due_at <= now() LIMIT 100000) AS waiting) AS count
FROM (SELECT event_id, read_due_at FROM webhook_events WHERE read_due_at IS NOT NULL ORDER BY read_due_at LIMIT 1) AS oldest
LEFT JOIN webhook_api_budget AS b ON true;

-- name: stripe_refuses
-- What Stripe refuses the key for; nothing once nobody asks for that any more.
SELECT refused_what, refused_at FROM webhook_api_budget
WHERE refused_at IS NOT NULL AND refused_last_at > now() - interval '1 hour';

-- name: never_came
-- What the comparisons with Stripe's lists found missing, the last of each account and one that is going on; told until
-- they find nothing. An account that is not compared any more says nothing after a day.
SELECT sum(greatest(missed, found))::bigint AS missed, max(heard_at) AS at, count(*) AS accounts,
       array_remove((array_agg(account ORDER BY greatest(missed, found) DESC, account))[1:5], '') AS connected
FROM webhook_reconciliation WHERE (missed > 0 OR found > 0) AND heard_at > now() - interval '1 day'
HAVING count(*) > 0;

-- name: silence
-- Hours since the last event, and the longest time without one in the week before; null where there was no traffic
-- to speak of (fewer than a day's worth of hours with events).
WITH hours AS (
    SELECT hour, lag(hour) OVER (ORDER BY hour) AS before FROM (
        SELECT DISTINCT hour FROM webhook_counts_by_hour WHERE hour > now() - interval '7 days' AND received > 0
    ) AS active
), fresh AS (
    SELECT max(minute) AS minute FROM webhook_count_changes WHERE received > 0
)
SELECT (extract(epoch FROM now() - greatest(max(hour) + interval '1 hour', (SELECT minute FROM fresh))) / 3600)::float8
           AS quiet_hours,
       (extract(epoch FROM max(hour - before)) / 3600)::float8 AS longest_gap_hours
FROM hours HAVING count(*) >= 24;

-- name: open
-- An incident is (still) so. The text follows the latest count; people are told when it opens, not at each change.
INSERT INTO webhook_incidents AS i (key, title, body, page) VALUES ($1, $2, $3, $4)
ON CONFLICT (key) DO UPDATE SET
    title = excluded.title, body = excluded.body, page = excluded.page, seen_at = now(), closed_at = NULL;

-- name: close
-- Incidents of these families that were not seen any more are over; those nobody was told of just go.
UPDATE webhook_incidents SET closed_at = now()
WHERE closed_at IS NULL AND key <> ALL ($1::text[]) AND split_part(key, ':', 1) = ANY ($2::text[]);

-- name: close_bursts
-- Bursts are seen by the process they hit, and are over when none has seen one for a while.
UPDATE webhook_incidents SET closed_at = now()
WHERE closed_at IS NULL AND key = 'bad_signatures' AND seen_at < now() - make_interval(secs => $1);

-- name: forget_untold
DELETE FROM webhook_incidents WHERE closed_at IS NOT NULL AND told_at IS NULL;

-- name: to_tell
SELECT key, title, body, page, opened_at, closed_at, misses FROM webhook_incidents
WHERE (told_at IS NULL OR closed_at IS NOT NULL) AND next_try_at <= now()
ORDER BY opened_at LIMIT 20
FOR UPDATE SKIP LOCKED;

-- name: told
UPDATE webhook_incidents SET told_at = now(), misses = 0 WHERE key = $1;

-- name: told_over
DELETE FROM webhook_incidents WHERE key = $1;

-- name: missed
-- Telling failed: again after one, two, four… minutes, an hour at most.
UPDATE webhook_incidents
SET misses = misses + 1, next_try_at = now() + least(interval '1 minute' * 2 ^ misses, interval '1 hour')
WHERE key = $1;
