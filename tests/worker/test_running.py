"""A worker that runs: it hears of events, outlives errors that nobody thought of, and stops when it is told."""

import asyncio
import contextlib
import itertools
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any

import asyncpg
import pytest

from kamiyo import database, inbox, telemetry
from kamiyo.database import Connection, listening
from kamiyo.event import Event
from kamiyo.handlers import Registry
from kamiyo.postgres import temporary_postgres
from kamiyo.turn import MOST_HANDLED_TOGETHER
from kamiyo.worker import Worker
from tests.conftest import DEADLINE, Log, MakeSettings, event_json, fresh_id, settled, until
from tests.turns import NOW, due_now, example, put, row_of, statuses, work_off, worker_on
from tests.worker.conftest import MakeWorker, effects, leave_effect, of


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


@pytest.mark.parametrize(
    ("often", "share", "looks_at_all_again"),
    [(3600.0, 1.0, False), (0.0, 1e-9, False), (0.0, 1e9, True)],
    ids=["not yet", "after a look that took long", "in time"],
)
async def test_claims_begin_where_the_queue_began_until_it_is_time_to_look_at_everything_again(
    shop: Connection,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
    often: float,
    share: float,
    looks_at_all_again: bool,
) -> None:
    monkeypatch.setattr("kamiyo.worker._LOOK_AT_ALL_EVERY_SECONDS", (often, 3600.0))
    monkeypatch.setattr("kamiyo.worker._LOOK_AT_ALL_SHARE", share)
    claim, begins = inbox.claim_since, list[datetime | None]()

    async def noted(db: Connection, since: datetime | None, *words: Any) -> inbox.Taken:
        begins.append(since)
        return await claim(db, since, *words)

    monkeypatch.setattr(inbox, "claim_since", noted)
    async with running(await make_worker(KAMIYO_WORKER_CONCURRENCY=1)):
        for event_id in ("evt_1", "evt_2"):
            await put(shop, of("cus_1", event_id))
            await settled(shop, event_id, "processed")
    due = await shop.fetchval("SELECT created_at FROM webhook_events WHERE event_id = 'evt_1'")
    first, *later = begins
    assert first is None and later
    if looks_at_all_again:
        assert set(later) == {None}
    else:
        assert all(since is not None and since < due for since in later)


async def test_an_event_that_is_noted_far_behind_where_the_queue_began_is_found_all_the_same(
    shop: Connection, make_worker: MakeWorker
) -> None:
    async with running(await make_worker()):
        await put(shop, of("cus_1", "evt_1"))
        await settled(shop, "evt_1", "processed")
        # As a transaction does that began an hour ago and ends now.
        async with shop.transaction():
            await put(shop, of("cus_2", "evt_2"))
            await shop.execute(
                "UPDATE webhook_events SET next_try_at = now() - interval '1 hour' WHERE event_id = 'evt_2'"
            )
        await settled(shop, "evt_2", "processed")


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
        worker.turns._slow.add("invoice.paid")  # alone, so that its try is counted before it begins
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
    claim, began = inbox.claim_since, list[float]()

    async def stumble(*_: object) -> inbox.Taken:
        began.append(time.monotonic())
        raise TypeError("jenny@example.com")

    monkeypatch.setattr(inbox, "claim_since", stumble)
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
    monkeypatch.setattr(inbox, "claim_since", claim)
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
