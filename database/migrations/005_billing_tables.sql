-- The billing tables: what Stripe last said of each customer, subscription, invoice and payment method.
--
-- A schema of their own, because nearly every application already has a table called customers. Columns carry
-- Stripe's own names. Nothing here refers to anything else by a foreign key: children arrive before parents.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- What is already here under these names, while this file has left no record, is someone else's.
DO $$
DECLARE
    foreign_table text;
BEGIN
    SELECT name INTO foreign_table
    FROM unnest(ARRAY['billing.customers', 'billing.subscriptions', 'billing.invoices', 'billing.payment_methods']) AS name
    WHERE to_regclass(name) IS NOT NULL
      AND NOT EXISTS (SELECT FROM webhook_migrations AS m WHERE m.name = '005_billing_tables');
    IF FOUND THEN
        RAISE EXCEPTION 'a table % is already here that Kamiyo did not make', foreign_table
            USING HINT = 'Rename it, or give Kamiyo a database or a schema (search_path) of its own. Nothing was changed.';
    END IF;
END $$;

CREATE SCHEMA IF NOT EXISTS billing;

-- The columns every table ends with:
--   last_webhook_event_id    the event that made the row what it is
--   last_webhook_updated_at  when that event was received here: the same again after a rebuild
--   last_event_rank          where that event stands in the object's life; a lower rank never overwrites it.
--                            How it is made up: kamiyo/projections.py
--   order_evidence           'decided'   the row is what Stripe last said
--                            'undecided' two events of the same second say different things and nothing in them
--                                        tells which is later: the row must be read from Stripe
CREATE TABLE IF NOT EXISTS billing.customers (
    id                      text        COLLATE "C" NOT NULL,
    account                 text        NOT NULL DEFAULT '',
    livemode                boolean     NOT NULL,
    email                   text,
    name                    text,
    phone                   text,
    description             text,
    currency                text,
    -- Credit (negative) or debt, in the smallest unit of currency.
    balance                 bigint,
    delinquent              boolean,
    default_payment_method  text,
    metadata                jsonb       NOT NULL DEFAULT '{}',
    created                 timestamptz,
    -- A deleted customer stays: invoices and accounts still speak of them.
    deleted_at              timestamptz,
    last_webhook_event_id   text        NOT NULL,
    last_webhook_updated_at timestamptz NOT NULL DEFAULT now(),
    last_event_rank         bigint      NOT NULL,
    order_evidence          text        NOT NULL DEFAULT 'decided' CHECK (order_evidence IN ('decided', 'undecided')),
    -- The id first, so that looking a row up by id alone is fast; account and mode, so that two never mix.
    PRIMARY KEY (id, account, livemode)
) WITH (fillfactor = 85);

CREATE TABLE IF NOT EXISTS billing.subscriptions (
    id                      text        COLLATE "C" NOT NULL,
    account                 text        NOT NULL DEFAULT '',
    livemode                boolean     NOT NULL,
    customer                text        COLLATE "C",
    status                  text,
    currency                text,
    -- Of the first item; all of them are in items.
    price                   text,
    quantity                bigint,
    items                   jsonb       NOT NULL DEFAULT '[]',
    current_period_start    timestamptz,
    current_period_end      timestamptz,
    cancel_at_period_end    boolean,
    cancel_at               timestamptz,
    canceled_at             timestamptz,
    ended_at                timestamptz,
    trial_start             timestamptz,
    trial_end               timestamptz,
    default_payment_method  text,
    latest_invoice          text,
    collection_method       text,
    metadata                jsonb       NOT NULL DEFAULT '{}',
    created                 timestamptz,
    last_webhook_event_id   text        NOT NULL,
    last_webhook_updated_at timestamptz NOT NULL DEFAULT now(),
    last_event_rank         bigint      NOT NULL,
    order_evidence          text        NOT NULL DEFAULT 'decided' CHECK (order_evidence IN ('decided', 'undecided')),
    PRIMARY KEY (id, account, livemode)
) WITH (fillfactor = 85);
CREATE INDEX IF NOT EXISTS subscriptions_customer ON billing.subscriptions (customer);

