"""Twins, of which one is handled; ties, which a read decides; readers that read nothing twice and wait for nobody."""

import asyncio
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from kamiyo import database, inbox
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Registry
from tests.conftest import DEADLINE, MakeSettings, event_json
from tests.stripe_server import StripeServer
from tests.thin.conftest import NOW, House, house, pair, thin_json, waiting
from tests.turns import billing, due_now, example, put, row_of, statuses

# ── Twins ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("order", "name"),
    [
        ("snapshot first", "invoice.paid"),
        ("snapshot first", "v1.invoice.paid"),
        ("thin first", "invoice.paid"),
        ("together", "both"),
    ],
)
async def test_an_occurrence_is_handled_once_whoever_tells_it_first(
    order: str, name: str, db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    own, seen = Registry(), []

    @own.on(*(["invoice.paid", "v1.invoice.paid"] if name == "both" else [name]))
    async def sees(event: Event, db: Connection) -> None:
        seen.append((event.id, event.object["id"]))

    paid = example("invoice", id="in_1", customer="cus_1", status="paid")
    stripe.show(paid)
    snapshot, thin = pair("invoice.paid", paid)
    together = [[snapshot, thin]]
    batches = {"snapshot first": [[snapshot], [thin]], "thin first": [[thin], [snapshot]], "together": together}
    async with house(database_url, settings, stripe, own) as here:
        for batch in batches[order]:
            await put(db, *batch)
            await here.work(db)
    first = "evt_65thin" if order == "thin first" else "evt_snap"
    assert seen == [(first, "in_1")]
    outcomes = await db.fetch("SELECT event_id, outcome FROM webhook_events")
    assert dict(map(tuple, outcomes)) == {first: "handled", ({"evt_snap", "evt_65thin"} - {first}).pop(): "paired"}
    assert len(stripe.paths) == (order == "thin first"), "what a snapshot has shown needs no read"


@pytest.mark.parametrize("first", ["snapshot", "thin"])
async def test_of_twins_in_two_workers_hands_one_waits_for_what_becomes_of_the_other(
    first: str, db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    own, seen = Registry(), []
    begun, go_on = asyncio.Event(), asyncio.Event()

    @own.on("invoice.paid")
    async def slow(event: Event, db: Connection) -> None:
        begun.set()
        await go_on.wait()
        seen.append(event.id)

    # Different lanes, as where Stripe names the customer to one of them only.
    paid = example("invoice", id="in_1", customer=None, customer_account=None, status="paid")
    stripe.show({**paid, "customer": "cus_1"})
    snapshot, thin = pair("invoice.paid", paid)
    if first == "thin":
        snapshot, thin = thin, snapshot
    other = await database.connect(database_url, application="other worker")
    async with house(database_url, settings, stripe, own) as here:
        await put(db, snapshot)
        if first == "thin":
            await here.worker.run_once(db)
            await here.reader.run_once()
        slowly = asyncio.create_task(here.worker.run_once(db))
        await begun.wait()
        await put(other, thin)
        await here.worker.run_once(other)
        if first == "snapshot":
            await here.reader.run_once()
            await here.worker.run_once(other)
        left = await other.fetch("SELECT status, attempts FROM webhook_events WHERE status = 'pending'")
        assert [tuple(row) for row in left] == [("pending", 0)], "it was given back untried"
        go_on.set()
        await slowly
        await due_now(db)
        await here.work(db)
    await other.close()
    assert seen == [{"snapshot": "evt_snap", "thin": "evt_65thin"}[first]]
    assert set((await statuses(db)).values()) == {"processed"}


@pytest.mark.parametrize("first", ["snapshot", "thin"])
async def test_when_one_twin_failed_the_other_does_it_and_the_failed_one_has_nothing_left_to_do(
    first: str, db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    own, seen = Registry(), []

    @own.on("invoice.paid")
    async def fails_once(event: Event, db: Connection) -> None:
        seen.append(event.id)
        if len(seen) == 1:
            raise ValueError("not yet")

    paid = example("invoice", id="in_1", customer="cus_1", status="paid")
    stripe.show(paid)
    both = pair("invoice.paid", paid)
    async with house(database_url, settings, stripe, own, KAMIYO_FIRST_RETRY_DELAY=3600) as here:
        for body in both if first == "snapshot" else both[::-1]:
            await put(db, body)
            await here.work(db)
        order = ["evt_snap", "evt_65thin"] if first == "snapshot" else ["evt_65thin", "evt_snap"]
        assert await statuses(db) == {order[0]: "failed", order[1]: "processed"}
        await due_now(db)
        await here.work(db)
    assert seen == order
    assert (await row_of(db, order[0]))["outcome"] == "paired"


async def test_a_twin_that_was_cleaned_up_still_counts(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    own, seen = Registry(), []

    @own.on("invoice.paid")
    async def sees(event: Event, db: Connection) -> None:
        seen.append(event.id)

    paid = example("invoice", id="in_1", customer="cus_1", status="paid")
    stripe.show(paid)
    snapshot, thin = pair("invoice.paid", paid)
    async with house(database_url, settings, stripe, own) as here:
        await put(db, snapshot)
        await here.work(db)
        assert await inbox.prune(db, await db.fetchval("SELECT now() + interval '1 minute'")) == 1
        await put(db, thin)
        await here.work(db)
    assert seen == ["evt_snap"]


# ── Ties ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_no_event_decides_is_read_by_one_of_many(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    shown: Sequence[dict[str, Any]] = [
        example("customer", id="cus_1", name="Ada"),
        example("subscription", id="sub_1", customer="cus_1", status="active"),
        example("payment_method", id="pm_1", customer="cus_1"),
    ]
    types = ("customer.updated", "customer.subscription.updated", "payment_method.updated")
    bodies = [
        event_json(None, kind, {**one, "metadata": {"k": now}}, previous={"metadata": {"k": before}}, created=NOW)
        for one, kind in zip(shown, types, strict=True)
        for now, before in (("1", "2"), ("2", "1"))
    ]
    await put(db, *bodies)
    async with house(database_url, settings, stripe) as here, house(database_url, settings, stripe) as there:
        await here.work(db)
        assert {row["order_evidence"] for row in (await billing(db)).values()} == {"undecided"}
        stripe.show(*({**one, "metadata": {"k": "1"}} for one in shown[:2]))  # and the card is nowhere any more
        settled = await asyncio.gather(*(one.reader.settle_undecided(every=60) for one in (here, there)))
        assert sorted(settled) == [0, 2]
        assert sorted(stripe.paths) == ["/v1/customers/cus_1", "/v1/payment_methods/pm_1", "/v1/subscriptions/sub_1"]
        tables = await billing(db)
        assert [tables[place]["metadata"] for place in (("customers", "cus_1"), ("subscriptions", "sub_1"))] == [
            {"k": "1"},
            {"k": "1"},
        ]
        evidence = {place[1]: row["order_evidence"] for place, row in tables.items()}
        assert evidence == {"cus_1": "decided", "sub_1": "decided", "pm_1": "undecided"}
        await db.execute("UPDATE webhook_api_budget SET undecided_try_at = now()")
        assert await here.reader.settle_undecided() == 0
        assert len(stripe.paths) == 3, "what Stripe does not have is not asked for again and again"


async def test_many_rows_that_no_event_decides_are_read_in_one_turn(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    everybody = [example("customer", id=f"cus_{number}") for number in range(45)]
    await put(
        db,
        *(
            event_json(None, "customer.updated", {**one, "name": now}, previous={"name": before}, created=NOW)
            for one in everybody
            for now, before in (("Ada", "Bo"), ("Bo", "Ada"))
        ),
    )
    stripe.show(*({**one, "name": "Ada"} for one in everybody))
    async with house(database_url, settings, stripe) as here:
        await here.work(db)
        assert await here.reader.settle_undecided() == len(everybody)
    rows = (await billing(db)).values()
    assert {(row["name"], row["order_evidence"]) for row in rows} == {("Ada", "decided")}


async def test_what_was_read_for_a_thin_event_that_its_twin_left_nothing_to_do_still_decides_its_row(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    ada = example("customer", id="cus_1", name="Ada", metadata={})
    marked = {**ada, "metadata": {"k": "1"}}
    stripe.show(ada)
    async with house(database_url, settings, stripe) as here:
        await put(db, thin_json("v1.customer.updated", ada, "evt_65thin", snapshot_event="evt_a"))
        await here.worker.run_once(db)
        assert await here.reader.run_once() == 1
        # It is read; but before a worker comes to it, another has what both snapshots tell: a change and its undoing.
        await db.execute("UPDATE webhook_events SET next_try_at = now() + interval '1 hour'")
        await put(
            db,
            event_json("evt_a", "customer.updated", ada, previous={"metadata": {"k": "1"}}, created=NOW),
            event_json("evt_z", "customer.updated", marked, previous={"metadata": {"k": None}}, created=NOW),
        )
        while await here.worker.run_once(db):
            pass
        await due_now(db)
        await here.work(db)
        assert (await row_of(db, "evt_65thin"))["outcome"] == "paired"
        row = (await billing(db))["customers", "cus_1"]
        assert (row["order_evidence"], row["metadata"]) == ("undecided", {"k": "1"})
        assert await here.reader.settle_undecided() == 1
    row = (await billing(db))["customers", "cus_1"]
    assert (row["order_evidence"], row["metadata"]) == ("decided", {})
    assert stripe.paths == ["/v1/customers/cus_1"], "what it has said already is not asked for again"


@pytest.mark.parametrize("answer", [200, 500, 403, 400])
async def test_a_reader_waits_for_no_worker_that_is_just_claiming_what_it_reads(
    answer: int, db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    ada = example("customer", id="cus_1")
    stripe.show(ada)
    stripe.faults = [answer]
    names = [f"evt_65{number}" for number in range(3)]
    await put(db, *(thin_json("v1.customer.updated", ada, name) for name in names))
    async with house(database_url, settings, stripe) as here:
        await here.worker.run_once(db)
        # An hour later a worker looks at them as well. In the middle of its claim it has the last of them, and comes to
        # the others next.
        await due_now(db)
        async with db.transaction():
            await db.execute("SELECT FROM webhook_events WHERE event_id = 'evt_652' FOR UPDATE")
            async with asyncio.timeout(DEADLINE):
                assert await here.reader.run_once() == 1
                here.reader._taken["cus_1", "", False] = names
                await here.reader.renew()
            await db.execute("SELECT FROM webhook_events FOR UPDATE")
    assert len(stripe.paths) == 1
    died = {"evt_650", "evt_651"} if answer == 400 else set()
    assert {name for name, status in (await statuses(db)).items() if status == "failed"} == died
    assert {"evt_652"} <= set(await waiting(db)) == set(names) - died


async def test_a_reader_waits_for_no_worker_that_is_just_claiming_what_its_twin_has_told(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    snapshot, thin = pair("invoice.paid", example("invoice", id="in_1", status="paid"))
    async with house(database_url, settings, stripe) as here:
        await put(db, thin)
        await here.worker.run_once(db)
        await put(db, snapshot)
        await here.worker.run_once(db)
        await db.execute("UPDATE webhook_events SET read_try_at = now() + interval '1 hour' WHERE read_due_at <= now()")
        async with db.transaction():
            await db.execute("SELECT FROM webhook_events WHERE event_id = 'evt_65thin' FOR UPDATE")
            async with asyncio.timeout(DEADLINE):
                assert await here.reader.run_once() == 0
        assert await here.reader.run_once() == 1
    assert await waiting(db) == []


async def test_two_readers_read_nothing_twice(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    objects = [example("customer", id=f"cus_{number}") for number in range(30)]
    stripe.show(*objects)
    await put(db, *(thin_json("v1.customer.updated", one) for one in objects for _ in range(3)))
    async with house(database_url, settings, stripe) as here, house(database_url, settings, stripe) as there:
        while await here.worker.run_once(db):
            pass
        other: asyncpg.Connection[Any] = await database.connect(database_url, application="other")

        async def work(one: House, own: Connection) -> None:
            while await waiting(own):
                await one.reader.run_once()

        await asyncio.gather(work(here, db), work(there, other))
        await here.work(db)
        await other.close()
    assert sorted(stripe.paths) == sorted(f"/v1/customers/cus_{number}" for number in range(30))
    assert set((await statuses(db)).values()) == {"processed"}
