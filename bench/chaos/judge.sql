-- The verdict. Each query finds one kind of fault and returns a line for each: (what, why).
-- The word before the first underscore of its name is the count of the last line that it belongs to.

-- name: lost_events
-- Acknowledged, and not stored: the one promise of a 2xx. What was cleaned up was old, and left its id behind.
SELECT s.event_id AS what, 'answered 2xx ' || s.answered || ' times, and not stored' AS why
FROM chaos.sent AS s
WHERE s.answered > 0 AND NOT EXISTS (SELECT FROM chaos.events AS e WHERE e.event_id = s.event_id);

-- name: lost_unfinished
-- Removed before it was processed: a cleanup may not touch it.
SELECT event_id AS what, 'removed, and it was ' || was AS why
FROM chaos.lasting WHERE became = 'removed' AND was <> 'processed';

-- name: lost_bodies
-- Stored, but not as it was sent, byte for byte.
SELECT s.event_id AS what, 'its body is ' || coalesce('another one', 'gone') AS why
FROM chaos.sent AS s
JOIN webhook_events AS e USING (event_id)
LEFT JOIN webhook_payloads AS p ON p.seq = e.seq AND p.created_at = e.created_at
WHERE md5(p.body) IS DISTINCT FROM s.body;

-- name: lost_effects
-- Said to be handled, and nothing came of it: neither of it nor of its twin. Or it was run again by hand after that, and
-- nothing came of that. (Of twins one leaves its work to the other then, too.)
SELECT event_id AS what, 'processed, and of ' || due || ' effects only ' || effects AS why
FROM (
    SELECT s.event_id, CASE WHEN s.twin THEN 1 ELSE 1 + coalesce(a.finished, 0) END AS due,
           (SELECT count(*) FROM chaos.sent AS t JOIN chaos.ledger AS l ON l.event_id = t.event_id
            WHERE t.occurrence = s.occurrence) AS effects
    FROM chaos.sent AS s JOIN chaos.events AS e USING (event_id) LEFT JOIN chaos.again AS a USING (event_id)
    WHERE s.handled AND e.status = 'processed'
) AS expected
WHERE effects < due;

-- name: lost_reads
-- A try that was used up because Stripe did not give what the event is about: reads wait, events do not fail.
SELECT f.event_id AS what, f.error_type || ': ' || f.error_message AS why
FROM webhook_failures AS f JOIN chaos.sent AS s USING (event_id)
WHERE s.thin AND (f.error_type LIKE 'Stripe%' OR f.error_type = 'PayloadGone');

-- name: lost_neighbours
-- Given up, though nothing is wrong with it: punished for what happened around it.
SELECT s.event_id AS what, 'dead after ' || e.attempts || ' tries, the last one: ' || coalesce(
           (SELECT f.error_type || ': ' || f.error_message FROM webhook_failures AS f
            WHERE f.event_id = s.event_id ORDER BY f.id DESC LIMIT 1), 'none') AS why
FROM chaos.sent AS s JOIN webhook_events AS e USING (event_id)
WHERE s.tries IS NULL AND e.status = 'failed' AND e.next_try_at IS NULL;

-- name: lost_rows
-- Stripe has an object of which the billing tables know nothing.
SELECT object_id AS what, 'not in ' || place AS why FROM (
    SELECT 'customers' AS place, t.id AS object_id FROM chaos.customers AS t
    WHERE NOT EXISTS (SELECT FROM billing.customers AS b WHERE (b.id, b.account, b.livemode) = (t.id, t.account, t.livemode))
    UNION ALL
    SELECT 'subscriptions', t.id FROM chaos.subscriptions AS t
    WHERE NOT EXISTS (SELECT FROM billing.subscriptions AS b WHERE (b.id, b.account, b.livemode) = (t.id, t.account, t.livemode))
    UNION ALL
    SELECT 'invoices', t.id FROM chaos.invoices AS t
    WHERE NOT EXISTS (SELECT FROM billing.invoices AS b WHERE (b.id, b.account, b.livemode) = (t.id, t.account, t.livemode))
    UNION ALL
    SELECT 'payment_methods', t.id FROM chaos.payment_methods AS t
    WHERE NOT EXISTS (SELECT FROM billing.payment_methods AS b WHERE (b.id, b.account, b.livemode) = (t.id, t.account, t.livemode))
) AS missing;

