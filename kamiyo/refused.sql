-- How rows stood before they were made again, and stand now: asked where PostgreSQL refuses some.

-- name: forget_standing
DROP TABLE IF EXISTS pg_temp.kamiyo_standing;

-- name: keep_standing
-- How every row stands before it is forgotten, until the transaction ends.
CREATE TEMPORARY TABLE kamiyo_standing ON COMMIT DROP AS
SELECT 'customers' AS place, id, account, livemode, last_event_rank AS rank FROM billing.customers
UNION ALL SELECT 'subscriptions', id, account, livemode, last_event_rank FROM billing.subscriptions
UNION ALL SELECT 'invoices', id, account, livemode, last_event_rank FROM billing.invoices
UNION ALL SELECT 'payment_methods', id, account, livemode, last_event_rank FROM billing.payment_methods
UNION ALL SELECT 'stripe_objects ' || object, id, account, livemode, last_event_rank FROM stripe_objects;

-- name: standing
-- The ranks of these rows before, and now; null where there was none, or there is none.
WITH now AS (
    SELECT 'customers' AS place, id, account, livemode, last_event_rank AS rank FROM billing.customers WHERE id = ANY ($2)
    UNION ALL SELECT 'subscriptions', id, account, livemode, last_event_rank FROM billing.subscriptions WHERE id = ANY ($2)
    UNION ALL SELECT 'invoices', id, account, livemode, last_event_rank FROM billing.invoices WHERE id = ANY ($2)
    UNION ALL SELECT 'payment_methods', id, account, livemode, last_event_rank FROM billing.payment_methods WHERE id = ANY ($2)
    UNION ALL SELECT 'stripe_objects ' || object, id, account, livemode, last_event_rank FROM stripe_objects WHERE id = ANY ($2)
)
SELECT before.rank AS before, now.rank AS now
FROM unnest($1::text[], $2::text[], $3::text[], $4::boolean[]) WITH ORDINALITY AS r (place, id, account, livemode, number)
LEFT JOIN kamiyo_standing AS before USING (place, id, account, livemode)
LEFT JOIN now USING (place, id, account, livemode)
ORDER BY r.number;
