-- How far each of Stripe's lists has been gone through.

-- name: begin
-- Takes over what is unfinished of these collections; if nothing is, or if everything is to begin again ($5), all of
-- them begin again. Returns those to work on, with the second to go on from (null: the newest) and what is done.
WITH before AS (
    SELECT collection, finished_at FROM webhook_backfills
    WHERE account = $1 AND livemode = $2 AND collection = ANY ($3::text[])
)
INSERT INTO webhook_backfills AS b (account, livemode, collection, run)
SELECT $1, $2, asked.collection, $4
FROM unnest($3::text[]) AS asked (collection) LEFT JOIN before USING (collection)
WHERE $5 OR before.finished_at IS NULL OR NOT EXISTS (SELECT FROM before WHERE finished_at IS NULL)
ON CONFLICT (account, livemode, collection) DO UPDATE SET
    run = excluded.run,
    started_at = CASE WHEN $5 OR b.finished_at IS NOT NULL THEN now() ELSE b.started_at END,
    filled_from = CASE WHEN $5 OR b.finished_at IS NOT NULL THEN NULL ELSE b.filled_from END,
    objects = CASE WHEN $5 OR b.finished_at IS NOT NULL THEN 0 ELSE b.objects END,
    finished_at = NULL
RETURNING collection, extract(epoch FROM filled_from)::bigint AS filled_from, objects;

-- name: turn
-- A page is in, in the transaction of its rows. No row: another run has taken over.
UPDATE webhook_backfills
SET filled_from = coalesce(to_timestamp($5), filled_from), objects = objects + $6, page_at = now(),
    finished_at = CASE WHEN $7 THEN now() END
WHERE account = $1 AND livemode = $2 AND collection = $3 AND run = $4 AND finished_at IS NULL
RETURNING objects;