CREATE TABLE IF NOT EXISTS billing.invoices (
    id                      text        COLLATE "C" NOT NULL,
    account                 text        NOT NULL DEFAULT '',
    livemode                boolean     NOT NULL,
    customer                text        COLLATE "C",
    subscription            text        COLLATE "C",
    number                  text,
    status                  text,
    currency                text,
    -- Amounts in the smallest unit of currency.
    amount_due              bigint,
    amount_paid             bigint,
    amount_remaining        bigint,
    subtotal                bigint,
    total                   bigint,
    attempt_count           bigint,
    billing_reason          text,
    collection_method       text,
    due_date                timestamptz,
    period_start            timestamptz,
    period_end              timestamptz,
    paid_at                 timestamptz,
    hosted_invoice_url      text,
    invoice_pdf             text,
    metadata                jsonb       NOT NULL DEFAULT '{}',
    created                 timestamptz,
    -- Only drafts can be deleted.
    deleted_at              timestamptz,
    last_webhook_event_id   text        NOT NULL,
    last_webhook_updated_at timestamptz NOT NULL DEFAULT now(),
    last_event_rank         bigint      NOT NULL,
    order_evidence          text        NOT NULL DEFAULT 'decided' CHECK (order_evidence IN ('decided', 'undecided')),
    PRIMARY KEY (id, account, livemode)
) WITH (fillfactor = 85);
CREATE INDEX IF NOT EXISTS invoices_customer ON billing.invoices (customer);
CREATE INDEX IF NOT EXISTS invoices_subscription ON billing.invoices (subscription);

CREATE TABLE IF NOT EXISTS billing.payment_methods (
    id                      text        COLLATE "C" NOT NULL,
    account                 text        NOT NULL DEFAULT '',
    livemode                boolean     NOT NULL,
    -- Null once detached: it is no longer its customer's.
    customer                text        COLLATE "C",
    type                    text,
    brand                   text,
    last4                   text,
    exp_month               bigint,
    exp_year                bigint,
    funding                 text,
    country                 text,
    fingerprint             text,
    metadata                jsonb       NOT NULL DEFAULT '{}',
    created                 timestamptz,
    detached_at             timestamptz,
    last_webhook_event_id   text        NOT NULL,
    last_webhook_updated_at timestamptz NOT NULL DEFAULT now(),
    last_event_rank         bigint      NOT NULL,
    order_evidence          text        NOT NULL DEFAULT 'decided' CHECK (order_evidence IN ('decided', 'undecided')),
    PRIMARY KEY (id, account, livemode)
) WITH (fillfactor = 85);
CREATE INDEX IF NOT EXISTS payment_methods_customer ON billing.payment_methods (customer);

-- Rows that wait for a read from Stripe; nearly always none.
CREATE INDEX IF NOT EXISTS customers_undecided ON billing.customers (id) WHERE order_evidence = 'undecided';
CREATE INDEX IF NOT EXISTS subscriptions_undecided ON billing.subscriptions (id) WHERE order_evidence = 'undecided';
CREATE INDEX IF NOT EXISTS invoices_undecided ON billing.invoices (id) WHERE order_evidence = 'undecided';
CREATE INDEX IF NOT EXISTS payment_methods_undecided ON billing.payment_methods (id)
    WHERE order_evidence = 'undecided';

-- One row as an event tells it, for handing whole sets to a statement: times as unix seconds, JSON as text.
DO $$
BEGIN
    IF to_regtype('billing.customers_row') IS NULL THEN
        CREATE TYPE billing.customers_row AS (
            id text, account text, livemode boolean, email text, name text, phone text, description text, currency
            text, balance bigint, delinquent boolean, default_payment_method text, metadata text, created bigint,
            deleted_at bigint, event_id text, received_at timestamptz, rank bigint, evidence text
        );
    END IF;
    IF to_regtype('billing.subscriptions_row') IS NULL THEN
        CREATE TYPE billing.subscriptions_row AS (
            id text, account text, livemode boolean, customer text, status text, currency text, price text,
            quantity bigint, items text, current_period_start bigint, current_period_end bigint,
            cancel_at_period_end boolean, cancel_at bigint, canceled_at bigint, ended_at bigint, trial_start
            bigint, trial_end bigint, default_payment_method text, latest_invoice text, collection_method text,
            metadata text, created bigint, event_id text, received_at timestamptz, rank bigint, evidence text
        );
    END IF;
    IF to_regtype('billing.invoices_row') IS NULL THEN
        CREATE TYPE billing.invoices_row AS (
            id text, account text, livemode boolean, customer text, subscription text, number text, status text,
            currency text, amount_due bigint, amount_paid bigint, amount_remaining bigint, subtotal bigint, total
            bigint, attempt_count bigint, billing_reason text, collection_method text, due_date bigint,
            period_start bigint, period_end bigint, paid_at bigint, hosted_invoice_url text, invoice_pdf text,
            metadata text, created bigint, deleted_at bigint, event_id text, received_at timestamptz, rank bigint,
            evidence text
        );
    END IF;
    IF to_regtype('billing.payment_methods_row') IS NULL THEN
        CREATE TYPE billing.payment_methods_row AS (
            id text, account text, livemode boolean, customer text, type text, brand text, last4 text, exp_month
            bigint, exp_year bigint, funding text, country text, fingerprint text, metadata text, created bigint,
            detached_at bigint, event_id text, received_at timestamptz, rank bigint, evidence text
        );
    END IF;
END $$;

INSERT INTO webhook_migrations (name) VALUES ('005_billing_tables') ON CONFLICT DO NOTHING;

COMMIT;
