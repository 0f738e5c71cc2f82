"""Stories of thin events: they name an object, which is read from Stripe; and of their twins, which show it."""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest

from kamiyo import alerts, database, handlers, inbox, rebuild
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Registry
from kamiyo.reader import Reader
from kamiyo.stripe_api import StripeApi
from kamiyo.web import create_app
from kamiyo.worker import Worker
from tests.conftest import (
    DEADLINE,
    ROOT,
    SECRET,
    Log,
    MakeSettings,
    deliver,
    event_json,
    fresh_id,
    noop,
    running_client,
    settled,
    until,
)
from tests.stripe_server import HANGS, KEY, StripeServer, stripe_server
from tests.test_telemetry import counted
from tests.turns import billing, die, due_now, example, no_lanes_held, put, row_of, statuses

#: Some second at Stripe that is over.
NOW = int(time.time()) - 3600


def thin_json(
    kind: str, about: dict[str, Any] | None, event_id: str = "", *, created: int = NOW, **envelope: Any
) -> bytes:
    """A thin event as Stripe words it; it names `about`."""
    related = {}
    if about:
        url = f"/v1/{about['object']}s/{about['id']}"
        related = {"related_object": {"id": about["id"], "type": about["object"], "url": url}}
    return json.dumps(
        {
            "id": event_id or fresh_id("evt_65"),
            "object": "v2.core.event",
            "type": kind,
            "livemode": False,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(created)),
            "context": None,
            **related,
            **envelope,
        }
    ).encode()


@dataclass
class House:
    """A worker and a reader of one process, whose turns the test takes, and the Stripe that they ask."""

    stripe: StripeServer
    worker: Worker
    reader: Reader
    api: StripeApi

    async def work(self, db: Connection) -> None:
        """Until nothing is due any more, to be run or to be read."""
        while await self.worker.run_once(db) or await self.reader.run_once():
            pass


@contextlib.asynccontextmanager
async def house(
    url: str, settings: MakeSettings, stripe: StripeServer, registry: Registry | None = None, **changes: Any
) -> AsyncIterator[House]:
    changed = {"STRIPE_SECRET_KEY": KEY, "STRIPE_API_BASE": stripe.base, "KAMIYO_STRIPE_API_RATE": 100, **changes}
    own = registry if registry is not None else Registry()
    pool = await database.open_pool(url, size=12, application="house", idle_limit=60)
    api = StripeApi(pool, settings(**changed))
    try:
        reader = Reader(pool, api, own)
        yield House(stripe, Worker(pool, url, settings(**changed), own, reader=reader), reader, api)
    finally:
        await api.close()
        pool.terminate()


@pytest.fixture
async def stripe() -> AsyncIterator[StripeServer]:
    async with stripe_server() as server:
        yield server


async def waiting(db: Connection) -> list[str]:
    found = await db.fetch("SELECT event_id FROM webhook_events WHERE read_due_at IS NOT NULL ORDER BY event_id")
    return [event_id for (event_id,) in found]


# ── Through the door ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_thin_event_is_acknowledged_like_any_and_its_row_follows(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    handlers.on("invoice.paid")(noop)
    invoice = example("invoice", id="in_1", customer="cus_1", status="paid")
    stripe.show(invoice)
    # The workers have nothing to do with them before both copies of each are here.
    stripe.held = asyncio.Event()
    counts = {"event_type": "v1.invoice.paid", "status": "processed"}
    before = counted("webhook_events_total", **counts)
    key = {"STRIPE_SECRET_KEY": KEY, "STRIPE_API_BASE": stripe.base, "KAMIYO_RECONCILE": False}
    async with running_client(create_app(settings(**key))) as client:
        for kind in ("v1.invoice.created", "v1.invoice.paid"):
            body = thin_json(kind, invoice, f"evt_65{kind[-4:]}")
            assert [(await deliver(client, body)).json()["message"] for _ in range(2)] == [
                "Event received",
                "Event already received",
            ]
        stripe.held.set()
        assert (await settled(db, "evt_65paid"))["outcome"] == "handled"
        assert (await settled(db, "evt_65ated"))["outcome"] == "projected"
        assert (await deliver(client, body)).json()["message"] == "Event already processed"
        gauges = (await client.get("/metrics")).text

        async def it_is_counted() -> bool:
            return counted("webhook_events_total", **counts) == before + 1

        await until(it_is_counted)
    assert "webhook_waiting_reads 0.0" in gauges
    assert "webhook_stripe_circuit_open 0.0" in gauges
    assert (await billing(db))["invoices", "in_1"]["status"] == "paid"


