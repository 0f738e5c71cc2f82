-- How a row's rank is read in SQL. The function that stores and projects in one commit, webhook_receive(), stood here; it is in
-- 024_late_copies.sql.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- Stripe's second (unix) in a rank: see kamiyo/projections.py.
CREATE OR REPLACE FUNCTION billing.second_of(rank bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT (rank & ((1::bigint << 56) - 1)) >> 14
$$;

-- Whether a rank is that of a deletion that did not carry the customer: see kamiyo/projections.py.
CREATE OR REPLACE FUNCTION billing.is_stub(rank bigint) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT rank >= (1::bigint << 56) AND rank & 1 = 0
$$;

INSERT INTO webhook_migrations (name) VALUES ('006_project_on_arrival') ON CONFLICT DO NOTHING;

COMMIT;
