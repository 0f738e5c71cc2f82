-- A claim passes over the customers of rows that somebody holds. See docs/decisions/0034.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- A worker's turn begins with one call: let go of the last turn's lanes, lock the lanes of what is due, take the events. A
-- function, because each of its statements sees what was committed before it began: what the last holder of a lane left behind
-- shows only to a statement that begins after the lane was locked.
--
-- Takes up to `most` due events, oldest first, under a claim number of their own, and holds their lanes (advisory locks of
-- class 1800432) on this session. Lanes that another worker holds are passed over, so that a busy customer never keeps the
-- others waiting. An event found in 'processing' was abandoned: its worker died. started_at stays until that death is
-- recorded, should this worker die before it has done so.
--
-- An event that is alone in its claim and runs alone (`handled`: types with a handler; or a suspect) has its try counted
-- here, before it begins: should it take the process down, the try has counted.
--
-- Where nothing could be taken, one row says in how many seconds the next event is due; null: nothing waits.
--
-- Looks from `since` on only. What is finished leaves dead entries at the front of the queue until a vacuum takes them away, and
-- a look from the beginning passes them all: of a backlog of a million, hundreds of thousands, for each claim. `first_due`: the
-- oldest due event that this look saw, now where it saw none. A later look may begin there, for as long as its caller can stand
-- that it does not see what was noted late: by a transaction that began before that moment and ends after this look.
--
-- A row that somebody holds, as a person does who has a transaction open in psql, is not waited for. Its customer is left out, so
-- that no later event of theirs overtakes it. Where that leaves nothing, the claim looks further behind, past a thousand events.
DROP FUNCTION IF EXISTS webhook_claim(integer, text[]);
CREATE OR REPLACE FUNCTION webhook_claim(most integer, handled text[], since timestamptz DEFAULT '-infinity') RETURNS TABLE (
    claim bigint, due_in float8, first_due timestamptz, seq bigint, created_at timestamptz, event_id text, event_type text,
    stripe_created bigint, livemode boolean, thin boolean, account text, context text, api_version text,
    object_type text, object_id text, customer text, snapshot_event text, lane integer, attempts smallint,
    suspect boolean, abandoned boolean, was_running boolean, started boolean, body bytea
)
LANGUAGE plpgsql
-- Planned once in a session, and right however large the tables grow: every look-up is by its index.
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    seen   integer;
    -- The events whose lanes this session got, and, one for one, their lanes.
    held   text[];
    lanes  integer[];
    -- Lanes in which nothing can be had now.
    apart  integer[] := '{}';
    number bigint;
    taken  integer;
    first  timestamptz;