# ── Read ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_many_thin_events_of_one_object_make_one_read_and_go_through_its_customers_lane(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    own, seen = Registry(), []

    @own.on("invoice.paid")
    async def sees(event: Event, db: Connection) -> None:
        seen.append((event.type, event.object["id"], event.object["status"], event.customer))

    invoice = example("invoice", id="in_1", customer="cus_1", status="paid")
    stripe.show(invoice, example("customer", id="cus_1", name="Ada"))
    kinds = ("created", "finalized", "paid", "payment_succeeded", "updated")
    bodies = [thin_json(f"v1.invoice.{kind}", invoice, f"evt_65{kind}") for kind in kinds]
    await put(db, *bodies, thin_json("v1.customer.created", {"id": "cus_1", "object": "customer"}, "evt_65customer"))
    async with house(database_url, settings, stripe, own) as here:
        assert await here.worker.run_once(db) == 6
        assert len(await waiting(db)) == 6
        assert await here.worker.run_once(db) == 0, "nobody claims them meanwhile"
        await here.work(db)

    assert sorted(stripe.paths) == ["/v1/customers/cus_1", "/v1/invoices/in_1"]
    assert seen == [("v1.invoice.paid", "in_1", "paid", "cus_1")]
    rows = await db.fetch("SELECT event_id, outcome, customer, lane, attempts FROM webhook_events")
    assert len({row["lane"] for row in rows}) == 1
    assert {row["customer"] for row in rows} == {"cus_1"}
    assert {row["event_id"]: row["outcome"] for row in rows} == {
        **{f"evt_65{kind}": "handled" if kind == "paid" else "projected" for kind in kinds},
        "evt_65customer": "projected",
    }
    tables = await billing(db)
    assert tables["invoices", "in_1"]["status"] == "paid"
    assert tables["invoices", "in_1"]["last_webhook_event_id"] in {f"evt_65{kind}" for kind in kinds}
    assert tables["customers", "cus_1"]["name"] == "Ada"

    # One that comes late tells of nothing that was not read already; it goes through the customer's lane all the same.
    await put(db, thin_json("v1.invoice.sent", invoice, "evt_65sent", created=NOW - 5))
    async with house(database_url, settings, stripe, own) as here:
        await here.work(db)
    assert len(stripe.paths) == 2
    assert set((await statuses(db)).values()) == {"processed"}
    late = await row_of(db, "evt_65sent")
    assert (late["customer"], late["lane"], late["attempts"]) == ("cus_1", rows[0]["lane"], 1)


