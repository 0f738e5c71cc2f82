-- The latest state of every object that events show, for those who want more of Stripe in SQL than the four tables of
-- `billing`. Empty unless KAMIYO_MIRROR says what to keep.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- What is already here under these names, while this file has left no record, is someone else's.
DO $$
DECLARE
    foreign_table text;
BEGIN
    SELECT name INTO foreign_table
    FROM unnest(ARRAY['stripe_objects']) AS name
    WHERE to_regclass(name) IS NOT NULL
      AND NOT EXISTS (SELECT FROM webhook_migrations AS m WHERE m.name = '014_mirror');
    IF FOUND THEN
        RAISE EXCEPTION 'a table % is already here that Kamiyo did not make', foreign_table
            USING HINT = 'Rename it, or give Kamiyo a database or a schema (search_path) of its own. Nothing was changed.';
    END IF;
END $$;

CREATE TABLE IF NOT EXISTS stripe_objects (
    -- Stripe's id. Of an object that has none, its customer's; of one that an account has only one of (its balance), ''.
    id                    text        COLLATE "C" NOT NULL,
    -- What Stripe writes under "object": charge, refund, checkout.session…
    object                text        COLLATE "C" NOT NULL,
    account               text        NOT NULL DEFAULT '',
    livemode              boolean     NOT NULL,
    -- The object as Stripe last showed it, in the wording of api_version. jsonb holds no \u0000: there is U+FFFD instead.
    data                  jsonb       NOT NULL,
    api_version           text,
    -- When Stripe says that the object was created.
    created               timestamptz,
    -- Stripe has said that it is gone: its data is what it was before, where Stripe had ever told.
    deleted               boolean     NOT NULL
        GENERATED ALWAYS AS (deletion_rank IS NOT NULL AND deletion_rank >= last_event_rank) STORED,
    -- The event that data is from, and when that was received here: the same again after a rebuild.
    last_webhook_event_id text        NOT NULL,
    updated_at            timestamptz NOT NULL,
    -- Where that event stands in the object's life; a lower rank never overwrites it. Zero: a deletion that told nothing
    -- but the id. How it is made up: kamiyo/mirror.py.
    last_event_rank       bigint      NOT NULL,
    -- Where a deletion was told: up to which rank it holds. The highest there is, where none can follow.
    deletion_rank         bigint,
    -- 'undecided': two events of one second show different things, and nothing in them tells which is later.
    order_evidence        text        NOT NULL DEFAULT 'decided' CHECK (order_evidence IN ('decided', 'undecided')),
    -- The id first, so that looking an object up by id alone is fast.
    PRIMARY KEY (id, object, account, livemode)
);

-- All refunds of a month.
CREATE INDEX IF NOT EXISTS stripe_objects_object ON stripe_objects (object, created);

INSERT INTO webhook_migrations (name) VALUES ('014_mirror') ON CONFLICT DO NOTHING;

COMMIT;
