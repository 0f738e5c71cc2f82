"""A worker's turn: projection, handlers and settling commit together, and each event ends as it deserves."""

import asyncio
import contextlib
import itertools
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta

import asyncpg
import pytest

from kamiyo import database, inbox, telemetry
from kamiyo.database import Connection, listening
from kamiyo.event import Event
from kamiyo.handlers import Bury, Registry, Retry
from kamiyo.inbox import Filters
from kamiyo.postgres import temporary_postgres
from kamiyo.rebuild import rebuild
from kamiyo.worker import MOST_HANDLED_TOGETHER, Worker
from tests.conftest import DEADLINE, Log, MakeSettings, event_json, fresh_id, settled, until
from tests.turns import (
    NOW,
    billing,
    die,
    due_now,
    example,
    failures_of,
    no_lanes_held,
    put,
    row_of,
    statuses,
    work_off,
    worker_on,
)

MakeWorker = Callable[..., Awaitable[Worker]]


@pytest.fixture
async def shop(db: Connection) -> AsyncIterator[Connection]:
    """The host application's own tables: what handlers did, once for each time they did it."""
    await db.execute("DROP SCHEMA IF EXISTS shop CASCADE")
    await db.execute("CREATE SCHEMA shop; CREATE TABLE shop.effects (id bigserial, event_id text, txid bigint)")
    yield db
    await db.execute("DROP SCHEMA shop CASCADE")


@pytest.fixture
def own() -> Registry:
    return Registry()


@pytest.fixture
def make_worker(
    database_url: str, settings: MakeSettings, own: Registry, monkeypatch: pytest.MonkeyPatch
) -> MakeWorker:
    """`await make_worker(KAMIYO_WORKER_BATCH=5)`: a worker with the handlers of `own`."""
    # No turn is cut short only because this machine is busy.
    monkeypatch.setattr("kamiyo.worker._TURN_SECONDS", 60.0)

    async def make(**changes: object) -> Worker:
        return await worker_on(database_url, settings(**changes), own)

    return make


@pytest.fixture
async def other(database_url: str) -> AsyncIterator[Connection]:
    """A second connection: another worker's, or an onlooker's."""
    connection = await database.connect(database_url, application="test other")
    yield connection
    await connection.close()


def of(customer: str, event_id: str, event_type: str = "invoice.paid", created: int = NOW) -> bytes:
    """An event of a customer, about an object that no table follows."""
    return event_json(
        event_id, event_type, {"id": f"x_{event_id}", "object": "x", "customer": customer}, created=created
    )


async def leave_effect(event: Event, db: Connection) -> None:
    await db.execute("INSERT INTO shop.effects (event_id, txid) VALUES ($1, txid_current())", event.id)


async def effects(db: Connection) -> Counter[str]:
    """How often each event had its effect."""
    return Counter(event_id for (event_id,) in await db.fetch("SELECT event_id FROM shop.effects"))


async def together(db: Connection) -> list[set[str]]:
    """The events whose effects share a transaction, transaction by transaction."""
    found: dict[int, set[str]] = defaultdict(set)
    for event_id, txid in await db.fetch("SELECT event_id, txid FROM shop.effects ORDER BY id"):
        found[txid].add(event_id)
    return list(found.values())


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


# ── Lanes ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_while_one_customers_handler_waits_the_others_proceed_and_his_own_next_event_does_not(
    db: Connection, other: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    entered, leave, handled = asyncio.Event(), asyncio.Event(), []

    @own.on("invoice.paid")
    async def handler(event: Event, db: Connection) -> None:
        if event.id == "evt_a1":
            entered.set()
            await leave.wait()
        handled.append(event.id)

    busy, idle = await make_worker(KAMIYO_WORKER_BATCH=2), await make_worker(KAMIYO_WORKER_BATCH=2)
    await put(db, of("cus_a", "evt_a1"))
    waiting = asyncio.create_task(busy.run_once(db))
    await entered.wait()
    # His events fill more than a batch, and they have waited longest.
    for number in range(2, 6):
        await put(other, of("cus_a", f"evt_a{number}"))
    await put(other, of("cus_b", "evt_b1"), of("cus_c", "evt_c1"))

    assert await work_off(idle, other) == 2
    assert sorted(handled) == ["evt_b1", "evt_c1"]

    leave.set()
    assert await waiting == 1
    assert await work_off(idle, other) == 4
    assert handled[2:] == ["evt_a1", "evt_a2", "evt_a3", "evt_a4", "evt_a5"]


