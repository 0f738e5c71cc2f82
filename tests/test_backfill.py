"""Stories of the backfill: the billing tables from Stripe's lists, whatever happens meanwhile."""

import asyncio
import contextlib
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kamiyo import database, rebuild
from kamiyo.backfill import COLLECTIONS, BackfillTakenOver, Filled, backfill
from kamiyo.cli import console as commands
from kamiyo.cli.main import main
from kamiyo.database import Connection, Pool
from kamiyo.event import lane_of
from kamiyo.simulator import CURRENT_API_VERSION, World, lifecycle
from kamiyo.simulator.shapes import shape
from kamiyo.stripe_api import StripeApi, StripeRefused
from tests.conftest import ROOT, Log, MakeSettings, event_json, until
from tests.stripe_server import KEY, StripeServer, stripe_server
from tests.turns import NOW, Tables, billing, example, put, work_off, worker_on

#: The columns that say where a row is from, and not what it says.
ORIGIN = {
    *("last_webhook_event_id", "last_webhook_updated_at", "last_event_rank", "order_evidence"),
    *("last_shown_rank", "last_shown_event_id", "contested_by"),
}


@pytest.fixture
async def stripe() -> AsyncIterator[StripeServer]:
    async with stripe_server() as server:
        yield server


@contextlib.asynccontextmanager
async def asking(
    url: str, settings: MakeSettings, stripe: StripeServer, **changes: Any
) -> AsyncIterator[tuple[Pool, StripeApi]]:
    pool = await database.open_pool(url, size=10, application="backfill", idle_limit=60)
    # As much at once as the budget can hold: how it is kept is told elsewhere.
    changed = {"STRIPE_SECRET_KEY": KEY, "STRIPE_API_BASE": stripe.base, "KAMIYO_STRIPE_API_RATE": 100, **changes}
    api = StripeApi(pool, settings(**changed))
    try:
        yield pool, api
    finally:
        await api.close()
        pool.terminate()


def show_customers(stripe: StripeServer, count: int) -> list[str]:
    """As many customers, each of a second of its own; their ids, the newest first."""
    customers = [example("customer", id=f"cus_{n:03}", name="before", created=NOW - 1000 + n) for n in range(count)]
    stripe.show(*customers)
    return [one["id"] for one in reversed(customers)]


def show_world(stripe: StripeServer, world: World) -> None:
    """Everything that world's Stripe has at this moment."""
    for facts in (world.customers, world.subscriptions, world.invoices, world.payment_methods):
        for fact in facts.values():
            shown = shape(fact, CURRENT_API_VERSION, livemode=False)
            gone = getattr(fact, "deleted_at", None) is not None
            stripe.show({"id": fact.id, "object": shown["object"], "deleted": True} if gone else shown)


def lasting(world: World) -> Tables:
    """What Stripe's lists still show of that world: nobody deleted, nothing detached, no deleted customer's cards."""
    truth = world.truth()
    alive = {name for name, row in truth["customers"].items() if row["deleted_at"] is None}
    return {
        (table, name): row
        for table, rows in truth.items()
        for name, row in rows.items()
        if row.get("deleted_at") is None and (table != "payment_methods" or row["customer"] in alive)
    }


def said(rows: Tables) -> Tables:
    """What rows say, without where they are from."""
    return {place: {name: value for name, value in row.items() if name not in ORIGIN} for place, row in rows.items()}


def each(told: list[Filled]) -> dict[str, int]:
    return {one.collection: one.objects for one in told}


# ── On the command line ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "words", [("backfill", "customers"), ("audit", "--sample", "100%", "--repair", "--wait", "0")], ids=" ".join
)
async def test_beside_a_rebuild_that_takes_over_a_minute_a_command_says_so_and_what_to_do(
    words: tuple[str, ...],
    db: Connection,
    database_url: str,
    settings: MakeSettings,
    stripe: StripeServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_customers(stripe, 1)
    told = example("customer", id="cus_000", name="something else", created=NOW - 1000)
    await put(db, event_json(None, "customer.created", told, created=NOW - 500))
    await work_off(await worker_on(database_url, settings()), db)
    monkeypatch.setattr(commands, "IDLE_SECONDS", 1.0)
    monkeypatch.chdir(tmp_path)
    for name, value in {"DATABASE_URL": database_url, "STRIPE_SECRET_KEY": KEY, "STRIPE_API_BASE": stripe.base}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["kamiyo", *words])

    def run() -> int | str | None:
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    other = await database.connect(database_url, application="test slow")
    async with other.transaction():
        # The rebuild has the billing tables, and waits for those of the mirror.
        await other.execute("LOCK TABLE stripe_objects")
        rebuilding = asyncio.create_task(rebuild.rebuild(db, mirrored=frozenset({"all"})))
        waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'stripe_objects'::regclass AND NOT granted"
        await until(lambda: other.fetchval(waiting))
        status = await asyncio.to_thread(run)
    await other.close()
    await rebuilding
    said = capsys.readouterr().err
    assert (status, "Traceback" in said) == (1, False)
    assert "The billing tables are being made again (`kamiyo rebuild`)" in said and "Run this again" in said


