"""What operators meet at the command line when the route to PostgreSQL is lost, or PostgreSQL is away or busy."""

import asyncio
import contextlib
import gc
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from bench.chaos.crew import environment
from bench.chaos.ground import free_ports
from bench.chaos.proxy import carrying
from bench.chaos.stripe_api import KEY
from kamiyo import database
from kamiyo import rebuild as rebuilding
from kamiyo.cli import main as command_line_main
from kamiyo.cli.console import connected, run_command, until_broken_off
from kamiyo.database import Connection
from kamiyo.stripe_api import StripeApi, StripeUnavailable
from tests.conftest import MakeSettings, event_json, fresh_id, until
from tests.turns import NOW, example, put, work_off, worker_on


@contextlib.contextmanager
def _command(url: str, folder: Path, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """`kamiyo` with these words, which hears Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kamiyo", *words],
        cwd=folder,
        env=environment(DATABASE_URL=url, STRIPE_SECRET_KEY=KEY),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_ctrl_c_ends_a_command_whose_route_to_postgresql_is_lost(
    database_url: str, db: Connection, tmp_path: Path
) -> None:
    async with carrying(database_url) as proxy:
        async with db.transaction():
            await db.execute("LOCK TABLE billing.customers IN ROW EXCLUSIVE MODE")
            with _command(proxy.url, tmp_path, "rebuild") as rebuild:

                async def waits() -> bool:
                    # Not pg_stat_activity, which says the same all through a transaction.
                    return bool(await db.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

                await until(waits)
                proxy.blackhole(1.0, random.Random(0))
                rebuild.send_signal(signal.SIGINT)
                _, said = await asyncio.to_thread(rebuild.communicate, timeout=20)
        assert (rebuild.returncode, said) == (130, "")


async def test_a_rebuild_whose_route_is_lost_lets_go_of_the_tables(
    database_url: str, db: Connection, settings: MakeSettings
) -> None:
    event_id = fresh_id()
    await put(db, event_json(fresh_id(), "customer.updated", example("customer"), created=NOW))
    worker = await worker_on(database_url, settings())
    await work_off(worker, db)
    async with (
        carrying(database_url) as proxy,
        connected(settings(DATABASE_URL=proxy.url), idle_limit=0.5) as there,
    ):
        cut = asyncio.Event()

        def cut_off(_: int) -> None:
            proxy.blackhole(1.0, random.Random(0))
            cut.set()

        rebuilt = asyncio.create_task(until_broken_off(rebuilding.rebuild(there, progress=cut_off), there.terminate))
        await cut.wait()
        await put(db, event_json(event_id, "customer.updated", example("customer"), created=NOW + 1))
        await asyncio.wait_for(work_off(worker, db), 30)
        assert await db.fetchval("SELECT status FROM webhook_events WHERE event_id = $1", event_id) == "processed"
        rebuilt.cancel()
        await asyncio.wait([rebuilt])
    await worker.pool.close()


async def test_what_a_command_leaves_behind_with_a_lost_connection_is_no_traceback(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def giving_back_is_broken_off() -> None:
        async with carrying(database_url) as proxy:
            pool = await database.open_pool(proxy.url, size=1, application="test", idle_limit=60)
            lent = await pool.acquire()
            proxy.blackhole(1.0, random.Random(0))
            giving_back = asyncio.create_task(pool.release(lent))
            await asyncio.sleep(0)  # a turn of the loop, not a time: it has begun, and its answer will not come
            giving_back.cancel()
            await asyncio.wait([giving_back])
            pool.terminate()

    await asyncio.to_thread(run_command, giving_back_is_broken_off())
    gc.collect()
    assert caplog.text == ""
    # So that this can fail: the same, where nothing passes over it.
    await asyncio.to_thread(asyncio.run, giving_back_is_broken_off())
    gc.collect()
    assert "never retrieved" in caplog.text


async def test_what_goes_on_after_its_waiter_was_cancelled_is_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def fails() -> None:
        began.set()
        await go_on.wait()
        raise asyncpg.InterfaceError("connection is closed")

    before = asyncio.all_tasks()
    waiting = asyncio.create_task(database.to_the_end(fails()))
    await began.wait()
    [working] = asyncio.all_tasks() - before - {waiting}
    waiting.cancel()
    await asyncio.wait([waiting])
    go_on.set()
    await asyncio.wait([working])
    assert waiting.cancelled()
    del waiting, working  # what the one was cancelled in knows the other
    gc.collect()
    assert caplog.text == ""


@pytest.mark.parametrize("words", ["rebuild", "audit", "backfill customers", "reconcile"])
def test_a_command_without_postgresql_says_so_in_a_sentence(tmp_path: Path, words: str) -> None:
    [port] = free_ports(1)
    with _command(f"postgresql://nobody@127.0.0.1:{port}/nowhere", tmp_path, *words.split()) as command_line:
        _, said = command_line.communicate(timeout=60)
    assert command_line.returncode == 1
    assert said.startswith("kamiyo: Cannot connect to PostgreSQL: ConnectionRefusedError")
    assert "Traceback" not in said


async def test_a_command_that_postgresql_keeps_waiting_says_so_in_a_sentence(
    database_url: str,
    db: Connection,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("STRIPE_SECRET_KEY", KEY)
    monkeypatch.setattr("kamiyo.cli.console.IDLE_SECONDS", 0.3)
    monkeypatch.setattr(sys, "argv", ["kamiyo", "backfill", "customers"])
    async with db.transaction():
        await db.execute("LOCK TABLE webhook_backfills")
        with pytest.raises(SystemExit) as ended:
            await asyncio.to_thread(command_line_main)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "PostgreSQL did not answer in time." in said


async def test_a_database_that_keeps_us_waiting_is_not_taken_for_stripe(
    database_url: str, db: Connection, settings: MakeSettings
) -> None:
    pool = await database.open_pool(database_url, size=2, application="test", idle_limit=0.3)
    api = StripeApi(pool, settings(STRIPE_SECRET_KEY=KEY, STRIPE_API_BASE="http://127.0.0.1:9"))
    async with db.transaction():
        await db.execute("LOCK TABLE webhook_api_budget")
        with pytest.raises(
            StripeUnavailable, match="PostgreSQL did not answer in time while Stripe was asked for /v1/x"
        ):
            await api.read("/v1/x/cus_1")
    await api.close()
    await pool.close()
