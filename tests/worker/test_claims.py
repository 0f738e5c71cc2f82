"""Who works on what: a customer's lane is one worker's at a time, and a claim that was lost settles nothing."""

import asyncio
import random
from collections import Counter, defaultdict

import pytest

from kamiyo import database
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Registry
from kamiyo.rebuild import rebuild
from kamiyo.turn import MOST_HANDLED_TOGETHER
from tests.conftest import DEADLINE, Log, event_json, until
from tests.turns import NOW, die, due_now, example, failures_of, no_lanes_held, put, row_of, statuses, work_off
from tests.worker.conftest import MakeWorker, effects, leave_effect, of, together

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
        worker.turns._slow.discard("invoice.voided")  # on a busy machine anything is slow
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
    monkeypatch.setattr("kamiyo.turn._TURN_SECONDS", 0.0)
    worker.turns._pace = 0.0  # nothing is known yet of how long events take, so a whole batch is claimed

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


async def test_an_event_that_somebody_holds_in_psql_keeps_back_its_own_customer_alone(
    shop: Connection, other: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    handled: list[str] = []
    lanes: set[int] = set()

    @own.on("invoice.paid")
    async def handler(event: Event, db: Connection) -> None:
        handled.append(event.id)
        lanes.add(await db.fetchval(_LANES_OF_THIS_SESSION))

    worker = await make_worker()
    await put(shop, of("cus_a", "evt_a1"), of("cus_a", "evt_a2"), of("cus_b", "evt_b1"), of("cus_c", "evt_c1"))
    async with other.transaction():
        await other.execute("SELECT FROM webhook_events WHERE event_id = 'evt_a1' FOR UPDATE")
        async with asyncio.timeout(DEADLINE):
            assert await work_off(worker, shop) == 2
        # Nor does his later event overtake the one that is held; and nobody has him in hand.
        assert sorted(handled) == ["evt_b1", "evt_c1"]
        assert lanes == {2}
        assert await no_lanes_held(shop)
    assert await work_off(worker, shop) == 2
    assert handled[2:] == ["evt_a1", "evt_a2"]
    assert await shop.fetchval("SELECT max(attempts) FROM webhook_events") == 1


_LANES_OF_THIS_SESSION = (
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1800432 AND pid = pg_backend_pid()"
)


@pytest.mark.parametrize("batch", [1, 3])
async def test_a_claim_looks_behind_what_is_held_however_few_events_it_takes_and_holds_no_lane_but_of_those(
    batch: int, shop: Connection, other: Connection, own: Registry, make_worker: MakeWorker
) -> None:
    lanes: set[int] = set()

    @own.on("invoice.paid")
    async def handler(event: Event, db: Connection) -> None:
        lanes.add(await db.fetchval(_LANES_OF_THIS_SESSION))

    worker = await make_worker(KAMIYO_WORKER_BATCH=batch)
    # The oldest: many times what a claim takes, of many customers.
    await put(shop, *(of(f"cus_{one:02}", f"evt_{one:02}") for one in range(30)))
    await put(shop, of("cus_c", "evt_c1"), of("cus_d", "evt_d1"))
    async with other.transaction():
        await other.execute("SELECT FROM webhook_events WHERE customer < 'cus_c' FOR UPDATE")
        async with asyncio.timeout(DEADLINE):
            assert await work_off(worker, shop) == 2
        assert {name for name, status in (await statuses(shop)).items() if status == "processed"} == {
            "evt_c1",
            "evt_d1",
        }
        assert lanes == {min(batch, 2)}
    assert await work_off(worker, shop) == 30


async def test_where_all_that_is_due_is_held_a_claim_takes_nothing_and_holds_nothing(
    shop: Connection, other: Connection, make_worker: MakeWorker
) -> None:
    worker = await make_worker(KAMIYO_WORKER_BATCH=1)
    await put(shop, of("cus_a", "evt_a1"), of("cus_b", "evt_b1"))
    async with other.transaction():
        await other.execute("UPDATE webhook_events SET next_try_at = now() - interval '1 hour'")
        async with asyncio.timeout(DEADLINE):
            assert await worker.run_once(shop) == 0
        assert await no_lanes_held(shop)
    assert await work_off(worker, shop) == 2


async def test_a_claim_waits_for_a_lock_on_the_table_as_long_as_it_takes_and_holds_no_event_meanwhile(
    shop: Connection, other: Connection, make_worker: MakeWorker
) -> None:
    worker = await make_worker()
    await put(shop, of("cus_a", "evt_a1"), of("cus_b", "evt_b1"))
    async with other.transaction():
        # As while an index is made: who reads is let in, who writes is not.
        await other.execute("LOCK TABLE webhook_events IN SHARE MODE")
        claiming = asyncio.create_task(worker.run_once(shop))
        waiting = "SELECT count(*) = 1 FROM pg_locks WHERE relation = 'webhook_events'::regclass AND NOT granted"
        await until(lambda: other.fetchval(waiting))
        assert len(await other.fetch("SELECT FROM webhook_events FOR UPDATE NOWAIT")) == 2
        assert not claiming.done()
    assert await claiming == 2