BEGIN
    PERFORM pg_advisory_unlock_all();

    WITH due AS MATERIALIZED (
        SELECT e.event_id, e.lane, e.next_try_at FROM webhook_unfinished AS e
        WHERE e.next_try_at >= since AND e.next_try_at <= now() ORDER BY e.next_try_at, e.seq LIMIT most
    ), mine AS MATERIALIZED (
        SELECT l.lane FROM (SELECT DISTINCT d.lane FROM due AS d) AS l WHERE pg_try_advisory_lock(1800432, l.lane)
    )
    SELECT count(*), coalesce(min(d.next_try_at), now()),
           array_agg(d.event_id) FILTER (WHERE d.lane IN (SELECT m.lane FROM mine AS m)),
           array_agg(d.lane) FILTER (WHERE d.lane IN (SELECT m.lane FROM mine AS m))
    INTO seen, first, held, lanes FROM due AS d;

    LOOP
        -- The head of the line is another worker's, or nothing of it can be had: look behind it. Not in the first place, because
        -- reading the table of locks holds up everyone who takes one.
        IF seen = most AND cardinality(coalesce(held, '{}')) < seen THEN
            -- So that each lane is held once, and those that are passed over are not.
            PERFORM pg_advisory_unlock_all();
            WITH theirs AS MATERIALIZED (
                SELECT objid::bigint::integer AS lane FROM pg_locks
                WHERE locktype = 'advisory' AND classid = 1800432 AND objsubid = 2 AND pid <> pg_backend_pid()
                  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
            ), due AS MATERIALIZED (
                SELECT e.event_id, e.lane FROM webhook_unfinished AS e
                WHERE e.next_try_at >= since AND e.next_try_at <= now() AND e.lane NOT IN (SELECT t.lane FROM theirs AS t)
                  AND e.lane NOT IN (SELECT a.lane FROM unnest(apart) AS a (lane))
                ORDER BY e.next_try_at, e.seq LIMIT most
            ), mine AS MATERIALIZED (
                SELECT l.lane FROM (SELECT DISTINCT d.lane FROM due AS d) AS l WHERE pg_try_advisory_lock(1800432, l.lane)
            )
            SELECT count(*), array_agg(d.event_id) FILTER (WHERE d.lane IN (SELECT m.lane FROM mine AS m)),
                   array_agg(d.lane) FILTER (WHERE d.lane IN (SELECT m.lane FROM mine AS m))
            INTO seen, held, lanes FROM due AS d;
        END IF;
        EXIT WHEN held IS NULL;

        number := coalesce(number, nextval('webhook_claims'));
        RETURN QUERY
        WITH had AS MATERIALIZED (
            SELECT e.event_id, e.lane, e.status, e.next_try_at, e.started_at, e.suspect, e.event_type FROM webhook_events AS e
            WHERE e.event_id = ANY (held) FOR NO KEY UPDATE SKIP LOCKED
        ), found AS MATERIALIZED (
            SELECT h.event_id, h.status = 'processing' AS abandoned, h.started_at IS NOT NULL AS was_running,
                   cardinality(held) = 1 AND NOT (h.status = 'processing' AND h.started_at IS NOT NULL)
                       AND (h.suspect OR h.status = 'processing' OR h.event_type = ANY (handled)) AS starts
            FROM had AS h
            -- Its last holder may have settled it, or moved it: then it is in a lane that somebody else may hold.
            WHERE h.next_try_at <= now() AND h.lane = ANY (lanes)
              AND h.lane NOT IN (SELECT u.lane FROM unnest(held, lanes) AS u (event_id, lane)
                                 WHERE u.event_id NOT IN (SELECT h.event_id FROM had AS h))
        ), claimed AS (
            UPDATE webhook_events AS e
            SET status = 'processing', claim = number, failed_at = NULL, suspect = e.suspect OR f.abandoned,
                attempts = e.attempts + f.starts::int,
                started_at = CASE WHEN f.starts THEN clock_timestamp() ELSE e.started_at END
            FROM found AS f WHERE e.event_id = f.event_id
            RETURNING e.*, f.abandoned, f.was_running, f.starts
        )
        SELECT number, NULL::float8, first, c.seq, c.created_at, c.event_id, c.event_type,
               extract(epoch FROM c.stripe_created)::bigint, c.livemode, c.thin, c.account, c.context, c.api_version,
               c.object_type, c.object_id, c.customer, c.snapshot_event, c.lane, (c.attempts - c.starts::int)::smallint,
               c.suspect, c.abandoned, c.abandoned AND c.was_running, c.starts,
               -- A subquery, so that each body is looked up by its key in the one partition that has it.
               (SELECT p.body FROM webhook_payloads AS p WHERE p.seq = c.seq AND p.created_at = c.created_at)
        -- Put in order before they have their bodies, which are a lot to carry.
        FROM (SELECT * FROM claimed ORDER BY stripe_created, seq) AS c;
        GET DIAGNOSTICS taken = ROW_COUNT;
        IF taken > 0 THEN
            IF taken < cardinality(held) THEN
                -- The customers that are left out are not to wait until this turn is over.
                PERFORM pg_advisory_unlock(1800432, l.lane) FROM (
                    SELECT u.lane FROM unnest(lanes) AS u (lane)
                    EXCEPT SELECT e.lane FROM webhook_events AS e WHERE e.event_id = ANY (held) AND e.claim = number
                ) AS l;
            END IF;
            RETURN;
        END IF;
        apart := apart || lanes;
        EXIT WHEN seen < most OR cardinality(apart) >= 1000;
        held := NULL;
    END LOOP;
    -- Who takes nothing holds nothing: whatever made the lanes seem due is over.
    PERFORM pg_advisory_unlock_all();
    RETURN QUERY
    SELECT 0::bigint, extract(epoch FROM min(e.next_try_at) - now())::float8, first, NULL::bigint, NULL::timestamptz,
           NULL, NULL, NULL::bigint, NULL::boolean, NULL::boolean, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
           NULL::integer, NULL::smallint, NULL::boolean, NULL::boolean, NULL::boolean, NULL::boolean, NULL::bytea
    FROM webhook_unfinished AS e WHERE e.next_try_at >= since;
END $$;

INSERT INTO webhook_migrations (name) VALUES ('032_claim_passes_held_rows') ON CONFLICT DO NOTHING;

COMMIT;
