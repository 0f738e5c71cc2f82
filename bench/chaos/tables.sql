-- What the harness writes down, in a schema of its own. Judged by judge.sql.
CREATE SCHEMA chaos;

-- Every run of a handler, marked by a connection of its own: a mark outlives the transaction it speaks of. Both times
-- are taken inside the run, so what lies between them is the least that it took.
CREATE TABLE chaos.runs (
    id            bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id      text        NOT NULL,
    owner         text        NOT NULL,
    attempt       integer     NOT NULL,
    -- The session, and its transaction, in which the run's effects are to commit.
    backend       integer     NOT NULL,
    backend_since timestamptz,
    transaction   timestamptz,
    started_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Null: the run never came to its end. Nobody can then say when it was over, so PostgreSQL is asked when the next
    -- one begins: it was over at the latest when the transaction was that it ran in.
    ended_at      timestamptz,
    -- Runs of the same owner that had no end, and whose transaction was still open, when this one began.
    beside        bigint[]
);
CREATE INDEX ON chaos.runs (owner) WHERE ended_at IS NULL;

-- The ledger of credits: what a handler does, in the transaction in which the event is settled. No key on the event:
-- an effect that happens twice must be able to.
CREATE TABLE chaos.ledger (
    id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id   text        NOT NULL,
    owner      text        NOT NULL,
    run        bigint      NOT NULL,
    claim      bigint,
    superseded boolean     NOT NULL,
    at         timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX ON chaos.ledger (event_id);

-- The same as balances: read, added to, written, as applications do it.
CREATE TABLE chaos.accounts (owner text PRIMARY KEY, credits bigint NOT NULL);

-- Every change of an event's state, written by the transaction that makes it.
CREATE TABLE chaos.history (
    id       bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id text        NOT NULL,
    was      text,
    became   text        NOT NULL,
    claim    bigint,
    attempts integer     NOT NULL,
    at       timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE FUNCTION chaos.remember_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos.history (event_id, became, claim, attempts) SELECT event_id, status, claim, attempts FROM came;
    RETURN NULL;
END $$;

CREATE FUNCTION chaos.remember_update() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos.history (event_id, was, became, claim, attempts)
    SELECT event_id, went.status, came.status, came.claim, came.attempts
    FROM came JOIN went USING (event_id)
    WHERE (came.status, came.claim) IS DISTINCT FROM (went.status, went.claim);
    RETURN NULL;
END $$;

CREATE TRIGGER chaos_remember_insert AFTER INSERT ON webhook_events
    REFERENCING NEW TABLE AS came FOR EACH STATEMENT EXECUTE FUNCTION chaos.remember_insert();
CREATE TRIGGER chaos_remember_update AFTER UPDATE ON webhook_events
    REFERENCING NEW TABLE AS came OLD TABLE AS went FOR EACH STATEMENT EXECUTE FUNCTION chaos.remember_update();

-- Every time a billing row went back in time, for however short a while.
CREATE TABLE chaos.regressions (
    place      text        NOT NULL,
    object_id  text        NOT NULL,
    from_event text        NOT NULL,
    to_event   text        NOT NULL,
    at         timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE FUNCTION chaos.remember_regression() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos.regressions (place, object_id, from_event, to_event)
    VALUES (TG_TABLE_NAME, NEW.id, OLD.last_webhook_event_id, NEW.last_webhook_event_id);
    RETURN NULL;
END $$;

DO $$
DECLARE
    place text;
BEGIN
    FOREACH place IN ARRAY ARRAY['customers', 'subscriptions', 'invoices', 'payment_methods'] LOOP
        EXECUTE format(
            'CREATE TRIGGER chaos_remember_regression AFTER UPDATE ON billing.%I FOR EACH ROW '
            'WHEN (NEW.last_event_rank < OLD.last_event_rank) EXECUTE FUNCTION chaos.remember_regression()', place);
        -- What Stripe says, filled in at the end.
        EXECUTE format('CREATE TABLE chaos.%I (LIKE billing.%I)', place, place);
        EXECUTE format(
            'ALTER TABLE chaos.%I DROP COLUMN last_webhook_event_id, DROP COLUMN last_webhook_updated_at, '
            'DROP COLUMN last_event_rank, DROP COLUMN order_evidence', place);
    END LOOP;
END $$;

-- What was sent, filled in at the end. `answered`: how many deliveries of it were answered 2xx. `handled`: a user's
-- handler is registered for it. `tries`: how many failed tries must be recorded; null for what must be processed.
CREATE TABLE chaos.sent (
    event_id   text    PRIMARY KEY,
    event_type text    NOT NULL,
    owner      text    NOT NULL,
    body       text    NOT NULL,   -- its MD5
    handled    boolean NOT NULL,
    fate       text    NOT NULL,
    tries      integer,
    answered   integer NOT NULL,
    last_status text   NOT NULL
);
