-- Reads from Stripe's API on their way into the billing tables.

-- name: whose
-- The customers that the billing tables name for these objects: their events go through those lanes.
SELECT asked.object_id, asked.account, b.customer
FROM unnest($1::text[], $2::text[]) AS asked (object_id, account)
JOIN billing.subscriptions AS b ON b.id = asked.object_id AND b.account = asked.account AND b.customer IS NOT NULL
UNION
SELECT asked.object_id, asked.account, b.customer
FROM unnest($1::text[], $2::text[]) AS asked (object_id, account)
JOIN billing.invoices AS b ON b.id = asked.object_id AND b.account = asked.account AND b.customer IS NOT NULL
UNION
SELECT asked.object_id, asked.account, b.customer
FROM unnest($1::text[], $2::text[]) AS asked (object_id, account)
JOIN billing.payment_methods AS b ON b.id = asked.object_id AND b.account = asked.account AND b.customer IS NOT NULL;

-- name: try_lanes
-- Those of these lanes that nobody holds, held until this transaction ends. Trying, never waiting: a worker may be in a
-- slow handler.
SELECT lane FROM unnest($1::integer[]) AS lane WHERE pg_try_advisory_xact_lock(1800432, lane);
