-- Comparing with Stripe's own list.

-- name: begin
-- Takes the turn if the last one began long enough ago; the caller that gets no row leaves it to another.
INSERT INTO webhook_reconciliation AS r (started_at) VALUES (now())
ON CONFLICT (only_row) DO UPDATE SET started_at = now()
WHERE r.started_at IS NULL OR r.started_at <= now() - make_interval(secs => $1)
RETURNING extract(epoch FROM compared_to)::bigint;

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

-- name: finish
UPDATE webhook_reconciliation SET compared_to = to_timestamp($1), finished_at = now(), missed = $2;
