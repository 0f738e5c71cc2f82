"""A worker's turn: projection, handlers and settling commit together, and each event ends as it deserves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta

import asyncpg
import pytest

from kamiyo import inbox
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Bury, Registry, Retry
from kamiyo.inbox import Filters
from kamiyo.turn import MOST_HANDLED_TOGETHER
from tests.conftest import DEADLINE, event_json
from tests.turns import NOW, billing, due_now, example, failures_of, put, row_of, statuses, work_off
from tests.worker.conftest import MakeWorker, effects, leave_effect, of, together

# ── In one transaction ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_handler_finds_the_billing_row_already_true(
    db: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    seen = []

    @own.on("customer.created")
    async def look(event: Event, db: Connection) -> None:
        seen.append(await db.fetchval("SELECT name FROM billing.customers WHERE id = $1", event.object_id))

    await put(db, event_json("evt_1", "customer.created", example("customer", id="cus_1", name="Ada")))
    await work_off(await make_worker(), db)
    assert seen == ["Ada"]
    assert (await row_of(db, "evt_1"))["outcome"] == "handled"


async def test_nobody_sees_a_handlers_effect_before_its_event_is_processed(
    shop: Connection, other: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    seen = []

    @own.on("invoice.paid")
    async def work(event: Event, db: Connection) -> None:
        await leave_effect(event, db)
        seen.append((await effects(other), (await row_of(other, event.id))["status"]))

    await put(shop, of("cus_1", "evt_1"))
    await work_off(await make_worker(), shop)
    assert seen == [({}, "processing")]
    assert (await effects(other), (await row_of(other, "evt_1"))["status"]) == ({"evt_1": 1}, "processed")


@pytest.fixture
async def refuses_to_settle(shop: Connection) -> AsyncIterator[None]:
    """The database refuses to call `evt_cursed` processed: the worst moment for a failure."""
    await shop.execute(
        """
        CREATE FUNCTION shop.refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'not this one'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON webhook_events FOR EACH ROW
            WHEN (new.status = 'processed' AND new.event_id = 'evt_cursed') EXECUTE FUNCTION shop.refuse();
        """
    )
    yield
    await shop.execute("DROP TRIGGER refuse ON webhook_events")


@pytest.mark.usefixtures("refuses_to_settle")
async def test_when_settling_fails_the_handlers_effect_is_gone_and_the_neighbours_is_there_once(
    shop: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    own.on("customer.updated")(leave_effect)
    for name in ("1", "cursed", "2"):
        await put(
            shop,
            event_json(f"evt_{name}", "customer.updated", example("customer", id=f"cus_{name}", name=name)),
        )

    assert await (await make_worker()).run_once(shop) == 3

    assert await effects(shop) == {"evt_1": 1, "evt_2": 1}
    assert await statuses(shop) == {"evt_1": "processed", "evt_2": "processed", "evt_cursed": "failed"}
    [failure] = await failures_of(shop, "evt_cursed")
    assert "not this one" in failure["error_message"]
    # What Stripe said is true, whatever became of the handler.
    assert (await billing(shop))["customers", "cus_cursed"]["name"] == "cursed"


async def test_two_handlers_of_one_event_leave_both_effects_or_none(
    shop: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    broken = True
    own.on("invoice.paid")(leave_effect)

    @own.on("invoice.paid")
    async def second(event: Event, db: Connection) -> None:
        await leave_effect(event, db)
        if broken:
            raise ValueError("no")

    worker = await make_worker()
    await put(shop, of("cus_1", "evt_1"))
    await worker.run_once(shop)
    assert await effects(shop) == {}
    broken = False
    await due_now(shop)
    await worker.run_once(shop)
    assert await effects(shop) == {"evt_1": 2}


async def test_a_second_handler_may_take_as_long_as_the_first_before_the_session_counts_as_idle(
    db: Connection, other: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    # PostgreSQL ends a session that has been silent for longer than a handler may take, and a margin.
    await other.execute("SET idle_in_transaction_session_timeout = '1.4s'")

    for _ in range(4):

        @own.on("invoice.paid")
        async def calls_somebody(event: Event, db: Connection) -> None:
            await asyncio.sleep(0.4)

    await put(db, of("cus_1", "evt_1"))
    await (await make_worker()).run_once(other)
    assert await statuses(db) == {"evt_1": "processed"}


async def test_a_transaction_holds_no_more_savepoints_than_postgresql_keeps_in_memory(
    shop: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    own.on("invoice.paid")(leave_effect)
    await put(shop, *(of(f"cus_{n}", f"evt_{n}") for n in range(120)))
    assert await (await make_worker()).run_once(shop) == 120
    sizes = [len(one) for one in await together(shop)]
    assert sum(sizes) == 120
    assert max(sizes) <= MOST_HANDLED_TOGETHER < 64


# ── How a handler can end ───────────────────────────────────────────────────────────────────────────────────


async def _retry_in_a_minute(event: Event, db: Connection) -> None:
    raise Retry(after=60, reason="the shop is closed")


async def _retry_in_an_hour(event: Event, db: Connection) -> None:
    raise Retry(after=timedelta(hours=1))


async def _bury(event: Event, db: Connection) -> None:
    raise Bury("this customer is imaginary")


async def _raise(event: Event, db: Connection) -> None:
    raise ValueError("no such plan")


async def _exit(event: Event, db: Connection) -> None:
    raise SystemExit(3)


async def _wait_for_ever(event: Event, db: Connection) -> None:
    await asyncio.Event().wait()


async def _query_for_ever(event: Event, db: Connection) -> None:
    await db.execute("SELECT pg_sleep(3600)")


async def _raise_a_timeout(event: Event, db: Connection) -> None:
    raise TimeoutError("of its own")


async def _bad_sql(event: Event, db: Connection) -> None:
    await db.execute("SELECT 1 / 0")


async def _swallowed_sql(event: Event, db: Connection) -> None:
    with contextlib.suppress(asyncpg.DivisionByZeroError):  # the transaction is broken all the same
        await db.execute("SELECT 1 / 0")


async def _commits(event: Event, db: Connection) -> None:
    await db.execute("COMMIT")


async def _rolls_back(event: Event, db: Connection) -> None:
    await db.execute("ROLLBACK")


_ENDS: dict[str, tuple[Callable[[Event, Connection], Awaitable[None]], str, tuple[float, float] | None]] = {
    # how it ends: the handler, what is kept of it, and in how many seconds it is tried again
    "Retry(60)": (_retry_in_a_minute, "Retry: the shop is closed", (60, 60)),
    "Retry(1 h)": (_retry_in_an_hour, "Retry: the handler asked for another try", (3600, 3600)),
    "Bury": (_bury, "Bury: this customer is imaginary", None),
    "an error": (_raise, "ValueError: no such plan", (8, 12)),
    "SystemExit": (_exit, "SystemExit: 3", (8, 12)),
    "waiting too long": (_wait_for_ever, "HandlerTimeout: took longer than 1 s", (8, 12)),
    "asking too long": (_query_for_ever, "HandlerTimeout: took longer than 1 s", (8, 12)),
    "a timeout of its own": (_raise_a_timeout, "TimeoutError: of its own", (8, 12)),
    "bad SQL": (_bad_sql, "asyncpg.exceptions.DivisionByZeroError: division by zero", (8, 12)),
    "swallowed SQL error": (
        _swallowed_sql,
        "asyncpg.exceptions.InFailedSQLTransactionError: current transaction is aborted, "
        "commands ignored until end of transaction block",
        (8, 12),
    ),
}


@pytest.mark.parametrize("end", _ENDS)
async def test_a_handler_that_ends_badly_fails_its_own_event_and_no_other(
    end: str, shop: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    ends_badly, kept, tried_again_in = _ENDS[end]
    own.on("customer.updated")(leave_effect)

    @own.on("customer.updated")
    async def handler(event: Event, db: Connection) -> None:
        if event.id == "evt_bad":
            await ends_badly(event, db)

    for name in ("1", "bad", "2"):
        await put(
            shop,
            event_json(f"evt_{name}", "customer.updated", example("customer", id=f"cus_{name}", name=name)),
        )
    # Only where it is to be over soon: a busy machine may be slow with the neighbours' handlers as well.
    limit = 1 if "too long" in end else DEADLINE
    worker = await make_worker(KAMIYO_FIRST_RETRY_DELAY=10, KAMIYO_HANDLER_TIMEOUT=limit)

    assert await worker.run_once(shop) == 3

    assert await effects(shop) == {"evt_1": 1, "evt_2": 1}
    assert await statuses(shop) == {"evt_1": "processed", "evt_2": "processed", "evt_bad": "failed"}
    [failure] = await failures_of(shop, "evt_bad")
    error_type, message = kept.split(": ", 1)
    assert failure["error_type"] == error_type
    assert message in failure["error_message"]
    assert failure["retry_count"] == 1
    event = await row_of(shop, "evt_bad")
    assert (event["attempts"], event["next_try_at"]) == (1, failure["next_try_at"])
    if tried_again_in is None:
        assert event["next_try_at"] is None
    else:
        wait = (event["next_try_at"] - event["failed_at"]).total_seconds()
        assert tried_again_in[0] - 0.5 <= wait <= tried_again_in[1] + 0.5
    # What Stripe said is true, whatever became of the handler.
    assert {row["name"] for row in (await billing(shop)).values()} == {"1", "bad", "2"}


@pytest.mark.parametrize("ends", [_commits, _rolls_back])
async def test_a_handler_that_ends_the_transaction_fails_its_event_and_loses_no_other(
    ends: Callable[[Event, Connection], Awaitable[None]],
    shop: Connection,
    own: Registry,
    make_worker: MakeWorker,
) -> None:
    own.on("customer.updated")(leave_effect)

    @own.on("customer.updated")
    async def handler(event: Event, db: Connection) -> None:
        if event.id == "evt_bad":
            await ends(event, db)

    for name in ("1", "2", "bad"):
        await put(
            shop,
            event_json(f"evt_{name}", "customer.updated", example("customer", id=f"cus_{name}", name=name)),
        )

    await (await make_worker()).run_once(shop)

    assert await statuses(shop) == {"evt_1": "processed", "evt_2": "processed", "evt_bad": "failed"}
    [failure] = await failures_of(shop, "evt_bad")
    assert "ended the transaction" in failure["error_message"]
    assert set(await effects(shop)) >= {"evt_1", "evt_2"}
    assert {row["name"] for row in (await billing(shop)).values()} == {"1", "bad", "2"}


async def test_after_five_tries_an_event_is_dead_and_each_try_is_on_record(
    shop: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    attempts = []
    own.on("invoice.paid")(leave_effect)

    @own.on("invoice.paid")
    async def handler(event: Event, db: Connection) -> None:
        if event.id == "evt_bad":
            attempts.append(event.attempt)
            raise ValueError("no")

    worker = await make_worker(KAMIYO_FIRST_RETRY_DELAY=10)
    await put(shop, of("cus_1", "evt_1"), of("cus_2", "evt_bad"), of("cus_3", "evt_2"))
    while await work_off(worker, shop):
        await due_now(shop)

    assert attempts == [1, 2, 3, 4, 5]
    failures = await failures_of(shop, "evt_bad")
    assert [failure["retry_count"] for failure in failures] == [1, 2, 3, 4, 5]
    *waits, never = [failure["next_try_at"] and failure["next_try_at"] - failure["created_at"] for failure in failures]
    assert never is None
    for wait, middle in zip(waits, (10, 60, 360, 2160), strict=True):
        assert 0.8 * middle - 0.5 <= wait.total_seconds() <= 1.2 * middle + 0.5
    assert len({failure["fingerprint"] for failure in failures}) == 1

    event = await row_of(shop, "evt_bad")
    assert (event["status"], event["attempts"], event["next_try_at"]) == ("failed", 5, None)
    assert await effects(shop) == {"evt_1": 1, "evt_2": 1}


async def test_retry_does_not_go_on_for_ever(db: Connection, own: Registry, make_worker: MakeWorker) -> None:
    own.on("invoice.paid")(_retry_in_a_minute)
    worker = await make_worker()
    await put(db, of("cus_1", "evt_1"))
    while await work_off(worker, db):
        await due_now(db)
    assert [failure["retry_count"] for failure in await failures_of(db, "evt_1")] == [1, 2, 3, 4, 5]
    assert (await row_of(db, "evt_1"))["next_try_at"] is None


async def test_a_person_gives_a_dead_event_five_new_tries(
    db: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    own.on("invoice.paid")(_raise)
    worker = await make_worker()
    await put(db, of("cus_1", "evt_1"))
    for _ in range(2):
        while await work_off(worker, db):
            await due_now(db)
        await inbox.retry(db, "evt_1")
    counts = [failure["retry_count"] for failure in await failures_of(db, "evt_1")]
    assert counts == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]

    own.clear()
    assert await work_off(worker, db) == 1
    event = await row_of(db, "evt_1")
    assert (event["status"], event["attempts"]) == ("processed", 1)


async def test_a_replayed_event_has_its_effect_again_and_its_row_stays_as_it_is(
    shop: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    own.on("customer.updated")(leave_effect)
    worker = await make_worker()
    for at, name in enumerate(("Old", "New")):
        changed = example("customer", id="cus_1", name=name)
        await put(shop, event_json(f"evt_{at}", "customer.updated", changed, created=NOW + at))
        await work_off(worker, shop)
    before = await billing(shop)
    assert await inbox.replay(shop, Filters(status="processed")) == 2
    assert await work_off(worker, shop) == 2
    assert await effects(shop) == {"evt_0": 2, "evt_1": 2}
    assert await billing(shop) == before


async def test_a_body_that_retention_took_cannot_be_run_again(
    db: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    own.on("invoice.paid")(_raise)
    await put(db, of("cus_1", "evt_1"), of("cus_2", "evt_2", "charge.captured"))
    await db.execute(
        "DELETE FROM webhook_payloads WHERE seq = (SELECT seq FROM webhook_events WHERE event_id = 'evt_1')"
    )
    await work_off(await make_worker(), db)
    assert await statuses(db) == {"evt_1": "failed", "evt_2": "processed"}
    [failure] = await failures_of(db, "evt_1")
    assert (failure["error_type"], failure["next_try_at"]) == ("PayloadGone", None)


# ── Superseded ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("apart", [1, 0], ids=["seconds apart", "in one second"])
@pytest.mark.parametrize("turns", ["one turn", "in order", "backwards"])
async def test_a_handler_is_told_when_its_object_has_moved_on(
    turns: str, apart: int, db: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    told = {}

    @own.on("customer.updated")
    async def handler(event: Event, db: Connection) -> None:
        told[event.id] = event.superseded

    worker = await make_worker()
    ada = example("customer", id="cus_1", name="Ada")
    old = event_json("evt_old", "customer.updated", ada, created=NOW, previous={"name": "A"})
    new = event_json(
        "evt_new", "customer.updated", {**ada, "name": "Bo"}, created=NOW + apart, previous={"name": "Ada"}
    )
    for one in [old, new] if turns != "backwards" else [new, old]:
        await put(db, one)
        if turns != "one turn":
            await worker.run_once(db)
    await work_off(worker, db)
    assert told == {"evt_new": False, "evt_old": turns != "in order"}
