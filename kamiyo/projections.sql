-- The four billing tables, written set by set. Each query takes an array of `billing.<table>_row` (a row for each
-- object at most), so that a batch of any size is one round trip.
--
-- A row is overwritten only by an event of higher rank, whatever arrives when. The second parameter lifts that for
-- the one caller that has weighed the evidence itself: settling a tie.
--
-- Each returns, for the rows that were there before, how the row stood: its rank, the event that made it so, and, where
-- it was undecided, those that were weighed for it.
-- The workers hold the lane of every object they write, so what this statement's snapshot sees is the latest.

-- name: project_customers
WITH incoming AS (
    SELECT * FROM unnest($1::billing.customers_row[])
), standing AS (
    SELECT b.id, b.account, b.livemode, b.last_event_rank, b.last_webhook_event_id,
           CASE WHEN b.order_evidence = 'undecided' THEN b.contested_by END AS contested_by
    FROM billing.customers AS b JOIN incoming AS i USING (id, account, livemode)
), written AS (
    INSERT INTO billing.customers AS b (
        id, account, livemode, email, name, phone, description, currency, balance, delinquent,
        default_payment_method, metadata, created, deleted_at, last_webhook_event_id, last_webhook_updated_at,
        last_event_rank, order_evidence
    )
    SELECT
        id, account, livemode, email, name, phone, description, currency, balance, delinquent,
        default_payment_method, metadata::jsonb, to_timestamp(created), to_timestamp(deleted_at), event_id,
        received_at, rank, evidence
    FROM incoming
    -- Everyone locks rows in the same order, so that two writers cannot wait for each other.
    ORDER BY id, account, livemode
    ON CONFLICT (id, account, livemode) DO UPDATE SET
        email = excluded.email, name = excluded.name, phone = excluded.phone, description = excluded.description,
        currency = excluded.currency, balance = excluded.balance, delinquent = excluded.delinquent,
        default_payment_method = excluded.default_payment_method, metadata = excluded.metadata,
        created = excluded.created, deleted_at = excluded.deleted_at,
        last_webhook_event_id = excluded.last_webhook_event_id,
        last_webhook_updated_at = excluded.last_webhook_updated_at, last_event_rank = excluded.last_event_rank,
        order_evidence = excluded.order_evidence
    WHERE b.last_event_rank < excluded.last_event_rank OR $2::boolean
)
SELECT id, account, livemode, last_event_rank, last_webhook_event_id, contested_by FROM standing;

-- name: project_subscriptions
WITH incoming AS (
    SELECT * FROM unnest($1::billing.subscriptions_row[])
), standing AS (
    SELECT b.id, b.account, b.livemode, b.last_event_rank, b.last_webhook_event_id,
           CASE WHEN b.order_evidence = 'undecided' THEN b.contested_by END AS contested_by
    FROM billing.subscriptions AS b JOIN incoming AS i USING (id, account, livemode)
), written AS (
    INSERT INTO billing.subscriptions AS b (
        id, account, livemode, customer, status, currency, price, quantity, items, current_period_start,
        current_period_end, cancel_at_period_end, cancel_at, canceled_at, ended_at, trial_start, trial_end,
        default_payment_method, latest_invoice, collection_method, metadata, created, last_webhook_event_id,
        last_webhook_updated_at, last_event_rank, order_evidence
    )
    SELECT
        id, account, livemode, customer, status, currency, price, quantity, items::jsonb,
        to_timestamp(current_period_start), to_timestamp(current_period_end), cancel_at_period_end,
        to_timestamp(cancel_at), to_timestamp(canceled_at), to_timestamp(ended_at), to_timestamp(trial_start),
        to_timestamp(trial_end), default_payment_method, latest_invoice, collection_method, metadata::jsonb,
        to_timestamp(created), event_id, received_at, rank, evidence
    FROM incoming
    -- Everyone locks rows in the same order, so that two writers cannot wait for each other.
    ORDER BY id, account, livemode
    ON CONFLICT (id, account, livemode) DO UPDATE SET
        customer = excluded.customer, status = excluded.status, currency = excluded.currency,
        price = excluded.price, quantity = excluded.quantity, items = excluded.items,
        current_period_start = excluded.current_period_start, current_period_end = excluded.current_period_end,
        cancel_at_period_end = excluded.cancel_at_period_end, cancel_at = excluded.cancel_at,
        canceled_at = excluded.canceled_at, ended_at = excluded.ended_at, trial_start = excluded.trial_start,
        trial_end = excluded.trial_end, default_payment_method = excluded.default_payment_method,
        latest_invoice = excluded.latest_invoice, collection_method = excluded.collection_method,
        metadata = excluded.metadata, created = excluded.created,
        last_webhook_event_id = excluded.last_webhook_event_id,
        last_webhook_updated_at = excluded.last_webhook_updated_at, last_event_rank = excluded.last_event_rank,
        order_evidence = excluded.order_evidence
    WHERE b.last_event_rank < excluded.last_event_rank OR $2::boolean
)
SELECT id, account, livemode, last_event_rank, last_webhook_event_id, contested_by FROM standing;

