-- Asking Stripe: how much, and how far we are.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- What is already here under these names, while this file has left no record, is someone else's.
DO $$
DECLARE
    foreign_table text;
BEGIN
    SELECT name INTO foreign_table
    FROM unnest(ARRAY['webhook_api_budget', 'webhook_reconciliation']) AS name
    WHERE to_regclass(name) IS NOT NULL
      AND NOT EXISTS (SELECT FROM webhook_migrations AS m WHERE m.name = '009_reconcile');
    IF FOUND THEN
        RAISE EXCEPTION 'a table % is already here that Kamiyo did not make', foreign_table
            USING HINT = 'Rename it, or give Kamiyo a database or a schema (search_path) of its own. Nothing was changed.';
    END IF;
END $$;

-- One token bucket for all processes, so that together they stay within what Stripe allows an account. One row.
CREATE TABLE IF NOT EXISTS webhook_api_budget (
    only_row     boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    tokens       float8      NOT NULL DEFAULT 1,
    filled_at    timestamptz NOT NULL DEFAULT now(),
    -- Stripe said "too much", or did not answer: nobody asks before this moment.
    open_until   timestamptz,
    -- How often in a row; each doubles the pause.
    refusals     integer     NOT NULL DEFAULT 0
);
INSERT INTO webhook_api_budget DEFAULT VALUES ON CONFLICT DO NOTHING;

-- How far the comparison with Stripe's own list of events has come. One row.
CREATE TABLE IF NOT EXISTS webhook_reconciliation (
    only_row    boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    -- Everything Stripe created before this second has been compared; null: never yet.
    compared_to timestamptz,
    started_at  timestamptz,
    finished_at timestamptz,
    -- Events of the last complete comparison that should have been delivered, and were not.
    missed      integer     NOT NULL DEFAULT 0
);
INSERT INTO webhook_reconciliation DEFAULT VALUES ON CONFLICT DO NOTHING;

INSERT INTO webhook_migrations (name) VALUES ('009_reconcile') ON CONFLICT DO NOTHING;

COMMIT;