-- name: lost_counts
-- The statistics say less than the ledger of events.
SELECT event_type AS what, 'statistics: ' || c::text || ', events: ' || e::text AS why FROM (
    SELECT event_type, ARRAY[coalesce(s.total_events, 0), coalesce(s.processed, 0), coalesce(s.failed, 0)] AS c,
           ARRAY[e.total, e.processed, e.failed] AS e
    FROM (SELECT event_type, count(*) AS total, count(*) FILTER (WHERE status = 'processed') AS processed,
                 count(*) FILTER (WHERE status = 'failed') AS failed FROM webhook_events GROUP BY event_type) AS e
    LEFT JOIN webhook_statistics AS s USING (event_type)
) AS counts
WHERE c[1] < e[1] OR c[2] < e[2] OR c[3] < e[3];

-- name: doubled_effects
-- More than one line in the ledger, and more than one for each time that it was run again by hand; or a line for an event
-- that is not processed.
SELECT l.event_id AS what, count(*) || ' effects, put back ' || coalesce(min(a.finished), 0) || ' times, and it is '
       || coalesce(min(e.status), 'not stored') AS why
FROM chaos.ledger AS l LEFT JOIN chaos.events AS e USING (event_id) LEFT JOIN chaos.again AS a USING (event_id)
GROUP BY l.event_id
HAVING count(*) > 1 + coalesce(min(a.finished), 0) OR min(e.status) IS DISTINCT FROM 'processed';

-- name: doubled_occurrences
-- Told by two events, a snapshot and its thin twin, and handled for each of them, though nobody ran them again.
SELECT occurrence AS what, effects || ' effects of one occurrence: of ' || whose || '; put back ' || finished || ' times' AS why
FROM (
    SELECT s.occurrence, count(*) AS effects, count(DISTINCT l.event_id) AS events, string_agg(l.event_id, ', ') AS whose
    FROM chaos.ledger AS l JOIN chaos.sent AS s USING (event_id) GROUP BY s.occurrence
) AS told
CROSS JOIN LATERAL (
    SELECT coalesce(sum(a.finished), 0) AS finished FROM chaos.sent AS t JOIN chaos.again AS a USING (event_id)
    WHERE t.occurrence = told.occurrence
) AS again
WHERE events > 1 AND effects > 1 + finished;

-- name: doubled_balances
-- The balances do not add up to the ledger.
SELECT coalesce(a.owner, l.owner) AS what,
       'a balance of ' || coalesce(a.credits, 0) || ', lines: ' || coalesce(l.lines, 0) AS why
FROM chaos.accounts AS a
FULL JOIN (SELECT owner, count(*) AS lines FROM chaos.ledger GROUP BY owner) AS l USING (owner)
WHERE a.credits IS DISTINCT FROM l.lines;

-- name: doubled_outcomes
-- Became processed more than once, and more than once for each time that it was put back by hand.
SELECT h.event_id AS what, 'became processed ' || count(*) || ' times, put back ' || coalesce(min(a.finished), 0) AS why
FROM chaos.lasting AS h LEFT JOIN chaos.again AS a USING (event_id)
WHERE h.became = 'processed' GROUP BY h.event_id HAVING count(*) > 1 + coalesce(min(a.finished), 0);

-- name: doubled_runs
-- Processed, and put back in line by somebody else than an operator with `kamiyo replay`.
SELECT event_id AS what, 'was processed, and put back in line by ' || application AS why
FROM chaos.history WHERE was = 'processed' AND became = 'pending' AND application <> 'kamiyo cli';

-- name: doubled_copies
-- Cleaned up, and stored again: a late copy was taken for a new event.
SELECT e.event_id AS what, 'cleaned up, and stored again as ' || e.status AS why
FROM webhook_events AS e JOIN webhook_tombstones AS t USING (event_id);

-- name: doubled_events
-- Stored, and never sent.
SELECT e.event_id AS what, 'nobody sent it' AS why FROM webhook_events AS e
WHERE NOT EXISTS (SELECT FROM chaos.sent AS s WHERE s.event_id = e.event_id);

-- name: doubled_counts
-- The statistics say more than the ledger of events.
SELECT event_type AS what, 'statistics: ' || c::text || ', events: ' || e::text AS why FROM (
    SELECT event_type, ARRAY[s.total_events, s.processed, s.failed]::bigint[] AS c,
           ARRAY[coalesce(e.total, 0), coalesce(e.processed, 0), coalesce(e.failed, 0)] AS e
    FROM webhook_statistics AS s
    LEFT JOIN (SELECT event_type, count(*) AS total, count(*) FILTER (WHERE status = 'processed') AS processed,
                      count(*) FILTER (WHERE status = 'failed') AS failed FROM webhook_events GROUP BY event_type) AS e
    USING (event_type)
) AS counts
WHERE c[1] > e[1] OR c[2] > e[2] OR c[3] > e[3];