-- name: project_invoices
WITH incoming AS (
    SELECT * FROM unnest($1::billing.invoices_row[])
), standing AS (
    SELECT b.id, b.account, b.livemode, b.last_event_rank, b.last_webhook_event_id,
           CASE WHEN b.order_evidence = 'undecided' THEN b.contested_by END AS contested_by
    FROM billing.invoices AS b JOIN incoming AS i USING (id, account, livemode)
), written AS (
    INSERT INTO billing.invoices AS b (
        id, account, livemode, customer, subscription, number, status, currency, amount_due, amount_paid,
        amount_remaining, subtotal, total, attempt_count, billing_reason, collection_method, due_date,
        period_start, period_end, paid_at, hosted_invoice_url, invoice_pdf, metadata, created, deleted_at,
        last_webhook_event_id, last_webhook_updated_at, last_event_rank, order_evidence
    )
    SELECT
        id, account, livemode, customer, subscription, number, status, currency, amount_due, amount_paid,
        amount_remaining, subtotal, total, attempt_count, billing_reason, collection_method,
        to_timestamp(due_date), to_timestamp(period_start), to_timestamp(period_end), to_timestamp(paid_at),
        hosted_invoice_url, invoice_pdf, metadata::jsonb, to_timestamp(created), to_timestamp(deleted_at),
        event_id, received_at, rank, evidence
    FROM incoming
    -- Everyone locks rows in the same order, so that two writers cannot wait for each other.
    ORDER BY id, account, livemode
    ON CONFLICT (id, account, livemode) DO UPDATE SET
        customer = excluded.customer, subscription = excluded.subscription, number = excluded.number,
        status = excluded.status, currency = excluded.currency, amount_due = excluded.amount_due,
        amount_paid = excluded.amount_paid, amount_remaining = excluded.amount_remaining,
        subtotal = excluded.subtotal, total = excluded.total, attempt_count = excluded.attempt_count,
        billing_reason = excluded.billing_reason, collection_method = excluded.collection_method,
        due_date = excluded.due_date, period_start = excluded.period_start, period_end = excluded.period_end,
        paid_at = excluded.paid_at, hosted_invoice_url = excluded.hosted_invoice_url,
        invoice_pdf = excluded.invoice_pdf, metadata = excluded.metadata, created = excluded.created,
        deleted_at = excluded.deleted_at, last_webhook_event_id = excluded.last_webhook_event_id,
        last_webhook_updated_at = excluded.last_webhook_updated_at, last_event_rank = excluded.last_event_rank,
        order_evidence = excluded.order_evidence
    WHERE b.last_event_rank < excluded.last_event_rank OR $2::boolean
)
SELECT id, account, livemode, last_event_rank, last_webhook_event_id, contested_by FROM standing;

