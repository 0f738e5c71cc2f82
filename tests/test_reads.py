"""Stories of reads: an object as Stripe's API gave it takes its place among the events, and never another's."""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from kamiyo import database, inbox, projections, reads, rebuild
from kamiyo.database import Connection, Pool
from kamiyo.event import lane_of
from kamiyo.projections import ProjectionError, Read, row_of_read
from kamiyo.shapes import PATHS
from kamiyo.stripe_api import StripeApi
from tests.conftest import ROOT, MakeSettings, event_json
from tests.stripe_server import HANGS, KEY, StripeServer, stripe_server
from tests.turns import NOW, billing, example, put, work_off, worker_on


@pytest.fixture
async def stripe() -> AsyncIterator[StripeServer]:
    async with stripe_server() as server:
        yield server


@contextlib.asynccontextmanager
async def asking(url: str, settings: MakeSettings, stripe: StripeServer, **changes: Any) -> AsyncIterator[StripeApi]:
    pool = await database.open_pool(url, size=4, application="reads", idle_limit=60)
    changed = {"STRIPE_SECRET_KEY": KEY, "STRIPE_API_BASE": stripe.base, "KAMIYO_STRIPE_API_RATE": 100, **changes}
    api = StripeApi(pool, settings(**changed))
    try:
        yield api
    finally:
        await api.close()
        pool.terminate()


def pool_of(api: StripeApi) -> Pool:
    return api._pool


def read_of(obj: dict[str, Any], second: int = NOW, **more: Any) -> Read:
    kind, body = obj.get("object", "customer"), json.dumps(obj).encode()
    return Read(kind, obj["id"], "", False, body, second, **{"source": "audit", **more})


async def applied(db: Connection, *told: Read) -> None:
    async with db.transaction():
        result = await reads.apply(db, told)
    assert (result.held_up, result.unreadable) == ([], [])


# ── Its place ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_read_outranks_what_happened_before_its_second_and_nothing_of_it(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings())
    ada = example("customer", name="Ada")
    told = {NOW - 2: "of before", NOW - 1: "of the second before", NOW: "of the very second", NOW + 1: "of later"}
    for created, name in told.items():
        for order in (1, -1):
            for door in ("read", "event")[::order]:
                if door == "read":
                    await applied(db, read_of({**ada, "name": "as read"}, NOW))
                else:
                    await put(db, event_json(None, "customer.updated", {**ada, "name": name}, created=created))
                await work_off(worker, db)
            [row] = (await billing(db, [ada["id"]])).values()
            assert row["name"] == ("as read" if created < NOW else name), (name, order)
            assert row["order_evidence"] == "decided"
            await rebuild.rebuild(db)
            assert list((await billing(db, [ada["id"]])).values()) == [row]
            await db.execute("DELETE FROM billing.customers")
            await db.execute("DELETE FROM webhook_reads")
            await db.execute("DELETE FROM webhook_events")


async def test_a_tie_of_the_second_before_is_settled_by_a_read_and_stays_so(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings())
    ada = example("customer", name="Ada")
    bodies = [
        event_json(None, "customer.updated", {**ada, "name": name}, previous=before, created=NOW)
        for name, before in (("Bo", {"name": "Ada"}), ("Ada", {"name": "Bo"}))
    ]
    await put(db, *bodies)
    await work_off(worker, db)
    [row] = (await billing(db)).values()
    assert row["order_evidence"] == "undecided"

    await applied(db, read_of({**ada, "name": "Bo"}, NOW + 1, source=row["last_webhook_event_id"]))
    # One more event of that second, late: it is evidence for nothing any more.
    await put(db, event_json(None, "customer.updated", {**ada, "name": "Cy"}, previous={"name": "Bo"}, created=NOW))
    await work_off(worker, db)
    [row] = (await billing(db)).values()
    assert (row["name"], row["order_evidence"]) == ("Bo", "decided")
    await rebuild.rebuild(db)
    assert list((await billing(db)).values()) == [row]


