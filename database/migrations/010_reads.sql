-- What Stripe's API said of an object, kept beside the events. In this version nothing asks for objects yet; the rebuild
-- and the ties already count with what is kept here.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- What is already here under these names, while this file has left no record, is someone else's.
DO $$
DECLARE
    foreign_table text;
BEGIN
    SELECT name INTO foreign_table
    FROM unnest(ARRAY['webhook_reads']) AS name
    WHERE to_regclass(name) IS NOT NULL
      AND NOT EXISTS (SELECT FROM webhook_migrations AS m WHERE m.name = '010_reads');
    IF FOUND THEN
        RAISE EXCEPTION 'a table % is already here that Kamiyo did not make', foreign_table
            USING HINT = 'Rename it, or give Kamiyo a database or a schema (search_path) of its own. Nothing was changed.';
    END IF;
END $$;

-- Objects as Stripe's API gave them: the latest of each that showed it, and the latest that found it gone. With the
-- events they are all that the billing tables are made of, so that these can be made again without asking Stripe.
CREATE TABLE IF NOT EXISTS webhook_reads (
    object_id     text        COLLATE "C" NOT NULL,
    account       text        COLLATE "C" NOT NULL DEFAULT '',
    livemode      boolean     NOT NULL,
    -- Stripe answered that the object is deleted, or that there is none (404).
    gone          boolean     NOT NULL,
    object_type   text        NOT NULL,
    -- Stripe's second in which the request began, or before: what happened earlier is in the body.
    stripe_second timestamptz NOT NULL,
    -- Until which of Stripe's seconds it was asked again, and had nothing that ranks higher.
    asked_to      timestamptz NOT NULL,
    -- When the object's life ended, where an event has told: a deletion, a detachment. The body does not say when.
    ended         timestamptz,
    -- Its place among the events of its object: see kamiyo/projections.py.
    rank          bigint      NOT NULL,
    -- The event that led to it; 'backfill' or 'audit' where none did.
    source        text        NOT NULL,
    -- Exactly as received; empty for a 404.
    body          bytea       NOT NULL,
    read_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (object_id, account, livemode, gone)
);

INSERT INTO webhook_migrations (name) VALUES ('010_reads') ON CONFLICT DO NOTHING;

COMMIT;