-- name: backwards_rows
-- A billing row that does not say what Stripe says, or that Stripe knows nothing of.
SELECT object_id AS what, place || ': ' || coalesce(
           (SELECT string_agg(format('%s is %s, Stripe says %s', key, left((ours -> key)::text, 40), left(value::text, 40)), '; ')
            FROM jsonb_each(stripes) WHERE value IS DISTINCT FROM ours -> key), 'Stripe has no such object') AS why
FROM (
    SELECT 'customers' AS place, b.id AS object_id, to_jsonb(b) AS ours, to_jsonb(t) AS stripes
    FROM billing.customers AS b LEFT JOIN chaos.customers AS t USING (id, account, livemode)
    UNION ALL
    SELECT 'subscriptions', b.id, to_jsonb(b), to_jsonb(t)
    FROM billing.subscriptions AS b LEFT JOIN chaos.subscriptions AS t USING (id, account, livemode)
    UNION ALL
    SELECT 'invoices', b.id, to_jsonb(b), to_jsonb(t)
    FROM billing.invoices AS b LEFT JOIN chaos.invoices AS t USING (id, account, livemode)
    UNION ALL
    SELECT 'payment_methods', b.id, to_jsonb(b), to_jsonb(t)
    FROM billing.payment_methods AS b LEFT JOIN chaos.payment_methods AS t USING (id, account, livemode)
) AS compared
WHERE stripes IS NULL OR EXISTS (
    SELECT FROM jsonb_each(stripes) WHERE value IS DISTINCT FROM ours -> key
    AND (key = 'deleted_at' OR NOT EXISTS (SELECT FROM chaos.unseen AS u WHERE u.object_id = compared.object_id
                                           AND u.account = ours ->> 'account'))
);

-- name: backwards_meanwhile
-- A billing row that was overwritten by an older event, or that a rebuild made older than it was, or not at all; even if it
-- was right again in the end.
SELECT object_id AS what, place || ': from ' || from_event || ' back to ' || to_event AS why FROM chaos.regressions;

-- name: backwards_order
-- Of the events of one owner that were claimed together, a later one took effect before an earlier one.
SELECT event_id AS what, 'claim ' || claim || ': after ' || before || ', which happened later' AS why
FROM (
    SELECT l.event_id, l.claim, lag(l.event_id) OVER claimed AS before,
           (e.stripe_created, e.seq) < (lag(e.stripe_created) OVER claimed, lag(e.seq) OVER claimed) AS inverted
    FROM chaos.ledger AS l JOIN webhook_events AS e USING (event_id)
    WINDOW claimed AS (PARTITION BY l.owner, l.claim ORDER BY l.id)
) AS ordered
WHERE inverted;

-- name: backwards_unsaid
-- A newer event of the object had been handled already, and the handler of this one was not told. (A thin event shows
-- the object as it is now, so it is never behind.)
SELECT event_id AS what, 'handled after a newer one of ' || object_id || ', and not told that it is superseded' AS why
FROM (
    SELECT l.event_id, l.superseded, e.object_id, e.stripe_created,
           max(e.stripe_created) OVER (PARTITION BY e.account, e.object_type, e.object_id ORDER BY l.id) AS newest, e.thin
    FROM chaos.ledger AS l JOIN webhook_events AS e USING (event_id)
    WHERE e.object_type IN ('customer', 'subscription', 'invoice', 'payment_method')
      -- What ends an object is the newest of it whatever the clock says.
      AND regexp_replace(e.event_type, '^v1\.', '') NOT IN ('customer.deleted', 'customer.subscription.deleted', 'invoice.paid', 'payment_method.detached')
) AS handled
WHERE stripe_created < newest AND NOT superseded AND NOT thin;

-- name: overlapped_marks
-- When this run began, another one of the same owner had not ended, and its transaction was open.
SELECT r.event_id AS what, 'of ' || r.owner || ': ran beside ' ||
       (SELECT string_agg(o.event_id, ', ') FROM chaos.runs AS o WHERE o.id = ANY (r.beside)) AS why
FROM chaos.runs AS r WHERE r.beside IS NOT NULL;