# ── Filled ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_empty_tables_are_filled_with_what_stripes_lists_show(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    world, rng = World(5, start=NOW - 90 * 86400), random.Random(5)
    for _ in range(25):
        lifecycle(world, rng, steps=10)
    show_world(stripe, world)
    expected = lasting(world)
    assert {table for table, _ in expected} == set(COLLECTIONS)
    assert "canceled" in {row["status"] for (table, _), row in expected.items() if table == "subscriptions"}

    async with asking(database_url, settings, stripe) as (pool, api):
        done = await backfill(pool, api)
    rows = await billing(db)
    assert said(rows) == expected
    assert {row["last_webhook_event_id"] for row in rows.values()} == {"backfill"}
    assert each(done) == {table: sum(place[0] == table for place in expected) for table in COLLECTIONS}
    assert not [path for path in stripe.paths if path == "/v1/payment_methods"], "that list is for other purposes"
    await rebuild.rebuild(db)
    assert await billing(db) == rows


async def test_what_comes_in_while_it_runs_is_never_overwritten_and_never_lost(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    ids, rng = show_customers(stripe, 350), random.Random(3)
    worker = await worker_on(database_url, settings())
    unchanged, late = rng.sample(ids, len(ids)), list[bytes]()

    # One connection takes one question at a time, and the next page may come before this stream is through.
    by_turns = asyncio.Lock()

    async def stream() -> None:
        async with by_turns:
            await change_some()

    async def change_some() -> None:
        # Stripe changes some that are filled already and some that are not. Half of the events come at once, the other
        # half when everything is over.
        for number in range(40):
            customer = {**stripe.objects["", "customer", unchanged.pop()], "name": f"after {rng.random()}"}
            stripe.show(customer)
            body = event_json(None, "customer.updated", customer, created=int(time.time()))
            if number % 2:
                await put(db, body)
            else:
                late.append(body)
        await work_off(worker, db)

    streams: list[asyncio.Task[None]] = []
    async with asking(database_url, settings, stripe) as (pool, api):
        # A page is old when it comes, and its rows are written later still.
        stripe.slow = 0.05
        await backfill(*(pool, api, ["customers"]), progress=lambda *_: streams.append(asyncio.create_task(stream())))
    await asyncio.gather(*streams)
    await put(db, *late)
    await work_off(worker, db)
    rows = await billing(db)
    assert {name: row["name"] for (_, name), row in rows.items()} == {
        name: stripe.objects["", "customer", name]["name"] for name in ids
    }
    # Of those that changed before their page was read, the page may know as much as the event.
    assert 0 < sum(row["last_webhook_event_id"] != "backfill" for row in rows.values()) <= len(streams) * 40


# ── Broken off ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_killed_in_the_middle_it_goes_on_from_the_page_that_was_in(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    ids = show_customers(stripe, 420)
    stripe.slow = 0.4

    async def one_page_is_in() -> bool:
        return bool(await db.fetchval("SELECT objects >= 100 FROM webhook_backfills"))

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kamiyo", "backfill", "customers"),
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("KAMIYO_")},
            **{"DATABASE_URL": database_url, "STRIPE_SECRET_KEY": KEY, "STRIPE_API_BASE": stripe.base},
        },
    )
    try:
        await until(one_page_is_in)
    finally:
        process.kill()
        await process.wait()
    # Its session may be at a commit still.
    await until(
        lambda: db.fetchval(
            "SELECT count(*) = 0 FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name LIKE 'kamiyo%'"
        )
    )
    filled = len(await billing(db))
    assert 100 <= filled < 420
    assert filled == await db.fetchval("SELECT objects FROM webhook_backfills"), "rows and cursor commit together"

    stripe.slow, before = 0.0, len(stripe.asked)
    async with asking(database_url, settings, stripe) as (pool, api):
        [done] = await backfill(pool, api, ["customers"])
    assert sorted(name for _, name in await billing(db)) == sorted(ids)
    last_in = NOW - 1000 + 420 - filled
    assert f"created[lte]={last_in}" in stripe.asked[before]
    # The object of that second was read twice.
    assert done.objects == 420 + 1
    assert len(stripe.asked) - before == (420 - filled + 1 + 99) // 100


