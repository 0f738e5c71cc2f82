-- What a twin endpoint delivered, and how it compares with the real events: see 013_shadow.sql.

-- name: put
-- Stores what is new; returns the ids of those.
INSERT INTO webhook_shadow_events (
    event_id, event_type, stripe_created, livemode, account, context, api_version, object_type, object_id, customer,
    request_id, body
)
SELECT event_id, event_type, to_timestamp(stripe_created), livemode, account, context, api_version, object_type,
       object_id, customer, request_id, body
FROM unnest(
    $1::text[], $2::text[], $3::bigint[], $4::boolean[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[],
    $10::text[], $11::text[], $12::bytea[]
) AS e (event_id, event_type, stripe_created, livemode, account, context, api_version, object_type, object_id,
        customer, request_id, body)
-- Two servers may store the same events at once; in one order they cannot wait for each other in a ring.
ORDER BY event_id
ON CONFLICT (event_id) DO NOTHING
RETURNING event_id;

-- name: prune
-- Forgets a bounded number of those that are older than seven days; not those that another process is just forgetting.
DELETE FROM webhook_shadow_events WHERE event_id IN (
    SELECT event_id FROM webhook_shadow_events WHERE created_at < now() - make_interval(days => $1)
    ORDER BY created_at LIMIT $2
    FOR UPDATE SKIP LOCKED
);

-- name: span
-- Since when the twin endpoint has delivered, how far back the ledger reaches, and until when what is missing counts
-- as missing. One row.
SELECT (SELECT min(created_at) FROM webhook_shadow_events) AS shadow_since,
       (SELECT min(created_at) FROM webhook_events) AS ledger_since,
       now() - make_interval(secs => $1) AS until;

-- name: seconds
-- The twins of the next of Stripe's seconds, whole seconds, about as many as asked for.
WITH next AS (
    SELECT stripe_created FROM webhook_shadow_events WHERE stripe_created > $1
    ORDER BY stripe_created, event_id LIMIT $2
)
SELECT event_id, event_type, extract(epoch FROM stripe_created)::bigint AS stripe_created, livemode, account, context,
       api_version, object_type, object_id, customer, request_id, created_at, body
FROM webhook_shadow_events
WHERE stripe_created > $1 AND stripe_created <= (SELECT max(stripe_created) FROM next)
ORDER BY stripe_created, event_id;

-- name: candidates
-- The real events that may be the twins of these: of the same object, type and second, or of no object at all; in the
-- same account and mode.
-- The keys that are asked for must differ.
SELECT e.event_id, e.event_type, extract(epoch FROM e.stripe_created)::bigint AS stripe_created, e.livemode, e.account,
       e.context, e.api_version, e.object_type, e.object_id, e.customer, e.created_at,
       (SELECT p.body FROM webhook_payloads AS p WHERE p.seq = e.seq AND p.created_at = e.created_at) AS body
FROM (
    SELECT r.* FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::boolean[])
        AS t (object_id, second, event_type, account, livemode)
    JOIN webhook_events AS r
      ON r.object_id = t.object_id AND r.stripe_created = to_timestamp(t.second) AND r.event_type = t.event_type
     AND r.account = t.account AND r.livemode = t.livemode
    WHERE NOT r.thin
    UNION ALL
    SELECT r.* FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::boolean[])
        AS t (object_id, second, event_type, account, livemode)
    -- Without an object only the type leads to it, and since when to look: Stripe tries to deliver for three days.
    JOIN webhook_events AS r
      ON r.event_type = t.event_type AND r.stripe_created = to_timestamp(t.second)
     AND r.account = t.account AND r.livemode = t.livemode
     AND r.created_at >= $6::timestamptz - interval '4 days'
    WHERE t.object_id IS NULL AND r.object_id IS NULL AND NOT r.thin
) AS e
ORDER BY e.stripe_created, e.event_id;

-- name: same_id
-- Should Stripe give both the same id after all.
SELECT e.event_id, e.event_type, extract(epoch FROM e.stripe_created)::bigint AS stripe_created, e.livemode, e.account,
       e.context, e.api_version, e.object_type, e.object_id, e.customer, e.created_at,
       (SELECT p.body FROM webhook_payloads AS p WHERE p.seq = e.seq AND p.created_at = e.created_at) AS body
FROM webhook_events AS e WHERE e.event_id = ANY ($1::text[]) AND NOT e.thin;

-- name: without_twin
-- Real events that came while the twin endpoint was there, and of which no twin came: by type, with one for example.
SELECT e.event_type, count(*) AS count, min(e.event_id) AS example
FROM webhook_events AS e
WHERE e.created_at >= $1 AND e.created_at <= $2 AND e.stripe_created >= $1 AND NOT e.thin
  AND NOT EXISTS (
      SELECT FROM webhook_shadow_events AS s
      WHERE s.stripe_created = e.stripe_created AND s.event_type = e.event_type
        AND s.object_id IS NOT DISTINCT FROM e.object_id
        AND s.account = e.account AND s.livemode = e.livemode
  )
GROUP BY e.event_type
ORDER BY e.event_type;
