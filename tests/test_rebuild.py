"""Stories of a rebuild that meets what it does not expect: rows which only the database refuses, another rebuild."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kamiyo import database
from kamiyo.cli.main import main
from kamiyo.database import Connection
from kamiyo.rebuild import RowsWouldGoBack, rebuild
from kamiyo.refused import Refusal
from kamiyo.worker import Worker
from tests.conftest import Log, MakeSettings, event_json, until, waiting_for_locks
from tests.turns import NOW, billing, example, put, statuses, work_off, worker_on


@pytest.fixture
async def worker(database_url: str, settings: MakeSettings) -> Worker:
    return await worker_on(database_url, settings(KAMIYO_MIRROR="all"))


@contextlib.asynccontextmanager
async def refusing(db: Connection, table: str, check: str) -> AsyncIterator[None]:
    """Meanwhile the table has a constraint of its owner's, for new rows."""
    await db.execute(f"ALTER TABLE {table} ADD CONSTRAINT of_the_owners CHECK ({check}) NOT VALID")
    try:
        yield
    finally:
        await db.execute(f"ALTER TABLE {table} DROP CONSTRAINT of_the_owners")


def customer(name: str, event_id: str, customer_id: str, created: int = NOW) -> bytes:
    kind = "customer.created" if created == NOW else "customer.updated"
    return event_json(event_id, kind, example("customer", id=customer_id, name=name), created=created)


async def command(monkeypatch: pytest.MonkeyPatch, url: str, folder: Path) -> int | str | None:
    """The exit status of `kamiyo rebuild`."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setattr("sys.argv", ["kamiyo", "rebuild"])

    def run() -> int | str | None:
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0

    return await asyncio.to_thread(run)


# ── What only the database refuses ──────────────────────────────────────────────────────────────────────────────


async def test_a_row_that_only_the_database_refuses_is_named_and_all_others_are_made_again(
    db: Connection,
    database_url: str,
    worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    others = [customer("Ada", f"evt_{number}", f"cus_{number}") for number in range(30)]
    async with refusing(db, "billing.customers", "name <> 'Jenny Rosen'"):
        await put(
            db,
            *(*others[:15], customer("Bo", "evt_bo", "cus_bo"), customer("Jenny Rosen", "evt_never", "cus_never")),
            *(customer("Jenny Rosen", "evt_jenny", "cus_bo", NOW + 1), *others[15:]),
            *(customer("Jenny Rosen", "evt_early", "cus_0", NOW + 1), customer("Ada", "evt_late", "cus_0", NOW + 2)),
        )
        await work_off(worker, db)
        before = await billing(db)
        assert before["customers", "cus_bo"]["name"] == "Bo" and ("customers", "cus_never") not in before
        dead = {event_id for event_id, status in (await statuses(db)).items() if status == "failed"}
        assert dead >= {"evt_never", "evt_jenny"}
        await db.execute("UPDATE billing.customers SET name = 'somebody wrote this' WHERE id = 'cus_7'")

        assert await command(monkeypatch, database_url, tmp_path) == 1
    assert await billing(db) == before
    told = capsys.readouterr()
    assert "the billing tables are rebuilt from 35 events" in told.out
    [sentence] = [line for line in told.err.splitlines() if line.startswith("kamiyo: ")]
    assert sentence.startswith("kamiyo: PostgreSQL refuses 2 rows: ")
    assert "customers cus_bo by evt_jenny (23514, of_the_owners)" in sentence
    assert "customers cus_never by evt_never (23514, of_the_owners)" in sentence
    assert "cus_0" not in sentence, "what comes after it stands"
    assert "Traceback" not in told.err and "Jenny Rosen" not in told.err + told.out


async def test_a_rebuild_that_would_lose_a_row_because_the_database_refuses_it_now_changes_nothing(
    db: Connection, worker: Worker, log: Log
) -> None:
    await put(
        db,
        *(customer("Ada", "evt_1", "cus_1"), customer("Bo", "evt_2", "cus_2")),
        customer("Jenny Rosen", "evt_3", "cus_2", NOW + 1),
    )
    await work_off(worker, db)
    await db.execute("UPDATE billing.customers SET email = 'x'")
    before = await billing(db)
    for check, lost in (("name <> 'Jenny Rosen'", "cus_2 by evt_3"), ("name <> 'Ada'", "cus_1 by evt_1")):
        async with refusing(db, "billing.customers", check):
            with pytest.raises(RowsWouldGoBack, match=rf"customers {lost} \(23514, of_the_owners\)") as caught:
                await rebuild(db)
        assert "Nothing was changed" in str(caught.value) and "Jenny Rosen" not in str(caught.value)
        assert await billing(db) == before
    lines = [(line["object_id"], line["event_id"]) for line in log() if line["event"] == "row_refused"]
    assert lines == [("cus_2", "evt_3"), ("cus_1", "evt_1")]
    assert await rebuild(db) == 3
    assert "x" not in {row["email"] for row in (await billing(db)).values()}


async def test_an_object_of_the_mirror_that_the_database_refuses_is_named_too(db: Connection, worker: Worker) -> None:
    async def shown() -> Sequence[Any]:
        return await db.fetch("SELECT * FROM stripe_objects ORDER BY id")

    await put(db, *(event_json(f"evt_{name}", obj={"id": name, "object": "charge"}) for name in ("ch_1", "ch_2")))
    async with refusing(db, "stripe_objects", "id <> 'ch_2'"):
        await work_off(worker, db)
        before, refused = await shown(), list[Refusal]()
        await rebuild(db, mirrored=frozenset({"all"}), heard=refused.append)
    assert [str(one) for one in refused] == ["stripe_objects charge ch_2 by evt_ch_2 (23514, of_the_owners)"]
    assert (await shown(), [row["id"] for row in before]) == (before, ["ch_1"])


# ── Another rebuild ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_rebuild_beside_another_says_whom_it_waits_for_and_is_done_when_that_is(
    db: Connection,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    await put(db, customer("Ada", "evt_1", "cus_1"))
    other = await database.connect(database_url, application="test other")
    try:
        async with other.transaction():
            await other.execute("LOCK TABLE stripe_objects")
            going_on = asyncio.create_task(rebuild(db, mirrored=frozenset({"all"})))
            await until(lambda: _waiting(other, 1))
            second = asyncio.create_task(command(monkeypatch, database_url, tmp_path))
            await until(lambda: _waiting(other, 2))
        assert (await going_on, await second) == (1, 0)
    finally:
        await other.close()
    told = capsys.readouterr()
    [sentence] = [line for line in told.err.splitlines() if line.startswith("kamiyo: ")]
    assert f"another session (pid {db.get_server_pid()}, test, since " in sentence
    assert "waits until that is done" in sentence and "Ctrl-C" in sentence
    assert await command(monkeypatch, database_url, tmp_path) == 0
    assert "waits" not in capsys.readouterr().err


async def _waiting(db: Connection, sessions: int) -> bool:
    return await waiting_for_locks(db) == sessions
