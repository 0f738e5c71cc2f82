-- Comparing with Stripe's own lists: one row for each account and mode that is compared.

-- name: due
-- Of these accounts and modes ($1, $2), those whose turn it is: not compared within $3 seconds and in nobody's hands,
-- or broken off in the middle; those that Stripe refused, after a day. The longest not compared come first.
SELECT t.account, t.livemode FROM unnest($1::text[], $2::boolean[]) AS t (account, livemode)
LEFT JOIN webhook_reconciliation AS r ON r.account = t.account AND r.livemode = t.livemode
WHERE r.account IS NULL
   OR (r.started_at IS NULL OR r.started_at <= now() - make_interval(secs => $3::float8) OR r.after_event IS NOT NULL)
      AND coalesce(r.heard_at, '-infinity') <= now() - make_interval(secs => least($3::float8, 120))
      AND ($3::float8 = 0 OR r.refused_at IS NULL OR r.refused_at <= now() - interval '1 day')
ORDER BY r.compared_to NULLS FIRST, t.account, t.livemode;

-- name: begin
-- Takes the turn of one account and mode by a new number, if it is due as above; the caller that gets no row leaves it
-- to another. Whoever had it before writes nothing more.
INSERT INTO webhook_reconciliation AS r (account, livemode, run, started_at, heard_at) VALUES ($1, $2, 1, now(), now())
ON CONFLICT (account, livemode) DO UPDATE SET run = r.run + 1, started_at = now(), heard_at = now()
WHERE (r.started_at IS NULL OR r.started_at <= now() - make_interval(secs => $3::float8) OR r.after_event IS NOT NULL)
  AND coalesce(r.heard_at, '-infinity') <= now() - make_interval(secs => least($3::float8, 120))
RETURNING run, extract(epoch FROM compared_to)::bigint AS compared_to, extract(epoch FROM window_from)::bigint AS window_from,
          extract(epoch FROM window_to)::bigint AS window_to, after_event;

-- name: known
-- Which of these ids are here, or were; or are a twin endpoint's, which must not come in by this door.
SELECT event_id FROM webhook_events WHERE event_id = ANY ($1::text[])
UNION ALL
SELECT event_id FROM webhook_tombstones WHERE event_id = ANY ($1::text[])
UNION ALL
SELECT event_id FROM webhook_shadow_events WHERE event_id = ANY ($1::text[]);

-- name: told
-- Which of these snapshots a thin event has told.
SELECT snapshot_event FROM webhook_events WHERE snapshot_event = ANY ($1::text[]);

-- name: advance
-- A page is compared: the window, the last event of the page, and how many were missing. No row: the turn is another's.
UPDATE webhook_reconciliation
SET heard_at = now(), window_from = to_timestamp($4), window_to = to_timestamp($5), after_event = $6, found = found + $7
WHERE account = $1 AND livemode = $2 AND run = $3
RETURNING run;

-- name: finish
-- The last page of a window is compared. The cursor moves only if the window began where everything before it had been
-- compared ($5 is null otherwise). $6: a second window follows, and what both found is told together. No row: the turn
-- is another's.
UPDATE webhook_reconciliation
SET heard_at = now(), compared_to = greatest(compared_to, to_timestamp($5)),
    finished_at = CASE WHEN $6::boolean THEN finished_at ELSE now() END,
    missed = CASE WHEN $6::boolean THEN missed ELSE found + $4 END,
    found = CASE WHEN $6::boolean THEN found + $4 ELSE 0 END,
    window_from = NULL, window_to = NULL, after_event = NULL, refused_at = NULL
WHERE account = $1 AND livemode = $2 AND run = $3
RETURNING extract(epoch FROM compared_to)::bigint;

-- name: restart
-- Forgets where a comparison was that broke off: Stripe does not have the event any more that it stood at.
UPDATE webhook_reconciliation SET window_from = NULL, window_to = NULL, after_event = NULL
WHERE account = $1 AND livemode = $2 AND run = $3;

-- name: refused
UPDATE webhook_reconciliation SET refused_at = now() WHERE account = $1 AND livemode = $2 AND run = $3;

-- name: seen
-- Connected accounts, with the modes of their latest events: those of which something came within the 30 days that Stripe
-- keeps. The index of accounts is skipped through, one step for each.
WITH RECURSIVE accounts AS (
    (SELECT account FROM webhook_events WHERE account <> '' ORDER BY account LIMIT 1)
    UNION ALL
    SELECT (SELECT e.account FROM webhook_events AS e WHERE e.account <> '' AND e.account > a.account
            ORDER BY e.account LIMIT 1)
    FROM accounts AS a WHERE a.account IS NOT NULL
)
SELECT DISTINCT a.account, latest.livemode FROM accounts AS a CROSS JOIN LATERAL (
    SELECT e.livemode FROM webhook_events AS e
    WHERE e.account = a.account AND e.account <> '' AND e.created_at > now() - interval '30 days'
    ORDER BY e.created_at DESC LIMIT 20
) AS latest;