async def test_the_object_behind_which_it_would_go_on_may_be_gone(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    ids = show_customers(stripe, 250)

    def page(collection: str, objects: int) -> None:
        if objects == 100:
            stripe.forget("customer", ids[99])

    async with asking(database_url, settings, stripe) as (pool, api):
        await backfill(pool, api, ["customers"], progress=page)
        assert len(await billing(db)) == 250
        stripe.forbidden.add("/v1/invoices")
        with pytest.raises(StripeRefused, match="STRIPE_SECRET_KEY for GET /v1/invoices"):
            await backfill(pool, api, ["invoices"])


@pytest.mark.parametrize("times", [1, 1000])
async def test_a_card_that_is_detached_between_two_pages_begins_its_customers_list_again_and_not_for_ever(
    times: int,
    db: Connection,
    database_url: str,
    settings: MakeSettings,
    stripe: StripeServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [customer] = show_customers(stripe, 1)
    cards = [example("payment_method", id=f"pm_{n:03}", customer=customer, created=NOW - n) for n in range(250)]
    stripe.show(*cards)
    path, behind, answer = f"/v1/customers/{customer}/payment_methods", cards[99:], stripe.answer

    async def answer_and_detach_the_last_of_the_page(request: Any, call: Any) -> Any:
        said = await answer(request, call)
        if request.url.path == path and "starting_after" not in request.query_params and len(behind) > 151 - times:
            stripe.show({**behind.pop(0), "customer": None})
        return said

    monkeypatch.setattr(stripe, "answer", answer_and_detach_the_last_of_the_page)
    async with asking(database_url, settings, stripe) as (pool, api):
        filling = backfill(pool, api, ["payment_methods"])
        if times == 1:
            [done] = await filling
            assert done.objects == len(await billing(db)) == 249
            assert stripe.paths.count(path) == 2 + 3, "two of the first list, three of the next"
        else:
            with pytest.raises(StripeRefused, match="resource_missing"):
                await filling
            assert stripe.paths.count(path) <= 10


async def test_all_of_it_goes_on_where_it_was_and_begins_again_when_it_was_finished(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    show_customers(stripe, 3)
    stripe.show(*(example(kind, customer="cus_001") for kind in ("subscription", "invoice", "payment_method")))
    async with asking(database_url, settings, stripe) as (pool, api):
        stripe.forbidden.add("/v1/invoices")
        with pytest.raises(StripeRefused):
            await backfill(pool, api)
        stripe.forbidden.clear()
        assert each(await backfill(pool, api)) == {"invoices": 1, "payment_methods": 1}
        everything = {"customers": 3, "subscriptions": 1, "invoices": 1, "payment_methods": 1}
        assert each(await backfill(pool, api)) == everything
        stripe.forbidden.add("/v1/customers")
        with pytest.raises(StripeRefused):
            await backfill(pool, api, ["customers"])
        stripe.forbidden.clear()
        assert each(await backfill(pool, api, restart=True)) == everything
    assert len(await billing(db)) == 6


async def test_a_later_run_takes_over_and_the_earlier_one_says_so(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    show_customers(stripe, 150)
    async with asking(database_url, settings, stripe) as (pool, api):
        taken_over = asyncio.Event()

        def one_is_in(collection: str, objects: int) -> None:
            if objects:
                stripe.held = taken_over

        earlier = asyncio.create_task(backfill(pool, api, ["customers"], progress=one_is_in))

        async def its_second_page_is_on_its_way() -> bool:
            return len(stripe.asked) == 2

        await until(its_second_page_is_on_its_way)
        stripe.held = None
        await backfill(pool, api, ["customers"])
        taken_over.set()
        with pytest.raises(BackfillTakenOver, match="another run"):
            await earlier
    assert len(await billing(db)) == 150


# ── Beside others ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_lane_that_a_worker_holds_keeps_only_its_customer_waiting_and_the_page_from_counting(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    show_customers(stripe, 3)
    worker = await database.connect(database_url, application="a worker")
    await worker.execute("SELECT pg_advisory_lock(1800432, $1)", lane_of("", "cus_001"))
    async with asking(database_url, settings, stripe) as (pool, api):
        filling = asyncio.create_task(backfill(pool, api, ["customers"]))

        async def the_others_are_in() -> bool:
            return len(await billing(db)) == 2

        await until(the_others_are_in)
        assert await db.fetchval("SELECT filled_from FROM webhook_backfills") is None
        await worker.close()
        assert each(await filling) == {"customers": 3}
    assert len(await billing(db)) == 3


async def test_however_many_cards_a_page_of_customers_has_few_lanes_are_taken_at_once(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    # Lanes are locks, and PostgreSQL's table of locks is everybody's: full, it would refuse workers and deliveries.
    [customer] = show_customers(stripe, 1)
    stripe.show(*(example("payment_method", id=f"pm_{n:04}", customer=customer, created=NOW + n) for n in range(1100)))
    async with asking(database_url, settings, stripe) as (pool, api):
        [done] = await backfill(pool, api, ["payment_methods"])
    assert done.objects == len(await billing(db)) == 1100
    largest = "SELECT max(n) FROM (SELECT count(*) AS n FROM billing.payment_methods GROUP BY xmin::text) AS commits"
    assert await db.fetchval(largest) <= 500


async def test_an_object_that_stripe_never_documented_is_told_and_passed_over(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer, log: Log
) -> None:
    show_customers(stripe, 2)
    stripe.show(example("customer", id="cus_odd", balance="much"), example("customer", id="cus_nul", name="a\0b"))
    async with asking(database_url, settings, stripe) as (pool, api):
        [done] = await backfill(pool, api, ["customers"])
    assert (done.objects, done.unreadable) == (4, 1)
    assert {name for _, name in await billing(db)} == {"cus_000", "cus_001", "cus_nul"}
    [line] = [line for line in log() if line["event"] == "object_unreadable"]
    assert (line["object_id"], line["object_type"]) == ("cus_odd", "customer")


async def test_a_row_that_only_the_database_refuses_is_named_and_all_others_are_filled(
    db: Connection,
    database_url: str,
    stripe: StripeServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    log: Log,
) -> None:
    names = set(show_customers(stripe, 150))
    stripe.show(example("customer", id="cus_bad", name="Jenny Rosen", created=NOW - 950))
    monkeypatch.chdir(tmp_path)
    for name, value in {"DATABASE_URL": database_url, "STRIPE_SECRET_KEY": KEY, "STRIPE_API_BASE": stripe.base}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["kamiyo", "backfill", "customers"])

    def run() -> int | str | None:
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    await db.execute("ALTER TABLE billing.customers ADD CONSTRAINT of_the_owners CHECK (name <> 'Jenny Rosen')")
    try:
        status = await asyncio.to_thread(run)
    finally:
        await db.execute("ALTER TABLE billing.customers DROP CONSTRAINT of_the_owners")
    said = capsys.readouterr()
    assert (status, {name for _, name in await billing(db)}) == (1, names), said.err
    assert "customers: 151 objects in, 1 refused by PostgreSQL" in said.out
    [line] = [line for line in log() if line["event"] == "row_refused"]
    assert (line["object_id"], line["reason"]) == ("cus_bad", "23514, of_the_owners")
    assert "kamiyo backfill customers --restart" in said.err
    assert "Traceback" not in said.err and "Jenny Rosen" not in f"{said}{log()}"
    assert await db.fetchval("SELECT count(*) FROM webhook_reads") == 150, "what has no row is not kept for a rebuild"


async def test_a_connected_account_has_its_own_rows_and_its_own_way(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    stripe.show(example("customer", id="cus_1", name="ours"))
    stripe.show(example("customer", id="cus_1", name="theirs"), account="acct_1")
    async with asking(database_url, settings, stripe) as (pool, api):
        for account in ("", "acct_1"):
            await backfill(pool, api, ["customers"], account=account)
    rows = await db.fetch("SELECT account, name FROM billing.customers ORDER BY account")
    assert [tuple(row) for row in rows] == [("", "ours"), ("acct_1", "theirs")]
    assert await db.fetchval("SELECT count(*) FROM webhook_backfills WHERE finished_at IS NOT NULL") == 2