async def test_a_second_must_be_over_at_stripe_before_it_is_asked_about(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamiyo.reader._TOO_EARLY_SECONDS", 60.0)
    ada = example("customer", id="cus_1", name="Ada")
    stripe.show(ada)
    stripe.stopped_at = NOW  # by Stripe's clock the event happens just now
    await put(db, thin_json("v1.customer.updated", ada, "evt_65a"))
    async with house(database_url, settings, stripe) as here:
        await here.worker.run_once(db)
        assert await here.reader.run_once() == 1
        assert await waiting(db) == ["evt_65a"], "what it said may be from before the event"
        assert await here.reader.run_once() == 0, "not at once again"
        stripe.stopped_at += 10
        await db.execute("UPDATE webhook_events SET read_try_at = now()")
        await here.work(db)
    assert (await row_of(db, "evt_65a"))["outcome"] == "projected"


async def test_an_event_from_the_future_is_read_all_the_same(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    ada = example("customer", id="cus_1", name="Ada")
    stripe.show(ada)
    stripe.ahead = 10.0  # so that nobody has to wait here
    await put(db, thin_json("v1.customer.updated", ada, "evt_65a", created=int(time.time()) + 86400))
    async with house(database_url, settings, stripe) as here:
        await here.worker.run_once(db)
        due_in = await db.fetchval("SELECT extract(epoch FROM read_due_at - now()) FROM webhook_events")
        assert due_in < 10
        await db.execute("UPDATE webhook_events SET read_try_at = now()")
        await here.work(db)
    assert (await row_of(db, "evt_65a"))["outcome"] == "projected"


async def test_a_thin_deletion_and_a_thin_detachment_end_what_was_known(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    own, seen = Registry(), []

    @own.on("invoice.deleted", "v1.customer.deleted")
    async def sees(event: Event, db: Connection) -> None:
        seen.append(event.object)

    ada, draft = example("customer", id="cus_1", name="Ada"), example("invoice", id="in_1", status="draft")
    card = example("payment_method", id="pm_1", customer="cus_1")
    objects = (ada, draft, card)
    stripe.show(*objects)
    async with house(database_url, settings, stripe, own) as here:
        await put(db, *(thin_json(f"v1.{one['object']}.updated", one) for one in objects))
        await here.work(db)
        stripe.show({"id": "cus_1", "object": "customer", "deleted": True}, {**card, "customer": None})
        stripe.forget("invoice", "in_1")
        ends = (("customer.deleted", ada), ("invoice.deleted", draft), ("payment_method.detached", card))
        await put(db, *(thin_json(f"v1.{kind}", one, created=NOW + 9) for kind, one in ends))
        await here.work(db)
    tables = await billing(db)
    assert (tables["customers", "cus_1"]["name"], tables["customers", "cus_1"]["deleted_at"]) == ("Ada", NOW + 9)
    assert tables["invoices", "in_1"]["deleted_at"] == NOW + 9
    assert tables["invoices", "in_1"]["status"] == "draft"
    assert (tables["payment_methods", "pm_1"]["detached_at"], tables["payment_methods", "pm_1"]["customer"]) == (
        NOW + 9,
        None,
    )
    assert set((await statuses(db)).values()) == {"processed"}
    ended = [{"id": one["id"], "object": one["object"], "deleted": True} for one in (ada, draft)]
    assert sorted(seen, key=str) == sorted(ended, key=str)


async def test_an_end_that_is_told_while_stripes_clock_stands_still_takes_one_read(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    canceled = example("subscription", id="sub_1", customer="cus_1", status="canceled")
    stripe.show(canceled)
    async with house(database_url, settings, stripe) as here:
        for number, kind in enumerate(("created", "deleted")):
            # The second answer is of the first one's second, or of the one before it.
            stripe.ahead = -float(number)
            await put(db, thin_json(f"v1.customer.subscription.{kind}", canceled, f"evt_65{kind}"))
            await here.work(db)
    assert len(stripe.paths) == 2
    assert set((await statuses(db)).values()) == {"processed"}


async def test_of_what_is_known_only_to_be_gone_a_late_event_still_tells_what_it_was(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    draft, card = example("invoice", id="in_1", status="draft"), example("payment_method", id="pm_1")
    async with house(database_url, settings, stripe) as here:
        ends = (("invoice.deleted", draft), ("payment_method.detached", card))
        await put(db, *(thin_json(f"v1.{kind}", one) for kind, one in ends))
        await here.work(db)
        key = {"STRIPE_SECRET_KEY": KEY, "STRIPE_API_BASE": stripe.base, "KAMIYO_RECONCILE": False}
        async with running_client(create_app(settings(**key, KAMIYO_WORKER=False))) as client:
            # In a commit with their rows, if they were not about something that is gone.
            for kind, one in (("invoice.updated", draft), ("payment_method.updated", card)):
                await deliver(client, event_json(f"evt_{one['id']}", kind, one, created=NOW - 60))
        await here.work(db)
    tables = await billing(db)
    assert (tables["invoices", "in_1"]["deleted_at"], tables["invoices", "in_1"]["status"]) == (NOW, "draft")
    assert (tables["payment_methods", "pm_1"]["detached_at"], tables["payment_methods", "pm_1"]["type"]) == (
        NOW,
        "card",
    )
    await rebuild.rebuild(db)
    assert await billing(db) == tables


async def test_the_row_of_a_thin_event_whose_worker_died_is_true_all_the_same(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    own = Registry()
    own.on("customer.subscription.created")(noop)
    subscription = example("subscription", id="sub_1", customer="cus_1")
    stripe.show(subscription)
    await put(db, thin_json("v1.customer.subscription.created", subscription, "evt_65deadly"))
    async with house(database_url, settings, stripe, own) as ours:
        assert await ours.worker.run_once(db)
        assert await ours.reader.run_once()
        for attempt in range(1, 6):
            await die(database_url, running="evt_65deadly")
            await until(lambda: no_lanes_held(db))
            assert await ours.worker.run_once(db)
            assert (await row_of(db, "evt_65deadly"))["attempts"] == attempt
            assert (await billing(db))["subscriptions", "sub_1"]["customer"] == "cus_1"
            await due_now(db)
    assert (await row_of(db, "evt_65deadly"))["next_try_at"] is None


async def test_what_stripe_does_not_have_is_processed_with_nothing_to_tell(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer, log: Log
) -> None:
    own, seen = Registry(), []

    @own.on("v1.charge.succeeded", "v1.customer.updated")
    async def sees(event: Event, db: Connection) -> None:
        seen.append((event.type, event.object))

    @own.on("customer.updated", "customer.created")
    async def was_written_for_snapshots(event: Event, db: Connection) -> None:
        raise AssertionError("it would find nothing in it")

    stripe.show({"id": "ch_1", "object": "charge", "amount": 5, "customer": "cus_9"})
    await put(
        db,
        thin_json("v1.customer.updated", {"id": "cus_1", "object": "customer"}, "evt_65a"),
        thin_json("v1.subscription_schedule.created", {"id": "sub_sched_1", "object": "subscription_schedule"}),
        thin_json("v1.charge.succeeded", {"id": "ch_1", "object": "charge"}, "evt_65c"),
        thin_json("v1.customer.created", {"id": "cus_1", "object": "customer"}, "evt_65b"),
    )
    async with house(database_url, settings, stripe, own) as here:
        await here.work(db)
    assert sorted(stripe.paths) == ["/v1/charges/ch_1", "/v1/customers/cus_1"], "what nobody wants is not read"
    assert sorted(kind for kind, _ in seen) == ["v1.charge.succeeded", "v1.customer.updated"]
    assert dict(seen)["v1.charge.succeeded"]["amount"] == 5
    assert dict(seen)["v1.customer.updated"] == {}
    assert await billing(db) == {}, "it may be of another account: no life ends by that"
    assert (await row_of(db, "evt_65b"))["outcome"] == "ignored"
    assert (await row_of(db, "evt_65c"))["customer"] == "cus_9"
    assert [line["object_id"] for line in log() if line["event"] == "object_gone"] == ["cus_1"]


async def test_pings_and_unknown_types_end_ignored(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    ping = {"id": "ed_1", "object": "v2.core.event_destination"}
    await put(
        db,
        thin_json("v2.core.event_destination.ping", ping),
        thin_json("v3.nobody.knows", {"id": "x_1", "object": "x"}),
        thin_json("v1.invoice.upcoming", None, data={"customer": "cus_1"}),
    )
    async with house(database_url, settings, stripe) as here:
        await here.work(db)
    assert stripe.paths == []
    found = await db.fetch("SELECT status, outcome FROM webhook_events")
    assert {tuple(row) for row in found} == {("processed", "ignored")}


async def test_without_a_key_for_their_mode_thin_events_show_nothing_and_only_who_asked_for_them_gets_them(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    own, seen = Registry(), []

    @own.on("invoice.paid", "v1.customer.created")
    async def sees(event: Event, db: Connection) -> None:
        seen.append((event.type, event.object))

    about = {"id": "in_1", "object": "invoice"}
    ada = {"id": "cus_1", "object": "customer"}
    for key, livemode in (("", False), (KEY, True)):
        seen.clear()
        await put(
            db,
            thin_json("v1.invoice.paid", about, livemode=livemode),
            thin_json("v1.customer.created", ada, livemode=livemode),
        )
        pool = await database.open_pool(database_url, size=2, application="keyless", idle_limit=60)
        worker = Worker(pool, database_url, settings(STRIPE_SECRET_KEY=key), own)
        while await worker.run_once(db):
            pass
        pool.terminate()
        assert seen == [("v1.customer.created", {})]
        found = await db.fetch("SELECT event_type, outcome FROM webhook_events")
        assert {tuple(row) for row in found} == {("v1.invoice.paid", "ignored"), ("v1.customer.created", "handled")}
    assert stripe.paths == [], "the key of the other mode would find nothing, and that would be believed"


async def test_each_account_and_mode_is_read_with_the_key_that_opens_it(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    live, member = "rk_live_of_the_tests", "rk_test_of_a_member"
    stripe.keys = {KEY: "", live: "", member: "acct_member"}
    ada = {"id": "cus_1", "object": "customer"}
    whose = [("", False), ("acct_connected", False), ("acct_member", False), ("", True), ("acct_x", True)]
    stripe.show(example("customer", id="cus_1", name="of "), account="")
    for account in ("acct_connected", "acct_member", "acct_x"):
        stripe.show(example("customer", id="cus_1", name=f"of {account}"), account=account)
    keys: dict[str, Any] = {
        "STRIPE_SECRET_KEY": f"{KEY},{live}",
        "STRIPE_SECRET_KEYS": json.dumps({"acct_member": member}),
    }
    await put(
        db,
        *(thin_json("v1.customer.updated", ada, livemode=mode, account=account or None) for account, mode in whose),
    )
    # One that has but the member's key leaves what that does not open to the others.
    few: dict[str, Any] = {"STRIPE_SECRET_KEY": "", "STRIPE_SECRET_KEYS": keys["STRIPE_SECRET_KEYS"]}
    async with house(database_url, settings, stripe, **keys) as here:
        assert await here.worker.run_once(db) == 5
        async with house(database_url, settings, stripe, **few) as there:
            assert await there.reader.run_once() == 1
        assert len(await waiting(db)) == 4
        await here.work(db)
    rows = await db.fetch("SELECT account, livemode, name FROM billing.customers")
    assert {tuple(row) for row in rows} == {(account, mode, f"of {account}") for account, mode in whose}
    assert sorted(stripe.accounts) == ["", "", "", "acct_connected", "acct_x"], "the member's key says whose it is"


async def test_the_object_of_an_event_that_stripe_could_not_make_is_read(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    sub = example("subscription", id="sub_1", customer="cus_1", status="past_due")
    kind = "v2.core.health.event_generation_failure.resolved"
    related = {"id": "sub_1", "type": "subscription", "url": "/v1/subscriptions/sub_1"}
    impact = {"event_type": "customer.subscription.updated", "related_object": related}
    stripe.show(sub, {"id": "evt_65h", "object": "v2.core.event", "type": kind, "data": {"impact": impact}})
    await put(db, thin_json(kind, None, "evt_65h"))
    async with house(database_url, settings, stripe) as here:
        await here.work(db)
    assert stripe.paths == ["/v2/core/events/evt_65h", "/v1/subscriptions/sub_1"]
    row = (await billing(db))["subscriptions", "sub_1"]
    assert (row["status"], row["last_webhook_event_id"]) == ("past_due", "evt_65h")
    assert (await row_of(db, "evt_65h"))["status"] == "processed"


# ── Twins ───────────────────────────────────────────────────────────────────────────────────────────────────


def pair(kind: str, shown: dict[str, Any]) -> tuple[bytes, bytes]:
    """One occurrence, told by a snapshot and by a thin event."""
    snapshot = event_json("evt_snap", kind, shown, created=NOW)
    return snapshot, thin_json(f"v1.{kind}", shown, "evt_65thin", snapshot_event="evt_snap")


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


# ── When Stripe does not give it ────────────────────────────────────────────────────────────────────────────


async def test_while_stripe_is_away_events_wait_nothing_fails_and_people_can_see_it(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    ada = example("customer", id="cus_1", name="Ada")
    stripe.show(ada)
    stripe.faults = [500]
    await put(db, thin_json("v1.customer.updated", ada, "evt_65a"), event_json("evt_other"))
    async with house(database_url, settings, stripe) as here:
        await here.worker.run_once(db)
        assert (await inbox.queue(db))["waiting_reads"] == 1
        assert await here.reader.run_once() == 1
        assert (await inbox.queue(db))["circuit_open"] == 1
        assert await here.reader.run_once() == 0, "nobody begins anything while the circuit is open"
        assert await waiting(db) == ["evt_65a"]
        await db.execute("UPDATE webhook_api_budget SET open_until = now()")
        await db.execute("UPDATE webhook_events SET read_try_at = now() WHERE read_try_at IS NOT NULL")
        await here.work(db)
        assert (await inbox.queue(db))["circuit_open"] == 0
    assert len(stripe.paths) == 2
    assert await statuses(db) == {"evt_65a": "processed", "evt_other": "processed"}
    assert await db.fetchval("SELECT count(*) FROM webhook_failures") == 0


async def test_twins_need_no_stripe_that_answers(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    snapshot, thin = pair("invoice.paid", example("invoice", id="in_1", status="paid"))
    stripe.faults = [500]
    async with house(database_url, settings, stripe) as here:
        await put(db, thin, thin_json("v1.customer.updated", example("customer", id="cus_1"), "evt_65a"))
        await here.worker.run_once(db)
        await db.execute(
            "UPDATE webhook_events SET read_try_at = now() + interval '1 hour' WHERE event_id = 'evt_65thin'"
        )
        await here.reader.run_once()
        # Half a second would be over before this story is, on a busy machine.
        await db.execute("UPDATE webhook_api_budget SET open_until = now() + interval '1 hour'")
        await db.execute("UPDATE webhook_events SET read_try_at = now() WHERE read_try_at IS NOT NULL")
        await put(db, snapshot)
        await here.work(db)
        assert (await inbox.queue(db))["circuit_open"] == 1
    assert await waiting(db) == ["evt_65a"]
    assert (await row_of(db, "evt_65thin"))["outcome"] == "paired"
    assert stripe.paths == ["/v1/customers/cus_1"]


async def test_one_object_that_stripe_is_slow_with_keeps_no_other_waiting(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    objects = [example("customer", id=f"cus_{number}") for number in range(20)]
    stripe.show(*objects)
    stripe.faults = [HANGS]
    await put(db, *(thin_json("v1.customer.updated", one) for one in objects))
    async with house(database_url, settings, stripe) as here:
        while await here.worker.run_once(db):
            pass
        reading = asyncio.create_task(here.reader.run())

        async def one_is_left() -> bool:
            return len(await waiting(db)) == 1

        await until(one_is_left)

        async def nothing_is_held() -> bool:
            return not await db.fetchval(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'house' AND state <> 'idle'"
            ) and await no_lanes_held(db)

        await until(nothing_is_held)
        # While it is being asked for nobody else takes it; and should its reader die, that is over in seconds.
        await db.execute(
            "UPDATE webhook_events SET read_try_at = now() + interval '1 second' WHERE read_due_at IS NOT NULL"
        )
        await here.reader.renew()
        left = (
            "SELECT extract(epoch FROM read_try_at - now())::float8 FROM webhook_events WHERE read_due_at IS NOT NULL"
        )
        assert 10 < await db.fetchval(left) < 16
        reading.cancel()
        await asyncio.wait([reading])
        await db.execute("UPDATE webhook_events SET read_try_at = now() WHERE read_try_at IS NOT NULL")
        await here.work(db)
    assert set((await statuses(db)).values()) == {"processed"}


async def test_a_process_that_is_killed_while_it_reads_leaves_its_events_to_the_next(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    ada = example("customer", id="cus_1", name="Ada")
    stripe.show(ada)
    stripe.faults = [HANGS]
    variables = {
        "DATABASE_URL": database_url,
        "STRIPE_WEBHOOK_SECRET": SECRET,
        "STRIPE_SECRET_KEY": KEY,
        "STRIPE_API_BASE": stripe.base,
        "KAMIYO_RECONCILE": "false",
    }
    await put(db, thin_json("v1.customer.updated", ada, "evt_65a"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kamiyo", "worker"),
        env=os.environ | variables,
        cwd=ROOT,
        stderr=asyncio.subprocess.DEVNULL,
    )

    async def asked() -> bool:
        return bool(stripe.paths)

    await until(asked)
    process.kill()
    await process.wait()
    assert await waiting(db) == ["evt_65a"]
    assert await db.fetchval("SELECT read_try_at < now() + interval '16 seconds' FROM webhook_events")
    await db.execute("UPDATE webhook_events SET read_try_at = now()")
    async with house(database_url, settings, stripe) as here:
        await here.work(db)
    row = await row_of(db, "evt_65a")
    assert (row["status"], row["attempts"], row["suspect"]) == ("processed", 1, False)
    assert (await billing(db))["customers", "cus_1"]["name"] == "Ada"


async def test_what_the_key_is_refused_for_is_asked_for_once_and_is_in_nobodys_way(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    customers = [{"id": f"cus_{number}", "object": "customer"} for number in range(30)]
    invoices = [example("invoice", id=f"in_{number}") for number in range(20)]
    stripe.show(*invoices)
    stripe.forbidden = {"/v1/customers"}
    await put(db, *(thin_json(f"v1.{one['object']}.updated", one) for one in [*customers, *invoices]))
    async with house(database_url, settings, stripe) as here:
        await here.work(db)
        refused = [path for path in stripe.paths if path.startswith("/v1/customers")]
        assert len(refused) <= 8, "what was asked for at the same time"
        assert len(await waiting(db)) == 30
        assert await db.fetchval(
            "SELECT bool_and(read_try_at > now() + interval '40 s') FROM webhook_events WHERE thin "
            "AND read_try_at IS NOT NULL"
        )
    assert {event_id for event_id, status in (await statuses(db)).items() if status == "failed"} == set()


async def test_a_refused_key_keeps_events_waiting_and_is_told_until_it_is_mended(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer, log: Log
) -> None:
    ada = example("customer", id="cus_1", name="Ada")
    stripe.show(ada, example("invoice", id="in_1"))
    stripe.forbidden = {"/v1/customers"}
    await put(db, thin_json("v1.customer.updated", ada, "evt_65a"))
    async with house(database_url, settings, stripe) as here:
        await here.work(db)
        assert await waiting(db) == ["evt_65a"]
        # Another kind of object is answered; that mends nothing for this one.
        await put(db, thin_json("v1.invoice.updated", {"id": "in_1", "object": "invoice"}, "evt_65i"))
        await here.work(db)
        told = {one.key: one for one in await alerts.find(db)}
        assert "GET /v1/customers in test mode (403)" in told["stripe_refuses"].body
        late = "UPDATE webhook_events SET read_due_at = now() - interval '6 minutes' WHERE read_due_at IS NOT NULL"
        await db.execute(late)
        assert "evt_65a" in {one.key: one for one in await alerts.find(db)}["reads_overdue"].body
        assert (await inbox.queue(db))["oldest_unread_seconds"] > 300
        assert (await inbox.health(db))["status"] == "healthy", "this system does what it should"

        stripe.forbidden = set()
        await db.execute("UPDATE webhook_events SET read_try_at = now() WHERE read_try_at IS NOT NULL")
        await here.work(db)
        assert await alerts.find(db) == []
    assert await statuses(db) == {"evt_65a": "processed", "evt_65i": "processed"}
    assert "sk_test" not in json.dumps(log())


async def test_an_object_that_stripe_will_never_give_makes_its_event_dead_with_the_reason(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    own = Registry()

    @own.on("v2.money.moved")
    async def nothing(event: Event, db: Connection) -> None: ...

    stripe.faults = [400]
    about = {"id": "mm_1", "object": "v2.money"}
    await put(db, thin_json("v2.money.moved", about, "evt_65a"))
    async with house(database_url, settings, stripe, own) as here:
        await here.work(db)
        row = await row_of(db, "evt_65a")
        assert (row["status"], row["next_try_at"]) == ("failed", None)
        [failure] = await db.fetch("SELECT error_type, error_message FROM webhook_failures")
        assert failure["error_type"] == "StripeRefused"
        assert "/v1/v2.moneys/mm_1" in failure["error_message"]
        stripe.objects["", "v2.money", "mm_1"] = about
        await inbox.retry(db, "evt_65a")
        await here.work(db)
    assert (await row_of(db, "evt_65a"))["outcome"] == "handled"


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