async def test_a_batch_goes_through_a_customers_events_in_stripes_order(
    db: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    handled = []

    @own.on("invoice.paid")
    async def handler(event: Event, db: Connection) -> None:
        handled.append(event.created)

    seconds = list(range(NOW, NOW + 30))
    for second in random.Random(1).sample(seconds, len(seconds)):
        await put(db, of("cus_1", f"evt_{second}", created=second))
    assert await (await make_worker()).run_once(db) == 30
    assert handled == seconds


async def test_many_workers_never_have_two_events_of_one_customer_at_a_time(
    shop: Connection, database_url: str, own: Registry, make_worker: MakeWorker
) -> None:
    at_work: Counter[str | None] = Counter()
    order: dict[str | None, list[int]] = defaultdict(list)
    side_by_side = asyncio.Event()

    @own.on("invoice.paid")
    async def handler(event: Event, db: Connection) -> None:
        at_work[event.customer] += 1
        assert at_work[event.customer] == 1
        if at_work.total() > 1:
            side_by_side.set()
        await side_by_side.wait()  # a batch has four of the six customers: somebody must come and take the others
        await leave_effect(event, db)  # leaves the loop to the others
        order[event.customer].append(event.created)
        at_work[event.customer] -= 1

    for second in range(60):
        await put(shop, of(f"cus_{second % 6}", f"evt_{second}", created=NOW + second))

    async def work() -> None:
        worker, db = (
            await make_worker(KAMIYO_WORKER_BATCH=4),
            await database.connect(database_url, application="w"),
        )
        while "pending" in (await statuses(db)).values():
            await worker.run_once(db)
        await db.close()

    async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as workers:
        for _ in range(4):
            workers.create_task(work())

    assert await effects(shop) == {f"evt_{second}": 1 for second in range(60)}
    assert set((await statuses(shop)).values()) == {"processed"}
    assert all(seconds == sorted(seconds) for seconds in order.values())


async def test_a_slow_type_lets_the_other_customers_of_its_batch_go_first(
    shop: Connection, other: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    own.on("invoice.voided")(leave_effect)
    seen = {}

    @own.on("invoice.paid")
    async def slow(event: Event, db: Connection) -> None:
        seen[event.id] = set((await effects(other)).keys())
        await db.execute("SELECT pg_sleep(0.03)")

    worker = await make_worker()
    for turn in (1, 2):
        await put(shop, of("cus_a", f"evt_slow_{turn}", created=NOW))
        await put(shop, of("cus_b", f"evt_quick_{turn}", "invoice.voided", created=NOW + 1))
        assert await worker.run_once(shop) == 2
        worker._slow.discard("invoice.voided")  # on a busy machine anything is slow
    assert seen == {"evt_slow_1": set(), "evt_slow_2": {"evt_quick_1", "evt_quick_2"}}


async def test_a_turn_that_has_taken_its_time_gives_the_rest_back_untried_and_in_order(
    shop: Connection, own: Registry, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: dict[str | None, list[int]] = defaultdict(list)
    own.on("invoice.paid")(leave_effect)

    @own.on("invoice.paid")
    async def handler(event: Event, db: Connection) -> None:
        handled[event.customer].append(event.created)

    for number in range(MOST_HANDLED_TOGETHER + 13):
        await put(shop, of(f"cus_{number % 3}", f"evt_{number}", created=NOW + number))
    worker = await make_worker()
    monkeypatch.setattr("kamiyo.worker._TURN_SECONDS", 0.0)
    worker._pace = 0.0  # nothing is known yet of how long events take, so a whole batch is claimed

    assert await worker.run_once(shop) == MOST_HANDLED_TOGETHER + 13
    assert Counter((await statuses(shop)).values()) == {"processed": 1, "pending": MOST_HANDLED_TOGETHER + 12}

    await work_off(worker, shop)
    assert set((await effects(shop)).values()) == {1}
    assert all(seconds == sorted(seconds) for seconds in handled.values())
    assert await shop.fetchval("SELECT max(attempts) FROM webhook_events") == 1


# ── Claims that are lost, workers that die ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ends_well", [True, False])
async def test_a_worker_whose_claim_was_taken_over_settles_nothing(
    ends_well: bool, shop: Connection, other: Connection, own: Registry, make_worker: MakeWorker, log: Log
) -> None:
    stolen = False

    @own.on("invoice.paid")
    async def handler(event: Event, db: Connection) -> None:
        nonlocal stolen
        await leave_effect(event, db)
        if event.id == "evt_1" and not stolen:
            stolen = True
            await other.execute("UPDATE webhook_events SET claim = nextval('webhook_claims') WHERE event_id = 'evt_1'")
            if not ends_well:
                raise ValueError("no")

    worker = await make_worker()
    await put(shop, of("cus_1", "evt_1"), of("cus_2", "evt_2"))
    assert await worker.run_once(shop) == 2

    assert await effects(shop) == {}
    assert await statuses(shop) == {"evt_1": "processing", "evt_2": "processing"}
    assert await shop.fetchval("SELECT count(*) FROM webhook_failures") == 0
    assert "claim_lost" in [line["event"] for line in log()]
    # Nobody holds their lanes any more, so whoever looks next finds them.
    assert await work_off(worker, shop) == 2
    assert await effects(shop) == {"evt_1": 1, "evt_2": 1}
    assert set((await statuses(shop)).values()) == {"processed"}


async def test_the_events_of_a_dead_worker_run_alone_and_their_next_death_counts(
    shop: Connection, database_url: str, own: Registry, make_worker: MakeWorker
) -> None:
    own.on("invoice.paid")(leave_effect)
    await put(shop, of("cus_1", "evt_1"), of("cus_2", "evt_2"), of("cus_3", "evt_3"))
    await die(database_url)
    await until(lambda: no_lanes_held(shop))
    await put(shop, of("cus_4", "evt_4"), of("cus_5", "evt_5"))

    assert await (await make_worker()).run_once(shop) == 5

    assert sorted(map(sorted, await together(shop))) == [["evt_1"], ["evt_2"], ["evt_3"], ["evt_4", "evt_5"]]
    assert await shop.fetchval("SELECT count(*) FROM webhook_failures") == 0, "none of them was running"
    assert not await shop.fetchval("SELECT bool_or(suspect) FROM webhook_events")


async def test_the_event_that_was_running_when_its_worker_died_has_used_up_a_try(
    shop: Connection, database_url: str, own: Registry, make_worker: MakeWorker
) -> None:
    own.on("invoice.paid")(leave_effect)
    await put(shop, of("cus_1", "evt_1"), of("cus_2", "evt_2"))
    worker = await make_worker()
    for attempt in range(1, 6):
        await die(database_url, running="evt_1")
        await until(lambda: no_lanes_held(shop))
        assert await worker.run_once(shop)
        event = await row_of(shop, "evt_1")
        assert (event["status"], event["attempts"]) == ("failed", attempt)
        await due_now(shop)
    assert event["next_try_at"] is None
    failures = await failures_of(shop, "evt_1")
    assert [(one["error_type"], one["retry_count"]) for one in failures] == [("WorkerDied", n) for n in range(1, 6)]
    assert await effects(shop) == {"evt_2": 1}


async def test_a_death_is_recorded_even_when_the_one_who_finds_it_dies_as_well(
    shop: Connection, database_url: str, own: Registry, make_worker: MakeWorker
) -> None:
    own.on("invoice.paid")(leave_effect)
    await put(shop, of("cus_1", "evt_1"))
    await die(database_url, running="evt_1")
    await until(lambda: no_lanes_held(shop))
    await die(database_url)
    await until(lambda: no_lanes_held(shop))
    await (await make_worker()).run_once(shop)
    [failure] = await failures_of(shop, "evt_1")
    assert (failure["error_type"], failure["retry_count"]) == ("WorkerDied", 1)


async def test_while_the_tables_are_made_again_events_wait_however_long_it_takes_and_none_has_failed(
    shop: Connection, other: Connection, database_url: str, own: Registry, make_worker: MakeWorker
) -> None:
    own.on("customer.updated")(leave_effect)
    worker = await make_worker()
    customers = [example("customer", id=f"cus_{number}") for number in range(3)]
    await put(shop, *(event_json(f"evt_{one['id']}", "customer.updated", one, created=NOW) for one in customers))
    # As patient as a worker's connection, whose patience ends while the rebuild waits for a lock of the test's.
    pool = await database.open_pool(database_url, size=1, application="test impatient", idle_limit=1)
    async with other.transaction():
        await other.execute("LOCK TABLE webhook_reads")
        rebuilding = asyncio.create_task(rebuild(shop))
        waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'webhook_reads'::regclass AND NOT granted"
        await until(lambda: other.fetchval(waiting))
        async with pool.acquire() as db:
            assert await worker.run_once(db) == 3
        assert set((await statuses(other)).values()) == {"pending"}
        assert await other.fetchval("SELECT count(*) FROM webhook_failures") == 0
    await rebuilding
    assert await work_off(worker, shop) == 3
    assert await effects(shop) == {f"evt_{one['id']}": 1 for one in customers}
    assert await shop.fetchval("SELECT max(attempts) FROM webhook_events") == 1
    await pool.close()


# ── Running, stopping ───────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def running(worker: Worker) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(worker.run())
    try:
        yield task
    finally:
        worker.stop()
        worker.abandon()
        await task
        await worker.pool.close()


async def test_a_running_worker_hears_of_events_tries_them_again_in_time_and_stops_when_told(
    shop: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    @own.on("invoice.paid")
    async def handler(event: Event, db: Connection) -> None:
        if event.attempt < 3:
            raise ValueError("not yet")
        await leave_effect(event, db)

    async with running(await make_worker(KAMIYO_FIRST_RETRY_DELAY=0.01)):
        await put(shop, of("cus_1", "evt_1"), of("cus_2", "evt_2", "charge.captured"))
        await settled(shop, "evt_2", "processed")
        event = await settled(shop, "evt_1", "processed")
    assert event["attempts"] == 3
    assert await effects(shop) == {"evt_1": 1}


async def test_what_becomes_due_while_the_only_hand_is_just_looking_is_taken_at_once(
    shop: Connection,
    other: Connection,
    database_url: str,
    settings: MakeSettings,
    own: Registry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kamiyo.worker._LOOK_EVERY_SECONDS", 3600.0)
    monkeypatch.setattr("kamiyo.worker._REST_SECONDS", 3600.0)
    # Between looking for what is due and locking a lane it waits for a lock of the test's.
    await shop.execute(
        "CREATE FUNCTION shop.pg_try_advisory_lock(class integer, lane integer) RETURNS boolean LANGUAGE sql AS "
        "'SELECT pg_advisory_xact_lock_shared(99); SELECT pg_catalog.pg_try_advisory_lock(class, lane)'"
    )
    slow = f"{database_url}{'&' if '?' in database_url else '?'}search_path=shop,pg_catalog,public"
    worker = await worker_on(slow, settings(KAMIYO_WORKER_CONCURRENCY=1), own)
    await put(shop, of("cus_0", "evt_0"))
    await inbox.claim(other, 1)
    await shop.execute("SELECT pg_advisory_lock(99)")
    async with running(worker):
        await until(lambda: shop.fetchval("SELECT count(*) FROM pg_locks WHERE objid = 99 AND NOT granted"))

        async def heard(times: int) -> bool:
            return worker._missed >= times

        await until(lambda: heard(1))  # it looks once more as soon as it can be told
        await put(shop, of("cus_1", "evt_1"))
        await until(lambda: heard(2))
        await shop.execute("SELECT pg_advisory_unlock(99)")
        await settled(shop, "evt_1", "processed", within=20)


async def test_a_worker_whose_hands_are_full_calls_others_for_whatever_comes_even_just_after_it_has_called(
    shop: Connection, database_url: str, own: Registry, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamiyo.worker._LOOK_EVERY_SECONDS", 3600.0)
    entered, calls = asyncio.Event(), list[int]()

    @own.on("invoice.paid")
    async def handler(event: Event, db: Connection) -> None:
        entered.set()
        await asyncio.Event().wait()

    worker = await make_worker(KAMIYO_WORKER_CONCURRENCY=1)
    await put(shop, of("cus_1", "evt_1"))
    async with running(worker):
        await entered.wait()
        async with listening(database_url, lambda: calls.append(1)):
            for times in (1, 2, 3):
                worker.wake()

                async def called(times: int = times) -> bool:
                    return len(calls) >= times

                await until(called, within=20)


async def test_a_stopping_worker_finishes_what_it_handles_and_gives_the_rest_back_untried(
    shop: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    @own.on("invoice.paid")
    async def handler(event: Event, db: Connection) -> None:
        await leave_effect(event, db)
        entered.set()
        await leave.wait()

    worker = await make_worker()
    await put(shop, *(of("cus_1", f"evt_{n:02}", created=NOW + n) for n in range(MOST_HANDLED_TOGETHER + 10)))
    async with running(worker) as task:
        await entered.wait()
        worker.stop()
        leave.set()
        await task
    found = Counter((await statuses(shop)).values())
    assert found == {"processed": MOST_HANDLED_TOGETHER, "pending": 10}
    assert await shop.fetchval("SELECT max(attempts) FROM webhook_events WHERE status = 'pending'") == 0
    assert (await effects(shop)).total() == MOST_HANDLED_TOGETHER


@pytest.mark.parametrize("tries", [0, 4])
async def test_an_abandoned_handler_leaves_no_effect_and_its_try_does_not_count(
    tries: int, shop: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    entered, patient = asyncio.Event(), True

    @own.on("invoice.paid")
    async def handler(event: Event, db: Connection) -> None:
        await leave_effect(event, db)
        if patient:
            entered.set()
            await asyncio.Event().wait()

    await put(shop, of("cus_1", "evt_1"), of("cus_2", "evt_2", "charge.captured"))
    if tries:
        await shop.execute(
            "UPDATE webhook_events SET attempts = $2, status = 'failed', failed_at = now() WHERE event_id = $1",
            *("evt_1", tries),
        )
    for _ in range(2):
        worker = await make_worker()
        worker._slow.add("invoice.paid")  # alone, so that its try is counted before it begins
        entered.clear()
        async with running(worker):
            await entered.wait()
        event = await row_of(shop, "evt_1")
        assert (event["status"], event["attempts"]) == ("failed" if tries else "pending", tries)
        assert await effects(shop) == {}
    patient = False
    assert await work_off(await make_worker(), shop) == 1
    event = await row_of(shop, "evt_1")
    assert (event["status"], event["attempts"]) == ("processed", tries + 1)
    assert await shop.fetchval("SELECT count(*) FROM webhook_failures") == 0


async def test_what_processing_took_is_added_up_over_all_tries(
    db: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    @own.on("invoice.paid")
    async def handler(event: Event, db: Connection) -> None:
        await db.execute("SELECT pg_sleep(0.02)")
        if event.attempt == 1:
            raise ValueError("no")

    worker = await make_worker()
    await put(db, of("cus_1", "evt_1"))
    await worker.run_once(db)
    once = (await row_of(db, "evt_1"))["processing_us"]
    await due_now(db)
    await worker.run_once(db)
    assert once >= 20_000
    assert (await row_of(db, "evt_1"))["processing_us"] >= once + 20_000


async def test_a_batch_with_more_lanes_than_postgresql_has_room_for_is_taken_in_parts(settings: MakeSettings) -> None:
    few = {"max_locks_per_transaction": "10", "max_connections": "12", "max_worker_processes": "1", "fsync": "off"}
    with temporary_postgres({**few, "max_wal_senders": "0", "autovacuum_max_workers": "1"}) as server:
        db = await database.connect(server.url, application="test")
        await database.migrate(db)
        await put(db, *(event_json(obj=example("charge", customer=fresh_id("cus"))) for _ in range(1_500)))
        with pytest.raises(asyncpg.OutOfMemoryError):
            await inbox.claim(db, 1_500)
        await inbox.unlock(db)
        pool = await database.open_pool(server.url, size=4, application="test worker", idle_limit=60)
        worker = Worker(pool, server.url, settings(KAMIYO_WORKER_BATCH=1_500), Registry())
        running = asyncio.create_task(worker.run())

        async def at_rest() -> bool:
            return not await db.fetchval("SELECT count(*) FROM webhook_events WHERE next_try_at IS NOT NULL")

        await until(at_rest)
        worker.stop()
        await running
        await pool.close()
        await db.close()


async def test_an_error_that_nobody_thought_of_in_its_maintenance_ends_neither_that_nor_the_work(
    shop: Connection, make_worker: MakeWorker, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamiyo.worker._PAUSE_SECONDS", (0.01, 0.1))
    fold_counts, hears, errors = inbox.fold_counts, listening, list[BaseException]()
    errors += [KeyError("jenny@example.com"), asyncio.CancelledError(), ZeroDivisionError("jenny@example.com")]

    async def stumble(db: Connection) -> int:
        if errors:
            raise errors.pop()
        return await fold_counts(db)

    @contextlib.asynccontextmanager
    async def stumble_once(url: str, heard: Callable[[], None]) -> AsyncIterator[Connection]:
        monkeypatch.setattr("kamiyo.worker.listening", hears)
        raise LookupError("jenny@example.com")
        yield

    monkeypatch.setattr(inbox, "fold_counts", stumble)
    monkeypatch.setattr("kamiyo.worker.listening", stumble_once)
    counted = telemetry.WORKER_ERRORS.labels("maintenance")._value.get()
    await put(shop, of("cus_1", "evt_1"))
    async with running(await make_worker()) as task:

        async def folded() -> bool:
            return task.done() or bool(await shop.fetchval("SELECT count(*) FROM webhook_counts_by_minute"))

        await until(folded)
        assert not task.done()
        await until(lambda: shop.fetchval(_LISTENERS))
        await settled(shop, "evt_1", "processed")
    told = Counter((line["part"], line["error"]) for line in log() if line["event"] == "worker_failed")
    assert told == {
        ("maintenance", "ZeroDivisionError"): 1,
        ("maintenance", "CancelledError"): 1,
        ("maintenance", "KeyError"): 1,
        ("listening", "LookupError"): 1,
    }
    assert telemetry.WORKER_ERRORS.labels("maintenance")._value.get() == counted + 3
    assert "jenny@example.com" not in str(log())


async def test_an_error_in_claiming_is_told_again_and_again_ever_later_and_a_stop_need_not_wait(
    shop: Connection, make_worker: MakeWorker, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamiyo.worker._PAUSE_SECONDS", (0.01, 3600.0))
    claim, began = inbox.claim_or_wait, list[float]()

    async def stumble(*_: object) -> tuple[int, list[inbox.Claimed], float | None]:
        began.append(time.monotonic())
        raise TypeError("jenny@example.com")

    monkeypatch.setattr(inbox, "claim_or_wait", stumble)
    worker = await make_worker(KAMIYO_WORKER_CONCURRENCY=1)
    await put(shop, of("cus_1", "evt_1"))
    async with running(worker):

        async def told() -> list[dict[str, object]]:
            worker.wake()
            found = [line for line in log() if line["event"] == "worker_failed"]
            return found if len(found) > 5 else []

        lines = await until(told)
    waits = [later - earlier for earlier, later in itertools.pairwise(began)]
    assert all(wait > 0.01 * 0.8 * 2**times for times, wait in enumerate(waits[:5])), waits
    assert {(line["part"], line["error"], line["level"]) for line in lines} == {("turn", "TypeError", "error")}
    assert re.fullmatch(r"worker\.py:\d+", str(lines[0]["place"])), "where it came from, in this package"
    assert "jenny@example.com" not in str(log())
    monkeypatch.setattr(inbox, "claim_or_wait", claim)
    assert await work_off(await make_worker(), shop) == 1, "nothing was lost"


async def test_a_stop_that_comes_while_a_lost_connection_is_closed_is_heard(
    db: Connection, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, closing = await make_worker(), asyncio.Event()
    close = asyncpg.Connection.close

    async def close_slowly(connection: "asyncpg.Connection[asyncpg.Record]", **_: float | None) -> None:
        closing.set()
        worker.stop()
        await asyncio.sleep(1)  # as to a server that does not answer; the stop ends it
        await close(connection)

    running = asyncio.create_task(worker.run())

    async def listens() -> bool:
        return bool(await db.fetchval(_LISTENERS))

    await until(listens)
    monkeypatch.setattr(asyncpg.Connection, "close", close_slowly)
    await db.execute("SELECT pg_terminate_backend(pid) " + _LISTENERS.removeprefix("SELECT count(*) "))
    await asyncio.wait_for(closing.wait(), DEADLINE)
    await asyncio.wait_for(running, DEADLINE)
    monkeypatch.undo()
    await worker.pool.close()


_LISTENERS = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'kamiyo listener'"
)