-- name: project_payment_methods
WITH incoming AS (
    SELECT * FROM unnest($1::billing.payment_methods_row[])
), standing AS (
    SELECT b.id, b.account, b.livemode, b.last_event_rank, b.last_webhook_event_id,
           CASE WHEN b.order_evidence = 'undecided' THEN b.contested_by END AS contested_by
    FROM billing.payment_methods AS b JOIN incoming AS i USING (id, account, livemode)
), written AS (
    INSERT INTO billing.payment_methods AS b (
        id, account, livemode, customer, type, brand, last4, exp_month, exp_year, funding, country, fingerprint,
        metadata, created, detached_at, last_webhook_event_id, last_webhook_updated_at, last_event_rank,
        order_evidence
    )
    SELECT
        id, account, livemode, customer, type, brand, last4, exp_month, exp_year, funding, country, fingerprint,
        metadata::jsonb, to_timestamp(created), to_timestamp(detached_at), event_id, received_at, rank, evidence
    FROM incoming
    -- Everyone locks rows in the same order, so that two writers cannot wait for each other.
    ORDER BY id, account, livemode
    ON CONFLICT (id, account, livemode) DO UPDATE SET
        customer = excluded.customer, type = excluded.type, brand = excluded.brand, last4 = excluded.last4,
        exp_month = excluded.exp_month, exp_year = excluded.exp_year, funding = excluded.funding,
        country = excluded.country, fingerprint = excluded.fingerprint, metadata = excluded.metadata,
        created = excluded.created, detached_at = excluded.detached_at,
        last_webhook_event_id = excluded.last_webhook_event_id,
        last_webhook_updated_at = excluded.last_webhook_updated_at, last_event_rank = excluded.last_event_rank,
        order_evidence = excluded.order_evidence
    WHERE b.last_event_rank < excluded.last_event_rank OR $2::boolean
)
SELECT id, account, livemode, last_event_rank, last_webhook_event_id, contested_by FROM standing;

-- name: kept_customers
-- A customer as they stand, in the units of billing.customers_row.
SELECT email, name, phone, description, currency, balance, delinquent, default_payment_method, metadata::text,
       extract(epoch FROM created)::bigint, extract(epoch FROM deleted_at)::bigint,
       last_webhook_event_id, last_webhook_updated_at, last_event_rank, order_evidence,
       last_shown_rank, last_shown_event_id, contested_by
FROM billing.customers WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: kept_subscriptions
-- A subscription as it stands, in the units of billing.subscriptions_row. Its deletion shows it.
SELECT customer, status, currency, price, quantity, items::text, extract(epoch FROM current_period_start)::bigint,
       extract(epoch FROM current_period_end)::bigint, cancel_at_period_end, extract(epoch FROM cancel_at)::bigint,
       extract(epoch FROM canceled_at)::bigint, extract(epoch FROM ended_at)::bigint,
       extract(epoch FROM trial_start)::bigint, extract(epoch FROM trial_end)::bigint, default_payment_method,
       latest_invoice, collection_method, metadata::text, extract(epoch FROM created)::bigint,
       last_webhook_event_id, last_webhook_updated_at, last_event_rank, order_evidence, NULL, NULL,
       contested_by
FROM billing.subscriptions WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: kept_invoices
-- An invoice as it stands, in the units of billing.invoices_row.
SELECT customer, subscription, number, status, currency, amount_due, amount_paid, amount_remaining, subtotal, total,
       attempt_count, billing_reason, collection_method, extract(epoch FROM due_date)::bigint,
       extract(epoch FROM period_start)::bigint, extract(epoch FROM period_end)::bigint,
       extract(epoch FROM paid_at)::bigint, hosted_invoice_url, invoice_pdf, metadata::text,
       extract(epoch FROM created)::bigint, extract(epoch FROM deleted_at)::bigint,
       last_webhook_event_id, last_webhook_updated_at, last_event_rank, order_evidence,
       last_shown_rank, last_shown_event_id, contested_by
FROM billing.invoices WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: kept_payment_methods
-- A payment method as it stands, in the units of billing.payment_methods_row.
SELECT customer, type, brand, last4, exp_month, exp_year, funding, country, fingerprint, metadata::text,
       extract(epoch FROM created)::bigint, extract(epoch FROM detached_at)::bigint,
       last_webhook_event_id, last_webhook_updated_at, last_event_rank, order_evidence,
       last_shown_rank, last_shown_event_id, contested_by