-- name: overlapped_effects
-- Two runs of one owner took effect, and one began before the other had ended.
SELECT event_id AS what, 'of ' || owner || ': began ' || (busy_until - started_at) || ' before the one before it ended' AS why
FROM (
    SELECT r.event_id, r.owner, r.started_at,
           max(r.ended_at) OVER (PARTITION BY r.owner ORDER BY r.started_at, r.id
                                 ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS busy_until
    FROM chaos.runs AS r JOIN chaos.ledger AS l ON l.run = r.id
) AS intervals
WHERE started_at < busy_until;

-- name: overlapped_nothing
-- An effect whose run has no marks would escape the two questions above.
SELECT l.event_id AS what, 'took effect without both marks' AS why
FROM chaos.ledger AS l LEFT JOIN chaos.runs AS r ON r.id = l.run
WHERE r.ended_at IS NULL;

-- name: overlapped_reads
-- More requests to Stripe's API than all processes together may make: over whatever length of time, what the rate gives
-- in it, and what it gives in one second at once. Of each second, the worst moment.
SELECT to_timestamp(floor(at))::text AS what,
       round(max(level)::numeric, 1) || ' requests ahead of the rate, and ' || allowed || ' are allowed' AS why
FROM (
    SELECT at, rate + spare AS allowed, n - rate * at - min(n - 1 - rate * at) OVER (ORDER BY n) AS level
    FROM (SELECT at, row_number() OVER (ORDER BY at) AS n FROM chaos.calls) AS numbered, chaos.budget
) AS levels
WHERE level > allowed
GROUP BY floor(at), allowed;

-- name: stuck_reads
-- Everything is at rest, and this one still waits to be read.
SELECT e.event_id AS what, 'waits to be read since ' || e.read_due_at AS why
FROM webhook_events AS e WHERE e.read_due_at IS NOT NULL;

-- name: stuck_ties
-- Nothing in the events decides what this row must say, and Stripe, which could, was not asked.
SELECT id AS what, 'undecided in ' || place AS why FROM chaos.undecided;

-- name: stuck_events
-- Everything is at rest, and this one has neither outcome nor end.
SELECT e.event_id AS what, e.status || ', ' || e.attempts || ' tries' || CASE WHEN e.suspect THEN ', suspect' ELSE '' END AS why
FROM webhook_events AS e
WHERE e.status IN ('pending', 'processing') OR e.next_try_at IS NOT NULL;

-- name: stuck_unanswered
-- Sent again and again, and never answered 2xx.
SELECT event_id AS what, 'never answered 2xx, last of all ' || last_status AS why FROM chaos.sent WHERE answered = 0;

-- name: stuck_poison
-- Poison that is not dead, or not after the tries it gets, each written down once; and as many anew each time that somebody
-- put it back. What gives up is dead with the first try that comes to its end: tries before it may have ended with their
-- worker, in the storm.
SELECT s.event_id AS what, s.fate || ': ' || e.status || ' after ' || e.attempts || ' tries, put back '
       || coalesce(a.times, 0) || ' times, recorded: ' || f.recorded::text || ' ' || f.errors::text AS why
FROM chaos.sent AS s
JOIN webhook_events AS e USING (event_id)
LEFT JOIN chaos.again AS a USING (event_id)
CROSS JOIN LATERAL (
    SELECT coalesce(array_agg(retry_count::int ORDER BY id), '{}') AS recorded,
           coalesce(array_agg(retry_count::int ORDER BY id) FILTER (WHERE round = rounds), '{}') AS tries,
           coalesce(array_agg(error_type ORDER BY id) FILTER (WHERE round = rounds), '{}') AS errors,
           coalesce(max(round), 0) AS rounds, coalesce(bool_and(retry_count = place), true) AS in_order
    FROM (
        SELECT *, max(round) OVER () AS rounds, row_number() OVER (PARTITION BY round ORDER BY id) AS place
        FROM (SELECT *, count(*) FILTER (WHERE retry_count = 1) OVER (ORDER BY id) AS round
              FROM webhook_failures WHERE event_id = s.event_id) AS numbered
    ) AS counted
) AS f
WHERE s.tries IS NOT NULL
  AND NOT (e.status = 'failed' AND e.next_try_at IS NULL
           AND f.in_order AND f.rounds = 1 + coalesce(a.times, 0)
           AND f.tries = (SELECT array_agg(n) FROM generate_series(1, e.attempts) AS n)
           AND CASE WHEN s.fate = 'gives_up' THEN array_position(f.errors, 'Bury') = e.attempts
                    ELSE e.attempts = s.tries END);

-- name: stuck_commands
-- What an operator ran ended in a traceback, or in no sentence; or did not end.
SELECT words AS what, wrong AS why FROM chaos.commands WHERE wrong IS NOT NULL;
