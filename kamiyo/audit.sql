-- The billing tables as they stand, for comparing them with Stripe.

-- name: count
-- How many rows each table has of this account and mode.
SELECT (SELECT count(*) FROM billing.customers WHERE account = $1 AND livemode = $2) AS customers,
       (SELECT count(*) FROM billing.subscriptions WHERE account = $1 AND livemode = $2) AS subscriptions,
       (SELECT count(*) FROM billing.invoices WHERE account = $1 AND livemode = $2) AS invoices,
       (SELECT count(*) FROM billing.payment_methods WHERE account = $1 AND livemode = $2) AS payment_methods;

-- name: sample_customers
-- Up to $6 ids behind $3, of the share $5 of all that the seed $4 chooses.
SELECT id FROM billing.customers
WHERE account = $1 AND livemode = $2 AND id > $3 AND hashtextextended(id, $4) & 1048575 < $5::float8 * 1048576
ORDER BY id LIMIT $6;

-- name: sample_subscriptions
SELECT id FROM billing.subscriptions
WHERE account = $1 AND livemode = $2 AND id > $3 AND hashtextextended(id, $4) & 1048575 < $5::float8 * 1048576
ORDER BY id LIMIT $6;

-- name: sample_invoices
SELECT id FROM billing.invoices
WHERE account = $1 AND livemode = $2 AND id > $3 AND hashtextextended(id, $4) & 1048575 < $5::float8 * 1048576
ORDER BY id LIMIT $6;

-- name: sample_payment_methods
SELECT id FROM billing.payment_methods
WHERE account = $1 AND livemode = $2 AND id > $3 AND hashtextextended(id, $4) & 1048575 < $5::float8 * 1048576
ORDER BY id LIMIT $6;

-- name: rows_customers
-- These rows in the units of billing.customers_row.
SELECT id, email, name, phone, description, currency, balance, delinquent, default_payment_method, metadata::text,
       extract(epoch FROM created)::bigint, extract(epoch FROM deleted_at)::bigint,
       last_webhook_event_id, last_webhook_updated_at, last_event_rank, order_evidence
FROM billing.customers WHERE account = $1 AND livemode = $2 AND id = ANY ($3);

-- name: rows_subscriptions
SELECT id, customer, status, currency, price, quantity, items::text, extract(epoch FROM current_period_start)::bigint,
       extract(epoch FROM current_period_end)::bigint, cancel_at_period_end, extract(epoch FROM cancel_at)::bigint,
       extract(epoch FROM canceled_at)::bigint, extract(epoch FROM ended_at)::bigint,
       extract(epoch FROM trial_start)::bigint, extract(epoch FROM trial_end)::bigint, default_payment_method,
       latest_invoice, collection_method, metadata::text, extract(epoch FROM created)::bigint,
       last_webhook_event_id, last_webhook_updated_at, last_event_rank, order_evidence
FROM billing.subscriptions WHERE account = $1 AND livemode = $2 AND id = ANY ($3);

-- name: rows_invoices
SELECT id, customer, subscription, number, status, currency, amount_due, amount_paid, amount_remaining, subtotal, total,
       attempt_count, billing_reason, collection_method, extract(epoch FROM due_date)::bigint,
       extract(epoch FROM period_start)::bigint, extract(epoch FROM period_end)::bigint,
       extract(epoch FROM paid_at)::bigint, hosted_invoice_url, invoice_pdf, metadata::text,
       extract(epoch FROM created)::bigint, extract(epoch FROM deleted_at)::bigint,
       last_webhook_event_id, last_webhook_updated_at, last_event_rank, order_evidence
FROM billing.invoices WHERE account = $1 AND livemode = $2 AND id = ANY ($3);

-- name: rows_payment_methods
SELECT id, customer, type, brand, last4, exp_month, exp_year, funding, country, fingerprint, metadata::text,
       extract(epoch FROM created)::bigint, extract(epoch FROM detached_at)::bigint,
       last_webhook_event_id, last_webhook_updated_at, last_event_rank, order_evidence
FROM billing.payment_methods WHERE account = $1 AND livemode = $2 AND id = ANY ($3);

-- name: in_line
-- Which of these objects have an event that is not processed yet.
SELECT DISTINCT object_id FROM webhook_events
WHERE status IN ('pending', 'processing') AND object_id = ANY ($1::text[]) AND account = $2 AND livemode = $3;
