-- The index by customer grows at one place, today, instead of everywhere. See docs/decisions/0032.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- The day of a moment, in UTC.
CREATE OR REPLACE FUNCTION webhook_day(moment timestamptz) RETURNS date LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT (moment AT TIME ZONE 'UTC')::date
$$;

-- The days from the ledger's first event to its last: who asks for a customer's events names them, so that each is one look into
-- the index. (PostgreSQL 18 sees by itself that it can; those before it would read the whole index.)
CREATE OR REPLACE FUNCTION webhook_days() RETURNS date[] LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT array_agg(day::date)
    FROM generate_series((SELECT webhook_day(min(created_at)) FROM webhook_events)::timestamp,
                         (SELECT webhook_day(max(created_at)) FROM webhook_events)::timestamp, interval '1 day') AS day
$$;

-- A customer's events. Newest first is ORDER BY webhook_day(created_at) DESC, created_at DESC, as the index has them.
CREATE OR REPLACE FUNCTION webhook_events_of(customer_id text) RETURNS SETOF webhook_events LANGUAGE sql STABLE PARALLEL SAFE AS $$
    -- A subquery, so that the days are looked up once.
    SELECT * FROM webhook_events
    WHERE customer = customer_id AND webhook_day(created_at) = ANY ((SELECT webhook_days())::date[])
$$;

DO $$
BEGIN
    IF pg_get_indexdef(to_regclass('webhook_events_customer')) NOT LIKE '%webhook_day%' THEN
        DROP INDEX webhook_events_customer;
    END IF;
END $$;
CREATE INDEX IF NOT EXISTS webhook_events_customer ON webhook_events (webhook_day(created_at), customer, created_at)
    WHERE customer IS NOT NULL;

INSERT INTO webhook_migrations (name) VALUES ('030_customers_by_day') ON CONFLICT DO NOTHING;

COMMIT;