async def test_a_final_state_is_not_left_because_an_older_answer_came_late(db: Connection) -> None:
    paid = example("invoice", status="paid")
    await applied(db, read_of(paid, NOW))
    await applied(db, read_of({**paid, "status": "open"}, NOW + 5))
    [row] = (await billing(db)).values()
    assert row["status"] == "paid"
    [[stored]] = (await projections.reads_of(db, [(paid["id"], "", False)])).values()
    assert (stored.read.second, stored.asked_to) == (NOW, NOW + 5), "that it was asked again is remembered"


# ── Gone ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_deleted_customer_keeps_what_was_known_whoever_told_it(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings())
    ada = example("customer", name="Ada")
    gone = {"id": ada["id"], "object": "customer", "deleted": True}
    await applied(db, read_of(ada, NOW))
    await applied(db, read_of(gone, NOW + 9))
    [row] = (await billing(db)).values()
    assert (row["name"], row["deleted_at"]) == ("Ada", NOW + 9), "no event has told when; the read is a bound"
    await rebuild.rebuild(db)
    assert list((await billing(db)).values()) == [row]

    await put(db, event_json("evt_gone", "customer.deleted", gone, created=NOW + 4))
    await work_off(worker, db)
    [row] = (await billing(db)).values()
    assert (row["name"], row["deleted_at"], row["last_webhook_event_id"]) == ("Ada", NOW + 4, "evt_gone")
    await rebuild.rebuild(db)
    assert list((await billing(db)).values()) == [row]


async def test_a_bare_404_ends_no_life_but_one_that_an_event_has_ended(db: Connection) -> None:
    for kind in ("customer", "invoice", "payment_method", "subscription"):
        one = example(kind, customer="cus_1", name="Ada")
        await applied(db, read_of(one, NOW))
        before = await billing(db, [one["id"]])
        await applied(db, replace(read_of(one, NOW + 5), body=b""))
        assert await billing(db, [one["id"]]) == before, kind
        await applied(db, replace(read_of(one, NOW + 6, ended=NOW + 2), body=b""))
        after = await billing(db, [one["id"]])
        if kind == "subscription":
            assert after == before
            continue
        [(place, row)] = after.items()
        ended = "detached_at" if kind == "payment_method" else "deleted_at"
        changed = {name for name in row if row[name] != before[place][name]} - {"last_webhook_updated_at"}
        noted = {"last_event_rank", "last_shown_rank", "last_shown_event_id"}
        assert changed == {ended, *noted} | ({"customer"} if kind == "payment_method" else set())
        assert row["last_shown_rank"] == before[place]["last_event_rank"]
        assert row[ended] == NOW + 2
        await rebuild.rebuild(db)
        assert await billing(db, [one["id"]]) == after


async def test_a_payment_method_without_a_customer_is_detached_where_an_event_said_so(db: Connection) -> None:
    card = example("payment_method", customer=None)
    await applied(db, read_of(card, NOW))
    [row] = (await billing(db)).values()
    assert (row["customer"], row["detached_at"]) == (None, None)
    await applied(db, read_of(card, NOW + 3, ended=NOW + 1))
    await applied(db, read_of(card, NOW + 5))  # another event led to this one; what was told is not forgotten
    [row] = (await billing(db)).values()
    assert row["detached_at"] == NOW + 1
    await rebuild.rebuild(db)
    assert list((await billing(db)).values()) == [row]


def test_what_is_no_object_of_ours_tells_no_row_and_nonsense_is_refused() -> None:
    assert row_of_read(read_of({"id": "ch_1", "object": "charge"})) is None
    with pytest.raises(ProjectionError):
        row_of_read(read_of({"id": "cus_1", "object": "customer", "balance": "much"}))