FROM billing.payment_methods WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: note_shown_customers
-- After the row is written: from which event or read that is what a deletion left in it.
UPDATE billing.customers SET last_shown_rank = $4, last_shown_event_id = $5
WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: note_shown_invoices
-- See customers.
UPDATE billing.invoices SET last_shown_rank = $4, last_shown_event_id = $5
WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: note_shown_payment_methods
-- See customers.
UPDATE billing.payment_methods SET last_shown_rank = $4, last_shown_event_id = $5
WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: note_contested_customers
-- After an undecided row is written: the events that were weighed for it.
UPDATE billing.customers SET contested_by = $4 WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: note_contested_subscriptions
-- See customers.
UPDATE billing.subscriptions SET contested_by = $4 WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: note_contested_invoices
-- See customers.
UPDATE billing.invoices SET contested_by = $4 WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: note_contested_payment_methods
-- See customers.
UPDATE billing.payment_methods SET contested_by = $4 WHERE id = $1 AND account = $2 AND livemode = $3;

-- name: reads_of
-- What is kept of these objects: one read that showed it and one that found it gone, at most.
SELECT r.object_type, r.object_id, r.account, r.livemode, r.body, extract(epoch FROM r.stripe_second)::bigint AS stripe_second,
       extract(epoch FROM r.asked_to)::bigint AS asked_to, r.source, extract(epoch FROM r.ended)::bigint AS ended, r.read_at
FROM unnest($1::text[], $2::text[], $3::boolean[]) AS asked (object_id, account, livemode)
JOIN webhook_reads AS r USING (object_id, account, livemode)
ORDER BY r.stripe_second;

-- name: reads_after
-- Every read in the order of its key, for rebuilding the tables.
SELECT object_type, object_id, account, livemode, body, extract(epoch FROM stripe_second)::bigint AS stripe_second,
       extract(epoch FROM asked_to)::bigint AS asked_to, source, extract(epoch FROM ended)::bigint AS ended, read_at
FROM webhook_reads WHERE (object_id, account, livemode, gone) > ($1, $2, $3, $4)
ORDER BY object_id, account, livemode, gone LIMIT $5;

-- name: keep_reads
-- Keeps what ranks higher, and remembers in either case until when Stripe was asked. Returns the rows as they are kept.
INSERT INTO webhook_reads AS r (
    object_id, account, livemode, gone, object_type, stripe_second, asked_to, ended, rank, source, body, read_at
)
SELECT object_id, account, livemode, gone, object_type, to_timestamp(second), to_timestamp(second),
       to_timestamp(ended), rank, source, body, clock_timestamp()
FROM unnest($1::text[], $2::text[], $3::boolean[], $4::boolean[], $5::text[], $6::bigint[], $7::bigint[], $8::bigint[],
            $9::text[], $10::bytea[])
    AS d (object_id, account, livemode, gone, object_type, second, ended, rank, source, body)
-- Everyone locks rows in the same order, so that two writers cannot wait for each other.
ORDER BY object_id, account, livemode, gone
ON CONFLICT (object_id, account, livemode, gone) DO UPDATE SET
    asked_to = greatest(r.asked_to, excluded.asked_to),
    stripe_second = CASE WHEN excluded.rank > r.rank THEN excluded.stripe_second ELSE r.stripe_second END,
    -- Of two answers of one second either may be the one that was asked for because a life had ended.
    ended = CASE WHEN excluded.rank > r.rank THEN coalesce(excluded.ended, r.ended) ELSE coalesce(r.ended, excluded.ended) END,
    source = CASE WHEN excluded.rank > r.rank THEN excluded.source ELSE r.source END,
    body = CASE WHEN excluded.rank > r.rank THEN excluded.body ELSE r.body END,
    read_at = CASE WHEN excluded.rank > r.rank THEN excluded.read_at ELSE r.read_at END,
    rank = greatest(excluded.rank, r.rank)
RETURNING object_type, object_id, account, livemode, body, extract(epoch FROM stripe_second)::bigint AS stripe_second,
          extract(epoch FROM asked_to)::bigint AS asked_to, source, extract(epoch FROM ended)::bigint AS ended, read_at;

-- name: hold_tables
-- Other writers wait until the rebuild commits; readers do not, and neither do deliveries: they are told by the lock
-- that nothing can be projected on arrival now (see webhook_receive).
SELECT pg_advisory_lock(118038671810930);

