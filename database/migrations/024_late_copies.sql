-- A late copy of an event that is being cleaned up at that very moment is known for what it is; and a copy that another server
-- is storing just then is waited for longer than a billing row.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- Storing and projecting in one commit.
--
-- Most events need nothing but their billing row. Those are projected in the very statement that stores them, so they
-- are processed when they are acknowledged, and no worker touches them. Where that cannot be, now or ever, the event
-- is stored as pending and the workers do what they always do; nothing depends on this function but speed.
--
-- A function, because each of its statements sees what the one before it did and what others committed meanwhile
-- (a fresh snapshot each), and still it is one round trip and one commit.
--
-- Any object may be known only to be gone (`billing.is_stub`): a deletion need not carry it, a thin event can say it, and
-- Stripe then has no more to tell. An event from before, which comes late, has what was last known of it: the workers
-- fill that in.
CREATE OR REPLACE FUNCTION webhook_receive(
    arrivals webhook_arrival[],
    bodies bytea[],
    lanes integer[],
    customers billing.customers_row[],
    subscriptions billing.subscriptions_row[],
    invoices billing.invoices_row[],
    payment_methods billing.payment_methods_row[],
    source text
) RETURNS TABLE (known_event_id text, known_status text, is_new boolean)
LANGUAGE plpgsql
-- Someone who holds a billing row for long (a person in psql) must not hold up the acknowledgements: the rows are
-- given up then, and left to the workers.
SET lock_timeout = '250ms'
-- Planned once in a session: to plan for each group anew took longer than to store one event. A plan made while the tables
-- were small has to be right when they are large, so every look-up below is a subquery of its own, for one key, with its
-- index as the only way.
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
#variable_conflict use_column
DECLARE
    projecting boolean := false;
    lane       integer;
    -- Lanes that a worker holds. Trying, never waiting: it may be in a slow handler.
    busy       integer[] := '{}';
    -- Events left to the workers although their row is all they need: those of busy lanes, and those whose row was made
    -- by another event of the same second that ranks as high (a tie) or higher (then this one is evidence that comes
    -- late): the workers weigh them all together. And those of objects of which only the end is known.
    left_over  text[] := '{}';
    written    bigint;
    numbers    bigint[] := '{}';
    -- A clean-up is under way. None begins before this commits otherwise.
    cleaning   boolean := NOT pg_try_advisory_xact_lock_shared(118038671810933);
    cleaned_up text[];
    taken_back bigint;
