"""Workers die at any instruction, really: their processes are killed, stopped, or end themselves.

What must hold whatever happens: every event has its effect once, within seconds and without a person; an event that
kills is dead after five tries; and who was presumed dead settles nothing.
"""

import asyncio
import contextlib
import os
import random
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from time import monotonic

import pytest

from kamiyo.database import Connection
from tests.conftest import DEADLINE, ROOT, event_json, settled, until
from tests.turns import NOW, failures_of, put, row_of, statuses

#: Seconds within which what a dead worker held runs again: a worker looks for such by itself every two. The rest is for
#: a machine that runs other tests beside.
WITHIN_SECONDS = 20.0


@pytest.fixture
async def shop(db: Connection) -> AsyncIterator[Connection]:
    """The host application's own table: which process handled which event, once for each time it did."""
    await db.execute("DROP SCHEMA IF EXISTS shop CASCADE")
    await db.execute("CREATE SCHEMA shop; CREATE TABLE shop.effects (event_id text, pid integer)")
    yield db
    # If the story went wrong, a worker's session may still hold the table.
    await db.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name LIKE 'doomed %'"
    )
    await db.execute("DROP SCHEMA shop CASCADE")


@contextlib.asynccontextmanager
async def worker(url: str, doom: str, *, idle_limit: float = 60) -> AsyncIterator[Process]:
    """A worker process; killed in the end if it still lives."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.stories.doomed_worker", url, doom, str(idle_limit)),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith(("KAMIYO_", "PROMETHEUS_"))},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.communicate()


async def entered(process: Process, event_id: str) -> None:
    """Wait until its handler is inside this event."""
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE):
        assert await process.stdout.readline() == f"entered {event_id}\n".encode()


def event(event_id: str, customer: str, *, doomed: bool = False, event_type: str = "invoice.paid") -> bytes:
    obj = {"id": f"in_{event_id}", "object": "invoice", "customer": customer, "doomed": doomed}
    return event_json(event_id, event_type, obj, created=NOW)


async def effects(db: Connection) -> Counter[str]:
    """How often each event had its effect."""
    return Counter(event_id for (event_id,) in await db.fetch("SELECT event_id FROM shop.effects"))


@pytest.mark.parametrize("doing", ["waits", "asks"])
async def test_what_a_killed_worker_held_runs_again_within_seconds_and_once(
    doing: str, shop: Connection, database_url: str
) -> None:
    names = [f"evt_{number}" for number in range(5)]
    await put(shop, *(event(name, f"cus_{name}", doomed=name == "evt_2") for name in names))
    async with worker(database_url, doing) as doomed:
        await entered(doomed, "evt_2")
        async with worker(database_url, "none") as heir:
            await put(shop, event("evt_other", "cus_other"), event("evt_same", "cus_evt_2"))
            # The heir is at work, and leaves alone what a living worker holds.
            await settled(shop, "evt_other", "processed")
            found = await statuses(shop)
            assert {found[name] for name in names} == {"processing"}
            assert found["evt_same"] == "pending"

            doomed.kill()
            killed_at = monotonic()
            for name in (*names, "evt_same"):
                await settled(shop, name, "processed")
            assert monotonic() - killed_at < WITHIN_SECONDS
    assert await effects(shop) == dict.fromkeys([*names, "evt_other", "evt_same"], 1)
    assert {pid for (pid,) in await shop.fetch("SELECT pid FROM shop.effects")} == {heir.pid}


@pytest.mark.parametrize("doom", ["kills", "projects"])
async def test_an_event_that_kills_its_worker_is_dead_after_five_tries_and_its_neighbours_are_processed(
    doom: str, shop: Connection, database_url: str
) -> None:
    neighbours = [f"evt_{number}" for number in range(6)]
    # The projection kills without any handler's help: this type has none.
    event_type = {"kills": "invoice.paid", "projects": "invoice.voided"}[doom]
    poison = event("evt_poison", "cus_0", doomed=True, event_type=event_type)
    await put(shop, *(event(name, f"cus_{name}") for name in neighbours), poison)

    async def dead() -> bool:
        row = await row_of(shop, "evt_poison")
        return row["status"] == "failed" and row["next_try_at"] is None

    deaths = 0
    while not await dead():
        async with worker(database_url, doom) as process:
            it_dies, it_is_dead = asyncio.create_task(process.wait()), asyncio.create_task(until(dead))
            await asyncio.wait((it_dies, it_is_dead), return_when=asyncio.FIRST_COMPLETED)
            deaths += it_dies.done()
            for task in (it_dies, it_is_dead):
                task.cancel()
        # Once with its neighbours, then five times alone. If it is the projection that kills, then also whoever finds
        # a death and, having counted it, tries to make the row true all the same.
        assert deaths <= (6 if doom == "kills" else 11)

    failures = await failures_of(shop, "evt_poison")
    assert [(one["error_type"], one["retry_count"]) for one in failures] == [("WorkerDied", n) for n in range(1, 6)]
    found = await statuses(shop)
    assert found.pop("evt_poison") == "failed"
    assert found == dict.fromkeys(neighbours, "processed")
    assert await effects(shop) == dict.fromkeys(neighbours, 1)


async def test_a_worker_that_was_stopped_past_its_time_and_goes_on_settles_nothing(
    shop: Connection, database_url: str
) -> None:
    await put(shop, event("evt_1", "cus_1", doomed=True), event("evt_2", "cus_2"))
    async with worker(database_url, "waits", idle_limit=2) as stopped:
        await entered(stopped, "evt_1")
        stopped.send_signal(signal.SIGSTOP)
        # PostgreSQL ends its sessions; another worker takes over.
        async with worker(database_url, "none") as heir:
            for name in ("evt_1", "evt_2"):
                await settled(shop, name, "processed")
        before = await shop.fetch("SELECT * FROM webhook_events ORDER BY event_id")

        stopped.send_signal(signal.SIGCONT)
        assert stopped.stdin is not None
        stopped.stdin.write(b"go on\n")
        # It is alive, and takes part again: its next turn is the end of the one it was stopped in.
        await put(shop, event("evt_3", "cus_3"))
        await settled(shop, "evt_3", "processed")
        assert await shop.fetch("SELECT * FROM webhook_events WHERE event_id < 'evt_3' ORDER BY event_id") == before

    found = {name: pid for name, pid in await shop.fetch("SELECT event_id, pid FROM shop.effects")}
    assert found == {"evt_1": heir.pid, "evt_2": heir.pid, "evt_3": stopped.pid}
    assert await effects(shop) == {"evt_1": 1, "evt_2": 1, "evt_3": 1}


async def test_however_often_workers_are_killed_every_event_has_its_effect_once(
    shop: Connection, database_url: str
) -> None:
    names = [f"evt_{number:03}" for number in range(1000)]
    await put(shop, *(event(name, f"cus_{number % 40}") for number, name in enumerate(names)))

    async def processed() -> int:
        return int(await shop.fetchval("SELECT count(*) FROM webhook_events WHERE status = 'processed'"))

    rng = random.Random(7)
    killed_at_work = 0
    for share in (0.1, 0.3, 0.5, 0.7):
        mark = int(len(names) * share) + rng.randrange(20)

        async def reached(mark: int = mark) -> bool:
            return await processed() >= mark

        async with worker(database_url, "none") as doomed:
            await until(reached)
            doomed.kill()
            await doomed.wait()
        killed_at_work += await processed() < len(names)
    assert killed_at_work
    async with worker(database_url, "none"):

        async def all_are() -> bool:
            return await processed() == len(names)

        await until(all_are)
    assert await effects(shop) == dict.fromkeys(names, 1)