-- name: let_go_of_tables
SELECT pg_advisory_unlock(118038671810930);

-- name: are_held
-- Whether a rebuild is going on.
SELECT NOT pg_try_advisory_xact_lock_shared(118038671810930);

-- name: lock_tables
LOCK TABLE billing.customers, billing.subscriptions, billing.invoices, billing.payment_methods IN EXCLUSIVE MODE;

-- name: begin_to_write
-- The same tables in the same order, for whoever will write to them in another: so neither holds what the other waits for.
LOCK TABLE billing.customers, billing.subscriptions, billing.invoices, billing.payment_methods IN ROW EXCLUSIVE MODE;

-- name: forget_customers
-- The rows that can be made again: their last event is still here, with its body, or the read that made them is kept
-- (its rank has stage 3). Not those that a stub made (its rank is terminal, and even): what it kept may be from events
-- that are gone. Where they are not, it is merged anew. Nor those of which nothing tells what was last: the event that
-- contests the one which stands may be gone, and alone it would look decided. Where it is not, both are weighed anew.
DELETE FROM billing.customers AS b USING webhook_events AS e
WHERE e.event_id = b.last_webhook_event_id AND b.last_event_rank >> 10 & 3 <> 3
  AND NOT (b.last_event_rank >= (1::bigint << 56) AND b.last_event_rank & 1 = 0) AND b.order_evidence = 'decided'
  AND EXISTS (SELECT FROM webhook_payloads AS p WHERE p.seq = e.seq AND p.created_at = e.created_at);
DELETE FROM billing.customers AS b USING webhook_reads AS r
WHERE r.object_id = b.id AND r.account = b.account AND r.livemode = b.livemode
  AND r.rank = b.last_event_rank AND b.last_event_rank >> 10 & 3 = 3;

-- name: forget_subscriptions
-- The rows that can be made again: see customers.
DELETE FROM billing.subscriptions AS b USING webhook_events AS e
WHERE e.event_id = b.last_webhook_event_id AND b.last_event_rank >> 10 & 3 <> 3 AND b.order_evidence = 'decided'
  AND EXISTS (SELECT FROM webhook_payloads AS p WHERE p.seq = e.seq AND p.created_at = e.created_at);
DELETE FROM billing.subscriptions AS b USING webhook_reads AS r
WHERE r.object_id = b.id AND r.account = b.account AND r.livemode = b.livemode
  AND r.rank = b.last_event_rank AND b.last_event_rank >> 10 & 3 = 3;

-- name: forget_invoices
-- The rows that can be made again: see customers.
DELETE FROM billing.invoices AS b USING webhook_events AS e
WHERE e.event_id = b.last_webhook_event_id AND b.last_event_rank >> 10 & 3 <> 3
  AND NOT (b.last_event_rank >= (1::bigint << 56) AND b.last_event_rank & 1 = 0) AND b.order_evidence = 'decided'
  AND EXISTS (SELECT FROM webhook_payloads AS p WHERE p.seq = e.seq AND p.created_at = e.created_at);
DELETE FROM billing.invoices AS b USING webhook_reads AS r
WHERE r.object_id = b.id AND r.account = b.account AND r.livemode = b.livemode
  AND r.rank = b.last_event_rank AND b.last_event_rank >> 10 & 3 = 3;

-- name: forget_payment_methods
-- The rows that can be made again: see customers.
DELETE FROM billing.payment_methods AS b USING webhook_events AS e
WHERE e.event_id = b.last_webhook_event_id AND b.last_event_rank >> 10 & 3 <> 3
  AND NOT (b.last_event_rank >= (1::bigint << 56) AND b.last_event_rank & 1 = 0) AND b.order_evidence = 'decided'
  AND EXISTS (SELECT FROM webhook_payloads AS p WHERE p.seq = e.seq AND p.created_at = e.created_at);
DELETE FROM billing.payment_methods AS b USING webhook_reads AS r
WHERE r.object_id = b.id AND r.account = b.account AND r.livemode = b.livemode
  AND r.rank = b.last_event_rank AND b.last_event_rank >> 10 & 3 = 3;
