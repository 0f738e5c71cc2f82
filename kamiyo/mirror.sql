-- The latest state of every object: see 014_mirror.sql.

-- name: write
-- Writes each object (which may be named once at most) where its event outranks the one that made the row; `force`
-- writes whatever the rank. Returns the objects that were written.
INSERT INTO stripe_objects AS b (
    id, object, account, livemode, data, api_version, created, last_webhook_event_id, updated_at, last_event_rank,
    deletion_rank, order_evidence
)
SELECT id, object, account, livemode, data::jsonb, api_version, to_timestamp(created), event_id, received_at, rank,
       deletion_rank, evidence
FROM unnest(
    $1::text[], $2::text[], $3::text[], $4::boolean[], $5::text[], $6::text[], $7::bigint[], $8::text[],
    $9::timestamptz[], $10::bigint[], $11::bigint[], $12::text[]
) AS i (id, object, account, livemode, data, api_version, created, event_id, received_at, rank, deletion_rank, evidence)
-- Everyone locks rows in the same order, so that two writers cannot wait for each other.
ORDER BY id, object, account, livemode
ON CONFLICT (id, object, account, livemode) DO UPDATE SET
    data = excluded.data, api_version = excluded.api_version, created = excluded.created,
    last_webhook_event_id = excluded.last_webhook_event_id, updated_at = excluded.updated_at,
    last_event_rank = excluded.last_event_rank,
    deletion_rank = greatest(b.deletion_rank, excluded.deletion_rank), order_evidence = excluded.order_evidence
WHERE b.last_event_rank < excluded.last_event_rank OR $13::boolean
   -- Two deletions that told nothing but the id: the same one of them, whichever came first.
   OR (b.last_event_rank = 0 AND excluded.last_event_rank = 0
       AND b.last_webhook_event_id < excluded.last_webhook_event_id)
RETURNING id, object, account, livemode;

-- name: delete
-- Notes deletions on rows that something of higher rank has made.
UPDATE stripe_objects AS b SET deletion_rank = i.deletion_rank
FROM unnest($1::text[], $2::text[], $3::text[], $4::boolean[], $5::bigint[])
    AS i (id, object, account, livemode, deletion_rank)
WHERE b.id = i.id AND b.object = i.object AND b.account = i.account AND b.livemode = i.livemode
  AND (b.deletion_rank IS NULL OR b.deletion_rank < i.deletion_rank);

-- name: standing
-- How these objects stand. A statement of its own, after the writing: whoever had to wait for another writer's row sees
-- here what that one left.
SELECT b.id, b.object, b.account, b.livemode, b.last_event_rank, b.last_webhook_event_id, b.order_evidence
FROM unnest($1::text[], $2::text[], $3::text[], $4::boolean[]) AS i (id, object, account, livemode)
JOIN stripe_objects AS b USING (id, object, account, livemode);

-- name: shown
-- What one of them shows.
SELECT data::text FROM stripe_objects WHERE id = $1 AND object = $2 AND account = $3 AND livemode = $4;

-- name: mark
UPDATE stripe_objects SET order_evidence = $5 WHERE id = $1 AND object = $2 AND account = $3 AND livemode = $4;

-- name: lock
LOCK TABLE stripe_objects IN EXCLUSIVE MODE;

-- name: forget
-- The rows that will be made again: their last event is still here with its body, and `$2` names it, or `$1` is true.
-- Not those whose deletion told nothing but the id.
DELETE FROM stripe_objects AS b USING webhook_events AS e
WHERE e.event_id = b.last_webhook_event_id AND coalesce(b.deletion_rank, 0) <= b.last_event_rank
  AND ($1 OR b.object = ANY ($2::text[]) OR e.event_type = ANY ($2::text[]))
  AND EXISTS (SELECT FROM webhook_payloads AS p WHERE p.seq = e.seq AND p.created_at = e.created_at);

-- name: reopen
-- Of those the deletion stays, for its event may be gone; what they show is made again by whatever shows it.
UPDATE stripe_objects AS b SET last_event_rank = -1 FROM webhook_events AS e
WHERE e.event_id = b.last_webhook_event_id AND b.deletion_rank > b.last_event_rank
  AND ($1 OR b.object = ANY ($2::text[]) OR e.event_type = ANY ($2::text[]))
  AND EXISTS (SELECT FROM webhook_payloads AS p WHERE p.seq = e.seq AND p.created_at = e.created_at);