BEGIN
    -- Not while the tables are being rebuilt: the rebuild holds this lock, and would be waited for.
    IF cardinality(lanes) > 0 AND pg_try_advisory_xact_lock_shared(118038671810930) THEN
        BEGIN
            FOREACH lane IN ARRAY lanes LOOP
                IF NOT pg_try_advisory_xact_lock(1800432, lane) THEN
                    busy := busy || lane;
                END IF;
            END LOOP;
            IF cardinality(busy) > 0 THEN
                left_over := ARRAY(SELECT a.event_id FROM unnest(arrivals) AS a WHERE a.lane = ANY (busy));
            END IF;
            IF cardinality(customers) > 0 THEN
                INSERT INTO billing.customers AS b (
                    id, account, livemode, email, name, phone, description, currency, balance, delinquent,
                    default_payment_method, metadata, created, deleted_at, last_webhook_event_id,
                    last_webhook_updated_at, last_event_rank, order_evidence
                )
                SELECT
                    r.id, r.account, r.livemode, r.email, r.name, r.phone, r.description, r.currency, r.balance,
                    r.delinquent, r.default_payment_method, r.metadata::jsonb, to_timestamp(r.created),
                    to_timestamp(r.deleted_at), r.event_id, now(), r.rank, r.evidence
                FROM unnest(customers) AS r WHERE r.event_id <> ALL (left_over)
                ORDER BY r.id, r.account, r.livemode
                ON CONFLICT (id, account, livemode) DO UPDATE SET
                    email = excluded.email, name = excluded.name, phone = excluded.phone,
                    description = excluded.description, currency = excluded.currency, balance = excluded.balance,
                    delinquent = excluded.delinquent, default_payment_method = excluded.default_payment_method,
                    metadata = excluded.metadata, created = excluded.created, deleted_at = excluded.deleted_at,
                    last_webhook_event_id = excluded.last_webhook_event_id,
                    last_webhook_updated_at = excluded.last_webhook_updated_at,
                    last_event_rank = excluded.last_event_rank, order_evidence = excluded.order_evidence
                WHERE b.last_event_rank < excluded.last_event_rank AND NOT billing.is_stub(b.last_event_rank);
                GET DIAGNOSTICS written = ROW_COUNT;
                IF written < cardinality(customers) THEN
                    left_over := left_over || ARRAY(
                        SELECT r.event_id FROM unnest(customers) AS r
                        WHERE (SELECT b.last_event_rank >= r.rank AND b.last_webhook_event_id <> r.event_id
                                  AND billing.second_of(b.last_event_rank) = billing.second_of(r.rank)
                                   OR billing.is_stub(b.last_event_rank)
                               FROM billing.customers AS b
                               WHERE b.id = r.id AND b.account = r.account AND b.livemode = r.livemode)
                    );
                END IF;
            END IF;
            IF cardinality(subscriptions) > 0 THEN
                INSERT INTO billing.subscriptions AS b (
                    id, account, livemode, customer, status, currency, price, quantity, items, current_period_start,
                    current_period_end, cancel_at_period_end, cancel_at, canceled_at, ended_at, trial_start,
                    trial_end, default_payment_method, latest_invoice, collection_method, metadata, created,
                    last_webhook_event_id, last_webhook_updated_at, last_event_rank, order_evidence
                )
                SELECT
                    r.id, r.account, r.livemode, r.customer, r.status, r.currency, r.price, r.quantity,
                    r.items::jsonb, to_timestamp(r.current_period_start), to_timestamp(r.current_period_end),
                    r.cancel_at_period_end, to_timestamp(r.cancel_at), to_timestamp(r.canceled_at),
                    to_timestamp(r.ended_at), to_timestamp(r.trial_start), to_timestamp(r.trial_end),
                    r.default_payment_method, r.latest_invoice, r.collection_method, r.metadata::jsonb,
                    to_timestamp(r.created), r.event_id, now(), r.rank, r.evidence
                FROM unnest(subscriptions) AS r WHERE r.event_id <> ALL (left_over)
                ORDER BY r.id, r.account, r.livemode
                ON CONFLICT (id, account, livemode) DO UPDATE SET
                    customer = excluded.customer, status = excluded.status, currency = excluded.currency,
                    price = excluded.price, quantity = excluded.quantity, items = excluded.items,
                    current_period_start = excluded.current_period_start,
                    current_period_end = excluded.current_period_end,
                    cancel_at_period_end = excluded.cancel_at_period_end, cancel_at = excluded.cancel_at,
                    canceled_at = excluded.canceled_at, ended_at = excluded.ended_at,
                    trial_start = excluded.trial_start, trial_end = excluded.trial_end,
                    default_payment_method = excluded.default_payment_method,
                    latest_invoice = excluded.latest_invoice, collection_method = excluded.collection_method,
                    metadata = excluded.metadata, created = excluded.created,
                    last_webhook_event_id = excluded.last_webhook_event_id,
                    last_webhook_updated_at = excluded.last_webhook_updated_at,
                    last_event_rank = excluded.last_event_rank, order_evidence = excluded.order_evidence
                WHERE b.last_event_rank < excluded.last_event_rank;
                GET DIAGNOSTICS written = ROW_COUNT;
                IF written < cardinality(subscriptions) THEN
                    left_over := left_over || ARRAY(
                        SELECT r.event_id FROM unnest(subscriptions) AS r
                        WHERE (SELECT b.last_event_rank >= r.rank AND b.last_webhook_event_id <> r.event_id
                                  AND billing.second_of(b.last_event_rank) = billing.second_of(r.rank)
                               FROM billing.subscriptions AS b
                               WHERE b.id = r.id AND b.account = r.account AND b.livemode = r.livemode)
                    );
                END IF;
            END IF;
            IF cardinality(invoices) > 0 THEN
                INSERT INTO billing.invoices AS b (
                    id, account, livemode, customer, subscription, number, status, currency, amount_due, amount_paid,
                    amount_remaining, subtotal, total, attempt_count, billing_reason, collection_method, due_date,
                    period_start, period_end, paid_at, hosted_invoice_url, invoice_pdf, metadata, created, deleted_at,
                    last_webhook_event_id, last_webhook_updated_at, last_event_rank, order_evidence
                )
                SELECT
                    r.id, r.account, r.livemode, r.customer, r.subscription, r.number, r.status, r.currency,
                    r.amount_due, r.amount_paid, r.amount_remaining, r.subtotal, r.total, r.attempt_count,
                    r.billing_reason, r.collection_method, to_timestamp(r.due_date), to_timestamp(r.period_start),
                    to_timestamp(r.period_end), to_timestamp(r.paid_at), r.hosted_invoice_url, r.invoice_pdf,
                    r.metadata::jsonb, to_timestamp(r.created), to_timestamp(r.deleted_at), r.event_id, now(), r.rank,
                    r.evidence
                FROM unnest(invoices) AS r WHERE r.event_id <> ALL (left_over)
                ORDER BY r.id, r.account, r.livemode
                ON CONFLICT (id, account, livemode) DO UPDATE SET
                    customer = excluded.customer, subscription = excluded.subscription, number = excluded.number,
                    status = excluded.status, currency = excluded.currency, amount_due = excluded.amount_due,
                    amount_paid = excluded.amount_paid, amount_remaining = excluded.amount_remaining,
                    subtotal = excluded.subtotal, total = excluded.total, attempt_count = excluded.attempt_count,
                    billing_reason = excluded.billing_reason, collection_method = excluded.collection_method,
                    due_date = excluded.due_date, period_start = excluded.period_start,
                    period_end = excluded.period_end, paid_at = excluded.paid_at,
                    hosted_invoice_url = excluded.hosted_invoice_url, invoice_pdf = excluded.invoice_pdf,
                    metadata = excluded.metadata, created = excluded.created, deleted_at = excluded.deleted_at,
                    last_webhook_event_id = excluded.last_webhook_event_id,
                    last_webhook_updated_at = excluded.last_webhook_updated_at,
                    last_event_rank = excluded.last_event_rank, order_evidence = excluded.order_evidence
                WHERE b.last_event_rank < excluded.last_event_rank AND NOT billing.is_stub(b.last_event_rank);
                GET DIAGNOSTICS written = ROW_COUNT;
                IF written < cardinality(invoices) THEN
                    left_over := left_over || ARRAY(
                        SELECT r.event_id FROM unnest(invoices) AS r
                        WHERE (SELECT b.last_event_rank >= r.rank AND b.last_webhook_event_id <> r.event_id
                                  AND billing.second_of(b.last_event_rank) = billing.second_of(r.rank)
                                   OR billing.is_stub(b.last_event_rank)
                               FROM billing.invoices AS b
                               WHERE b.id = r.id AND b.account = r.account AND b.livemode = r.livemode)
                    );
                END IF;
            END IF;
            IF cardinality(payment_methods) > 0 THEN
                INSERT INTO billing.payment_methods AS b (
                    id, account, livemode, customer, type, brand, last4, exp_month, exp_year, funding, country,
                    fingerprint, metadata, created, detached_at, last_webhook_event_id, last_webhook_updated_at,
                    last_event_rank, order_evidence
                )
                SELECT
                    r.id, r.account, r.livemode, r.customer, r.type, r.brand, r.last4, r.exp_month, r.exp_year,
                    r.funding, r.country, r.fingerprint, r.metadata::jsonb, to_timestamp(r.created),
                    to_timestamp(r.detached_at), r.event_id, now(), r.rank, r.evidence
                FROM unnest(payment_methods) AS r WHERE r.event_id <> ALL (left_over)
                ORDER BY r.id, r.account, r.livemode
                ON CONFLICT (id, account, livemode) DO UPDATE SET
                    customer = excluded.customer, type = excluded.type, brand = excluded.brand,
                    last4 = excluded.last4, exp_month = excluded.exp_month, exp_year = excluded.exp_year,
                    funding = excluded.funding, country = excluded.country, fingerprint = excluded.fingerprint,
                    metadata = excluded.metadata, created = excluded.created, detached_at = excluded.detached_at,
                    last_webhook_event_id = excluded.last_webhook_event_id,
                    last_webhook_updated_at = excluded.last_webhook_updated_at,
                    last_event_rank = excluded.last_event_rank, order_evidence = excluded.order_evidence
                WHERE b.last_event_rank < excluded.last_event_rank AND NOT billing.is_stub(b.last_event_rank);
                GET DIAGNOSTICS written = ROW_COUNT;
                IF written < cardinality(payment_methods) THEN
                    left_over := left_over || ARRAY(
                        SELECT r.event_id FROM unnest(payment_methods) AS r
                        WHERE (SELECT b.last_event_rank >= r.rank AND b.last_webhook_event_id <> r.event_id
                                  AND billing.second_of(b.last_event_rank) = billing.second_of(r.rank)
                                   OR billing.is_stub(b.last_event_rank)
                               FROM billing.payment_methods AS b
                               WHERE b.id = r.id AND b.account = r.account AND b.livemode = r.livemode)
                    );
                END IF;
            END IF;
            projecting := true;
        EXCEPTION WHEN others THEN
            -- Whatever it was, one event must not keep the others from being stored. The workers take them one by one,
            -- and find the one it was.
            projecting := false;
        END;
    END IF;

    -- From here on nothing can be given up but the whole group. What is waited for is a copy that another server is just
    -- storing, and a commit may take its time.
    PERFORM set_config('lock_timeout', '2s', true);
    -- Numbered here and not by the table, so that ledger and bodies need no join to agree.
    FOR at IN 1 .. cardinality(arrivals) LOOP
        numbers[at] := nextval('webhook_events_seq_seq');
    END LOOP;
    INSERT INTO webhook_events (
        seq, event_id, event_type, stripe_created, livemode, thin, account, context, api_version, object_type,
        object_id, customer, snapshot_event, lane, source, status, outcome, attempts, processing_us,
        next_try_at, processed_at
    ) OVERRIDING SYSTEM VALUE
    SELECT numbers[i.ordinality], i.event_id, i.event_type, to_timestamp(i.stripe_created), i.livemode, i.thin, i.account, i.context,
           i.api_version, i.object_type, i.object_id, i.customer, i.snapshot_event, i.lane, webhook_receive.source,
           CASE WHEN i.done THEN 'processed' ELSE 'pending' END,
           CASE WHEN i.done THEN i.outcome END,
           i.done::int,
           CASE WHEN i.done THEN i.processing_us ELSE 0 END,
           CASE WHEN NOT i.done THEN now() END,
           CASE WHEN i.done THEN clock_timestamp() END
    FROM (SELECT a.*, projecting AND a.outcome IS NOT NULL AND a.event_id <> ALL (left_over) AS done
          FROM unnest(arrivals) WITH ORDINALITY AS a) AS i
    WHERE (SELECT t.event_id FROM webhook_tombstones AS t WHERE t.event_id = i.event_id) IS NULL
    -- Two servers may store the same events at once; in one order they cannot wait for each other in a ring.
    ORDER BY i.event_id
    ON CONFLICT (event_id) DO NOTHING;
    GET DIAGNOSTICS written = ROW_COUNT;
    IF cleaning THEN
        -- It may have removed an event while this was waiting for its place. What it left of it shows only to a statement
        -- that begins afterwards: then the copy is taken out again.
        cleaned_up := ARRAY(
            SELECT a.event_id FROM unnest(arrivals) AS a
            WHERE (SELECT t.event_id FROM webhook_tombstones AS t WHERE t.event_id = a.event_id) IS NOT NULL
        );
        DELETE FROM webhook_events AS e WHERE e.event_id = ANY (cleaned_up) AND e.seq = ANY (numbers);
        GET DIAGNOSTICS taken_back = ROW_COUNT;
        written := written - taken_back;
    END IF;
    IF written = cardinality(arrivals) THEN
        INSERT INTO webhook_payloads (seq, created_at, body)
        SELECT b.seq, now(), b.body FROM unnest(numbers, bodies) AS b (seq, body);
    ELSE
        -- Some were here before; those keep their number and their body.
        INSERT INTO webhook_payloads (seq, created_at, body)
        SELECT numbers[i.ordinality], now(), bodies[i.ordinality]
        FROM unnest(arrivals) WITH ORDINALITY AS i
        WHERE (SELECT e.seq FROM webhook_events AS e WHERE e.event_id = i.event_id) = numbers[i.ordinality];

        RETURN QUERY
        SELECT i.event_id,
               coalesce((SELECT e.status FROM webhook_events AS e WHERE e.event_id = i.event_id),
                        (SELECT 'processed' FROM webhook_tombstones AS t WHERE t.event_id = i.event_id),
                        'pending'),
               false
        FROM unnest(arrivals) WITH ORDINALITY AS i
        WHERE (SELECT e.seq FROM webhook_events AS e WHERE e.event_id = i.event_id) IS DISTINCT FROM numbers[i.ordinality];
    END IF;

    -- Of those whose row was all they needed, the ones that are left to the workers all the same.
    IF NOT projecting THEN
        left_over := ARRAY(SELECT a.event_id FROM unnest(arrivals) AS a WHERE a.outcome IS NOT NULL);
    END IF;
    IF cardinality(left_over) > 0 THEN
        RETURN QUERY
        SELECT l.event_id, 'pending', true FROM unnest(left_over) AS l (event_id)
        WHERE (SELECT e.seq FROM webhook_events AS e WHERE e.event_id = l.event_id) = ANY (numbers);
    END IF;
END $$;

INSERT INTO webhook_migrations (name) VALUES ('024_late_copies') ON CONFLICT DO NOTHING;

COMMIT;