# ── Lanes ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_read_keeps_out_of_a_lane_that_a_worker_holds(db: Connection, database_url: str) -> None:
    invoice = example("invoice", customer="cus_1")
    other = await database.connect(database_url, application="a worker")
    try:
        for owner in ("cus_1", invoice["id"]):
            await other.execute("SELECT pg_advisory_lock(1800432, $1)", lane_of("", owner))
            async with db.transaction():
                result = await reads.apply(db, [read_of(invoice)])
            assert [read.object_id for read in result.held_up] == [invoice["id"]]
            assert await billing(db) == {}
            await inbox.unlock(other)
    finally:
        await other.close()
    await applied(db, read_of(invoice))
    assert len(await billing(db)) == 1


# ── From Stripe ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_answer_is_as_old_as_its_question(
    database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    ada = example("customer", id="cus_1")
    stripe.show(ada)
    async with asking(database_url, settings, stripe) as api:
        before = int(time.time())
        reply = await api.read(f"{PATHS['customer']}/cus_1")
        assert json.loads(reply.body) == reply.value == ada
        assert before - 1 <= reply.second < time.time()

        stripe.ahead, stripe.slow = 1000, 1.2
        before = int(time.time())
        reply = await api.read(f"{PATHS['customer']}/cus_1")
        # The `Date` says when the answer was ready; what it shows is from before.
        assert reply.second <= before + 1000


async def test_a_list_is_read_page_by_page_from_where_one_left_off(
    database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    stripe.show(*(example("customer", id=f"cus_{number}") for number in range(230)))
    stripe.show({"id": "cus_7", "object": "customer", "deleted": True})
    stripe.faults = [429, HANGS]
    async with asking(database_url, settings, stripe, KAMIYO_STRIPE_API_TIMEOUT=0.2) as api:
        pages = [(len(page.value["data"]), last) async for page, last in api.pages(PATHS["customer"])]
        assert pages == [(100, False), (100, False), (29, True)]
        rest = [page.value["data"] async for page, _ in api.pages(PATHS["customer"], after="cus_2")]
    assert [one["id"] for one in rest[0]] == ["cus_1", "cus_0"]


# ── Within a budget ─────────────────────────────────────────────────────────────────────────────────────────

# A process of its own, that reads as fast as it may.
_READS = """
import asyncio, os, sys
from kamiyo import database
from kamiyo.settings import Settings
from kamiyo.stripe_api import StripeApi

async def main():
    settings = Settings(_env_file=None)
    pool = await database.open_pool(settings.database_url.get_secret_value(), size=8, application="p", idle_limit=60)
    api = StripeApi(pool, settings)
    print("ready", flush=True)
    sys.stdin.readline()
    await asyncio.gather(*(api.read("/v1/customers/cus_1") for _ in range(12)))
    await api.close()
    await pool.close()

asyncio.run(main())
"""


async def test_two_processes_keep_one_budget_and_both_pause_when_stripe_says_so(
    db: Connection, database_url: str, stripe: StripeServer
) -> None:
    stripe.show(example("customer", id="cus_1"))
    stripe.retry_after = "3"
    variables = {
        "DATABASE_URL": database_url,
        "STRIPE_SECRET_KEY": KEY,
        "STRIPE_API_BASE": stripe.base,
        "KAMIYO_STRIPE_API_RATE": "20",
    }
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _READS),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | variables | {"PYTHONPATH": str(ROOT)},
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    await db.execute("UPDATE webhook_api_budget SET tokens = 0, filled_at = now()")
    stripe.faults = [200] * 5 + [429]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        await process.stdin.drain()
    for process in processes:
        assert await process.wait() == 0
    at = stripe.asked_at
    assert len(at) == 25, "each got its answer, one of them at the second try"
    # What was on its way when Stripe said "too much" had gone out; then nobody asked for a second.
    pause, after = max((later - earlier, number) for number, (earlier, later) in enumerate(pairwise(at)))
    assert pause > 1.5, "three seconds, but for how long what was on its way still took"
    for part in (at[: after + 1], at[after + 1 :]):
        assert len(part) - 1 <= 20 * (part[-1] - part[0]) + 20, "20 a second, and what had gathered meanwhile"
    assert await db.fetchval("SELECT refusals FROM webhook_api_budget") == 0
