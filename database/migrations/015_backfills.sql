-- Filling the billing tables from Stripe's lists: how far each list has been gone through.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- What is already here under these names, while this file has left no record, is someone else's.
DO $$
DECLARE
    foreign_table text;
BEGIN
    SELECT name INTO foreign_table
    FROM unnest(ARRAY['webhook_backfills']) AS name
    WHERE to_regclass(name) IS NOT NULL
      AND NOT EXISTS (SELECT FROM webhook_migrations AS m WHERE m.name = '015_backfills');
    IF FOUND THEN
        RAISE EXCEPTION 'a table % is already here that Kamiyo did not make', foreign_table
            USING HINT = 'Rename it, or give Kamiyo a database or a schema (search_path) of its own. Nothing was changed.';
    END IF;
END $$;

-- One row for each of Stripe's lists that was ever gone through.
CREATE TABLE IF NOT EXISTS webhook_backfills (
    account     text        COLLATE "C" NOT NULL DEFAULT '',
    livemode    boolean     NOT NULL,
    -- The billing table that is filled.
    collection  text        NOT NULL,
    -- Whoever works on it. A later run takes it over; the earlier one notices at its next page.
    run         uuid        NOT NULL,
    started_at  timestamptz NOT NULL DEFAULT now(),
    page_at     timestamptz,
    finished_at timestamptz,
    -- Lists are newest first: everything that was created at Stripe after this second is in. Not an object's id, for an
    -- object may be deleted before somebody goes on behind it. Null: nothing yet.
    filled_from timestamptz,
    objects     bigint      NOT NULL DEFAULT 0,
    PRIMARY KEY (account, livemode, collection),
    CONSTRAINT webhook_backfills_collection_known
        CHECK (collection IN ('customers', 'subscriptions', 'invoices', 'payment_methods'))
);

INSERT INTO webhook_migrations (name) VALUES ('015_backfills') ON CONFLICT DO NOTHING;

COMMIT;
