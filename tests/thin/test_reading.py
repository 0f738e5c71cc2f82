"""What a thin event names is read, once for all that wait, and becomes its row and what its handlers see."""

import asyncio
import json
import time
from typing import Any

import pytest

from kamiyo import database, handlers, rebuild
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Registry
from kamiyo.web import create_app
from kamiyo.worker import Worker
from tests.conftest import Log, MakeSettings, deliver, event_json, noop, running_client, settled, until
from tests.stripe_server import KEY, StripeServer
from tests.test_telemetry import counted
from tests.thin.conftest import NOW, house, thin_json, waiting
from tests.turns import billing, die, due_now, example, no_lanes_held, put, row_of, statuses

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
