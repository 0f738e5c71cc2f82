"""Each event changes the right row, whatever the API version, and a strange one hurts nobody but itself."""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from itertools import permutations
from typing import Any

import pytest

from kamiyo import inbox, projections
from kamiyo.database import Connection
from kamiyo.handlers import GUIDE_TYPES
from kamiyo.projections import ProjectionError, Row, row_before, row_of
from kamiyo.shapes import COLUMNS
from kamiyo.simulator import API_VERSIONS, World, lifecycle, thin
from kamiyo.worker import Worker
from tests.conftest import MakeSettings, event_json, fresh_id
from tests.turns import NOW, billing, example, failures_of, put, read, statuses, work_off, worker_on
from tests.turns import row_of as ledger_row_of

RECEIVED = datetime(2026, 9, 21, tzinfo=UTC)


@pytest.fixture
async def worker(database_url: str, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> Worker:
    # No turn is cut short only because this machine is busy.
    monkeypatch.setattr("kamiyo.turn._TURN_SECONDS", 60.0)
    return await worker_on(database_url, settings())


def columns(body: bytes) -> dict[str, Any]:
    """The columns that an event tells; times in unix seconds, JSON as values."""
    row = row_of(read(body), RECEIVED)
    assert row is not None
    return _readable(row)


def _readable(row: Row) -> dict[str, Any]:
    found = dict(zip(COLUMNS[row.table], row.values, strict=True))
    return {name: json.loads(value) if name in ("metadata", "items") else value for name, value in found.items()}


def customer(**changes: Any) -> dict[str, Any]:
    return example("customer", **{"name": "Jenny Rosen", "email": "jenny@example.com", **changes})


def payment_method(**changes: Any) -> dict[str, Any]:
    return example("payment_method", **changes)


# ── The ten of the guide ────────────────────────────────────────────────────────────────────────────────────

CUSTOMER = {
    "email": "jenny@example.com",
    "name": "Jenny Rosen",
    "phone": "+15555555555",
    "description": "A regular",
    "currency": "usd",
    "balance": -500,
    "delinquent": False,
    "default_payment_method": "pm_1",
    "metadata": {"user_id": "42"},
    "created": 1_234_567_890,
    "deleted_at": None,
}
SUBSCRIPTION = {
    "customer": "cus_QXg1o8vcGmoR32",
    "status": "active",
    "currency": "usd",
    "price": "price_1PgafmB7WZ01zgkW6dKueIc5",
    "quantity": 1,
    "items": [{"id": "si_QXhVnC2h0Jczwc", "price": "price_1PgafmB7WZ01zgkW6dKueIc5", "quantity": 1}],
    "current_period_start": 1_896_570_518,
    "current_period_end": 976_287_773,
    "cancel_at_period_end": True,
    "cancel_at": 1_234_567_890,
    "canceled_at": 1_234_567_890,
    "ended_at": 1_234_567_890,
    "trial_start": 1_234_567_890,
    "trial_end": 1_234_567_890,
    "default_payment_method": "pm_1",
    "latest_invoice": "in_1",
    "collection_method": "charge_automatically",
    "metadata": {},
    "created": 1_234_567_890,
}
INVOICE = {
    "customer": "cus_QXg1o8vcGmoR32",
    "subscription": "subscription",
    "number": "7FE1103-0001",
    "status": "open",
    "currency": "usd",
    "amount_due": 1_000,
    "amount_paid": 0,
    "amount_remaining": 1_000,
    "subtotal": 1_000,
    "total": 1_000,
    "attempt_count": 1,
    "billing_reason": "manual",
    "collection_method": "charge_automatically",
    "due_date": 1_234_567_890,
    "period_start": 1_234_567_890,
    "period_end": 1_234_567_890,
    "paid_at": None,
    "hosted_invoice_url": "https://invoice.stripe.com/i/1",
    "invoice_pdf": None,
    "metadata": {},
    "created": 1_234_567_890,
    "deleted_at": None,
}
PAYMENT_METHOD = {
    "customer": "cus_QXg1o8vcGmoR32",
    "type": "card",
    "brand": "visa",
    "last4": "4242",
    "exp_month": 8,
    "exp_year": 2030,
    "funding": "credit",
    "country": "US",
    "fingerprint": "AOB934RVNwzk6xtn",
    "metadata": {"order_id": "123456789"},
    "created": 1_234_567_890,
    "detached_at": None,
}

_OBJECTS: dict[str, dict[str, Any]] = {
    "customers": example(
        "customer",
        id="cus_1",
        email="jenny@example.com",
        name="Jenny Rosen",
        phone="+15555555555",
        description="A regular",
        balance=-500,
        invoice_settings={"default_payment_method": "pm_1"},
        metadata={"user_id": "42"},
    ),
    "subscriptions": example("subscription", id="sub_1", default_payment_method="pm_1", latest_invoice="in_1"),
    "invoices": example(
        "invoice",
        id="in_1",
        status="open",
        number="7FE1103-0001",
        attempt_count=1,
        hosted_invoice_url="https://invoice.stripe.com/i/1",
    ),
    "payment_methods": example("payment_method", id="pm_1", customer="cus_QXg1o8vcGmoR32"),
}

_PAID = {"status": "paid", "amount_paid": 1_000, "amount_remaining": 0}
_TEN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "customer.created": ("customers", {}, CUSTOMER),
    "customer.updated": ("customers", {}, CUSTOMER),
    "customer.deleted": ("customers", {}, CUSTOMER | {"deleted_at": NOW}),
    "customer.subscription.created": ("subscriptions", {}, SUBSCRIPTION),
    "customer.subscription.updated": ("subscriptions", {}, SUBSCRIPTION),
    "customer.subscription.deleted": (
        "subscriptions",
        {"status": "canceled"},
        SUBSCRIPTION | {"status": "canceled"},
    ),
    "invoice.payment_succeeded": (
        "invoices",
        _PAID | {"status_transitions": {"paid_at": NOW}},
        INVOICE | _PAID | {"paid_at": NOW},
    ),
    "invoice.payment_failed": ("invoices", {}, INVOICE),
    "payment_method.attached": ("payment_methods", {}, PAYMENT_METHOD),
    "payment_method.detached": (
        "payment_methods",
        {"customer": None},
        PAYMENT_METHOD | {"customer": None, "detached_at": NOW},
    ),
}


def test_the_ten_below_are_the_ten_of_the_guide() -> None:
    assert tuple(_TEN) == GUIDE_TYPES


@pytest.mark.parametrize("event_type", GUIDE_TYPES)
async def test_each_of_the_ten_writes_its_row_with_every_column(
    event_type: str, db: Connection, worker: Worker
) -> None:
    table, changes, expected = _TEN[event_type]
    body = event_json("evt_1", event_type, _OBJECTS[table] | changes, created=NOW, account="acct_1", livemode=True)
    await put(db, body)

    assert await worker.run_once(db) == 1

    event = await ledger_row_of(db, "evt_1")
    assert (event["status"], event["outcome"], event["attempts"]) == ("processed", "projected", 1)
    [(place, row)] = (await billing(db)).items()
    assert place == (table, _OBJECTS[table]["id"])
    assert {name: row[name] for name in COLUMNS[table]} == expected
    assert (row["account"], row["livemode"], row["order_evidence"]) == ("acct_1", True, "decided")
    assert row["last_webhook_event_id"] == "evt_1"
    assert row["last_webhook_updated_at"] == int(event["created_at"].timestamp())


@pytest.mark.parametrize(
    ("event_type", "name"),
    [
        ("customer.subscription.paused", "subscription"),
        ("customer.subscription.trial_will_end", "subscription"),
        ("invoice.voided", "invoice"),
        ("invoice.finalized", "invoice"),
        ("invoice.paid", "invoice"),
        ("payment_method.automatically_updated", "payment_method"),
    ],
)
def test_every_other_event_that_shows_one_of_the_four_objects_is_believed_as_well(event_type: str, name: str) -> None:
    row = row_of(read(event_json("evt_1", event_type, example(name))), RECEIVED)
    assert row is not None
    assert row.table == f"{name}s"


async def test_one_object_in_two_accounts_and_two_modes_is_four_rows(db: Connection, worker: Worker) -> None:
    bodies = [
        event_json(
            None,
            "customer.created",
            customer(id="cus_1", name=f"{account} {mode}"),
            account=account,
            livemode=mode,
        )
        for account in ("", "acct_1")
        for mode in (False, True)
    ]
    await put(db, *bodies)
    await work_off(worker, db)
    rows = await db.fetch("SELECT account, livemode, name FROM billing.customers WHERE id = 'cus_1'")
    assert {(row["account"], row["livemode"], row["name"]) for row in rows} == {
        ("", False, " False"),
        ("", True, " True"),
        ("acct_1", False, "acct_1 False"),
        ("acct_1", True, "acct_1 True"),
    }


# ── Versions ────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_api_version_tells_equal_rows_of_equal_rank() -> None:
    world, rng = World(5, start=NOW), random.Random(5)
    for _ in range(12):
        lifecycle(world, rng, steps=20)
    seen = set()
    for event in world.events:
        for tell in (row_of, row_before):
            rows = [tell(read(event.body(version)), RECEIVED) for version in API_VERSIONS]
            assert [row == rows[0] for row in rows] == [True] * len(API_VERSIONS), (event.type, tell)
        if rows[0] is not None:
            seen.add(event.type)
    assert seen >= {"customer.updated", "customer.subscription.updated", "invoice.updated"}


def test_a_subscriptions_period_is_read_where_it_was_before_basil_and_where_it_is_since() -> None:
    new = example("subscription", id="sub_1")
    old = example("subscription", id="sub_1")
    item = old["items"]["data"][0]
    old["current_period_start"] = item.pop("current_period_start")
    old["current_period_end"] = item.pop("current_period_end")
    assert columns(event_json("e", "customer.subscription.updated", new)) == columns(
        event_json("e", "customer.subscription.updated", old)
    )


def test_an_invoices_subscription_is_read_where_it_was_before_basil_and_where_it_is_since() -> None:
    new = example("invoice", id="in_1", parent={"subscription_details": {"subscription": "sub_1"}})
    old = example("invoice", id="in_1", subscription="sub_1")
    del old["parent"]
    del new["subscription"]
    by_hand = example("invoice", id="in_1", parent=None)
    assert columns(event_json("e", "invoice.paid", new))["subscription"] == "sub_1"
    assert columns(event_json("e", "invoice.paid", old))["subscription"] == "sub_1"
    assert columns(event_json("e", "invoice.paid", by_hand))["subscription"] is None


def test_an_expanded_reference_is_the_same_as_its_id() -> None:
    expanded = example("invoice", id="in_1", customer=customer(id="cus_1"))
    assert columns(event_json("e", "invoice.paid", expanded))["customer"] == "cus_1"
    default = {"default_payment_method": payment_method(id="pm_1")}
    row = columns(event_json("e", "customer.updated", customer(id="cus_1", invoice_settings=default)))
    assert row["default_payment_method"] == "pm_1"


def test_an_account_that_pays_as_a_customer_is_the_customer() -> None:
    invoice = example("invoice", customer=None, customer_account="acct_9")
    assert columns(event_json("e", "invoice.paid", invoice))["customer"] == "acct_9"
    both = example("invoice", customer="cus_1", customer_account="acct_9")
    assert columns(event_json("e", "invoice.paid", both))["customer"] == "cus_1"


def test_a_plan_stands_in_where_an_item_has_no_price() -> None:
    subscription = example("subscription")
    del subscription["items"]["data"][0]["price"]
    assert columns(event_json("e", "customer.subscription.updated", subscription))["price"] == "obj_123"


def test_all_items_of_a_subscription_are_kept_and_the_first_has_columns_of_its_own() -> None:
    subscription = example("subscription")
    [first] = subscription["items"]["data"]
    subscription["items"]["data"].append({**first, "id": "si_2", "quantity": 7, "price": {"id": "price_2"}})
    row = columns(event_json("e", "customer.subscription.updated", subscription))
    assert (row["price"], row["quantity"]) == ("price_1PgafmB7WZ01zgkW6dKueIc5", 1)
    assert row["items"][1] == {"id": "si_2", "price": "price_2", "quantity": 7}


def test_a_bank_account_has_its_last_four_digits_but_no_brand() -> None:
    debit = payment_method(type="us_bank_account", us_bank_account={"last4": "6789", "fingerprint": "F"})
    del debit["card"]
    row = columns(event_json("e", "payment_method.attached", debit))
    assert (row["type"], row["last4"], row["fingerprint"], row["brand"]) == (
        "us_bank_account",
        "6789",
        "F",
        None,
    )


# ── The ends of lives, in every order ───────────────────────────────────────────────────────────────────────


async def _deliver_in_every_order(
    db: Connection, worker: Worker, life: Callable[[], tuple[str, list[bytes]]]
) -> list[dict[str, Any]]:
    """Tell an object's life in every order, one by one and all at once; return the rows it comes to.

    `life` makes a new object with a life of its own each time.
    """
    ids: list[str] = []
    for order in permutations(range(len(life()[1]))):
        object_id, bodies = life()
        for at in order:
            await put(db, bodies[at])
            await work_off(worker, db)
        ids.append(object_id)
    for order in permutations(range(len(life()[1]))):
        object_id, bodies = life()
        await put(db, *(bodies[at] for at in order))
        ids.append(object_id)
    await work_off(worker, db)
    rows = {object_id: row for (_, object_id), row in (await billing(db)).items()}
    assert set(rows) == set(ids)
    assert await db.fetchval("SELECT count(*) FROM webhook_events WHERE status <> 'processed'") == 0
    return [rows[object_id] for object_id in ids]


@pytest.mark.parametrize("stub", [False, True], ids=["whole", "stub"])
@pytest.mark.parametrize("apart", [1, 0], ids=["seconds apart", "in one second"])
async def test_a_deleted_customer_stays_with_what_was_last_known_of_them_in_every_order(
    stub: bool, apart: int, db: Connection, worker: Worker
) -> None:
    def life() -> tuple[str, list[bytes]]:
        first = customer(id=fresh_id("cus"), name="First", metadata={"tier": "gold"})
        last = {**first, "name": "Last", "email": "last@example.com"}
        gone = example("deleted_customer", id=first["id"]) if stub else last
        before = {"name": "First", "email": "jenny@example.com"}
        return first["id"], [
            event_json(None, "customer.created", first, created=NOW),
            event_json(None, "customer.updated", last, created=NOW + apart, previous=before),
            event_json(None, "customer.deleted", gone, created=NOW + 2 * apart),
        ]

    for row in await _deliver_in_every_order(db, worker, life):
        assert (row["name"], row["email"], row["metadata"]) == ("Last", "last@example.com", {"tier": "gold"})
        assert (row["created"], row["deleted_at"]) == (1_234_567_890, NOW + 2 * apart)
        assert row["order_evidence"] == "decided"


async def test_a_stub_keeps_what_two_changes_of_one_second_came_to(db: Connection, worker: Worker) -> None:
    def life() -> tuple[str, list[bytes]]:
        one = customer(id=fresh_id("cus"), name="One", phone="+1")
        two = {**one, "phone": "+2"}
        # The ids are the wrong way round for guessing by id.
        return one["id"], [
            event_json(fresh_id("evt_z"), "customer.updated", one, created=NOW, previous={"name": "Zero"}),
            event_json(fresh_id("evt_a"), "customer.updated", two, created=NOW, previous={"phone": "+1"}),
            event_json(None, "customer.deleted", example("deleted_customer", id=one["id"]), created=NOW + 9),
        ]

    for row in await _deliver_in_every_order(db, worker, life):
        assert (row["name"], row["phone"], row["deleted_at"]) == ("One", "+2", NOW + 9)
        assert row["order_evidence"] == "decided"


async def test_a_stub_of_a_customer_nobody_knew_is_a_deleted_customer_without_anything(
    db: Connection, worker: Worker
) -> None:
    await put(db, event_json(None, "customer.deleted", example("deleted_customer", id="cus_1"), created=NOW))
    await work_off(worker, db)
    row = (await billing(db))["customers", "cus_1"]
    assert (row["name"], row["created"], row["metadata"], row["deleted_at"]) == (None, None, {}, NOW)


async def test_a_stub_keeps_what_the_row_knows_when_the_events_that_told_it_are_past_their_retention(
    db: Connection, worker: Worker
) -> None:
    await put(db, event_json(None, "customer.created", customer(id="cus_1", metadata={"tier": "gold"}), created=NOW))
    await work_off(worker, db)
    assert await inbox.prune(db, datetime.now(UTC)) == 1

    gone = event_json("evt_gone", "customer.deleted", example("deleted_customer", id="cus_1"), created=NOW + 9)
    await put(db, gone)
    await work_off(worker, db)

    row = (await billing(db))["customers", "cus_1"]
    assert (row["name"], row["metadata"]) == ("Jenny Rosen", {"tier": "gold"})
    assert (row["created"], row["deleted_at"]) == (1_234_567_890, NOW + 9)
    assert row["last_webhook_event_id"] == "evt_gone"


async def test_a_detached_payment_method_has_no_customer_in_every_order(db: Connection, worker: Worker) -> None:
    def life() -> tuple[str, list[bytes]]:
        attached = payment_method(id=fresh_id("pm"), customer="cus_1")
        newer = {**attached, "card": {**attached["card"], "exp_year": 2035}}
        previous = {"card": {"exp_year": 2030}}
        return attached["id"], [
            event_json(None, "payment_method.attached", attached, created=NOW),
            event_json(None, "payment_method.automatically_updated", newer, created=NOW, previous=previous),
            event_json(
                None,
                "payment_method.detached",
                {**newer, "customer": None},
                created=NOW,
                previous={"customer": "cus_1"},
            ),
        ]

    for row in await _deliver_in_every_order(db, worker, life):
        assert (row["customer"], row["detached_at"], row["exp_year"]) == (None, NOW, 2035)


def test_a_detached_payment_method_has_no_customer_even_where_the_event_still_shows_one() -> None:
    row = columns(event_json("e", "payment_method.detached", payment_method(customer="cus_1"), created=NOW))
    assert (row["customer"], row["detached_at"]) == (None, NOW)


async def test_a_deleted_draft_stays_deleted_in_every_order(db: Connection, worker: Worker) -> None:
    def life() -> tuple[str, list[bytes]]:
        draft = example("invoice", id=fresh_id("in"))
        return draft["id"], [
            event_json(None, "invoice.created", draft, created=NOW),
            event_json(None, "invoice.updated", {**draft, "total": 5}, created=NOW, previous={"total": 1000}),
            event_json(None, "invoice.deleted", {**draft, "total": 5}, created=NOW),
        ]

    for row in await _deliver_in_every_order(db, worker, life):
        assert (row["status"], row["total"], row["deleted_at"]) == ("draft", 5, NOW)


async def test_a_paid_invoice_stays_paid_whatever_the_clock_says(db: Connection, worker: Worker) -> None:
    def life() -> tuple[str, list[bytes]]:
        invoice = example("invoice", id=fresh_id("in"), status="open")
        paid = {**invoice, "status": "paid", "amount_paid": 1000, "amount_remaining": 0}
        return invoice["id"], [
            event_json(None, "invoice.finalized", invoice, created=NOW),
            event_json(None, "invoice.payment_failed", {**invoice, "attempt_count": 1}, created=NOW + 9),
            event_json(None, "invoice.paid", {**paid, "attempt_count": 2}, created=NOW + 5),
        ]

    for row in await _deliver_in_every_order(db, worker, life):
        assert (row["status"], row["amount_paid"], row["attempt_count"]) == ("paid", 1000, 2)


async def test_children_that_arrive_before_their_parent_are_kept(db: Connection, worker: Worker) -> None:
    subscription = example("subscription", id="sub_1", customer="cus_1")
    invoice = example(
        "invoice", id="in_1", customer="cus_1", parent={"subscription_details": {"subscription": "sub_1"}}
    )
    await put(
        db,
        event_json(None, "invoice.payment_succeeded", invoice, created=NOW),
        event_json(None, "payment_method.attached", payment_method(id="pm_1", customer="cus_1"), created=NOW),
        event_json(None, "customer.subscription.created", subscription, created=NOW),
    )
    await work_off(worker, db)
    tables = await billing(db)
    assert set(tables) == {("subscriptions", "sub_1"), ("invoices", "in_1"), ("payment_methods", "pm_1")}
    assert {row["customer"] for row in tables.values()} == {"cus_1"}

    await put(db, event_json(None, "customer.created", customer(id="cus_1"), created=NOW))
    await work_off(worker, db)
    assert ("customers", "cus_1") in await billing(db)


# ── What has no row to tell ─────────────────────────────────────────────────────────────────────────────────


def _without_id(name: str) -> dict[str, Any]:
    found = example(name)
    del found["id"]
    return found


@pytest.mark.parametrize(
    "body",
    [
        event_json("evt_1", "charge.succeeded"),
        event_json("evt_1", "nobody.has.heard.of.it", {"id": "x_1", "object": "x"}),
        event_json("evt_1", "invoice.upcoming", _without_id("invoice")),
        event_json("evt_1", "invoice.upcoming", example("invoice")),
        event_json("evt_1", "customer.updated", _without_id("customer")),
        event_json("evt_1", "customer.updated", {"id": 7, "object": "customer"}),
        event_json("evt_1", "customer.discount.created", {"id": "di_1", "object": "discount", "customer": "cus_1"}),
        event_json("evt_1", "customer.source.created", {"id": "card_1", "object": "card", "customer": "cus_1"}),
        event_json("evt_1", "invoice.paid", {"id": "cus_1", "object": "customer"}),
        event_json("evt_1", "customer.updated", example("deleted_customer")),
        event_json("evt_1", "customer.updated", {}),
        event_json("evt_1", "customer.updated").replace(b'"data": {', b'"data": [], "other": {'),
    ],
    ids=[
        *("foreign object", "unknown type", "preview", "preview with an id", "no id", "id is a number"),
        *(
            "discount",
            "source",
            "type and object disagree",
            "stub in an update",
            "empty object",
            "data is a list",
        ),
    ],
)
async def test_an_event_that_has_no_row_to_tell_is_processed_and_ignored(
    body: bytes, db: Connection, worker: Worker
) -> None:
    await put(db, body)
    assert await work_off(worker, db) == 1
    event = await ledger_row_of(db, "evt_1")
    assert (event["status"], event["outcome"]) == ("processed", "ignored")
    assert await billing(db) == {}


async def test_a_thin_event_tells_no_row_itself(db: Connection, worker: Worker) -> None:
    world = World(1, start=NOW)
    world.create_customer()
    body = json.dumps(thin(world.events[0])).encode()
    await put(db, body)
    await work_off(worker, db)
    event = await ledger_row_of(db, json.loads(body)["id"])
    assert (event["status"], event["outcome"]) == ("processed", "ignored")
    assert await billing(db) == {}


# ── Strange text, absurd values ─────────────────────────────────────────────────────────────────────────────


async def test_text_that_postgresql_cannot_hold_is_kept_with_a_mark_in_its_place(
    db: Connection, worker: Worker
) -> None:
    nul = customer(id="cus_1", name="a\0b", metadata={"k\0": "v\0"})
    half = customer(id="cus_2", name="a\ud800b", metadata={"k\udc00": "v\ud800"})
    await put(
        db,
        event_json("evt_1", "customer.updated", nul, previous={"name": "\0"}),
        event_json("evt_2", "customer.updated", half, previous={"name": "\ud800"}),
    )
    await work_off(worker, db)
    tables = await billing(db)
    row = tables["customers", "cus_1"]
    assert (row["name"], row["metadata"]) == ("a\ufffdb", {"k\ufffd": "v\ufffd"})
    other = tables["customers", "cus_2"]
    assert [len(other["name"]), *map(len, other["metadata"])] == [3, 2]
    assert other["name"][0] + other["name"][2] == "ab"
    bodies = await db.fetch("SELECT body FROM webhook_payloads ORDER BY seq")
    assert rb"a\u0000b" in bodies[0]["body"]
    assert rb"a\ud800b" in bodies[1]["body"]


def test_the_row_before_a_change_is_cleaned_like_the_row_itself() -> None:
    changed = event_json("e", "customer.updated", customer(id="c", name="b"), previous={"name": "a\0"})
    was = event_json("e", "customer.updated", customer(id="c", name="a\0"))
    [before, row] = [row_before(read(changed), RECEIVED), row_of(read(was), RECEIVED)]
    assert before is not None
    assert row is not None
    assert before.values == row.values


def test_metadata_that_was_added_was_not_there_before() -> None:
    changed = event_json(
        "e",
        "customer.updated",
        customer(id="c", metadata={"old": "1", "new": "2"}),
        previous={"metadata": {"new": None}},
    )
    before = row_before(read(changed), RECEIVED)
    assert before is not None
    assert _readable(before)["metadata"] == {"old": "1"}


def _nested(depth: int, text: str) -> bytes:
    # Written by hand: Python's own encoder refuses to go that deep.
    deep = b'{"a":' * depth + b'"b"' + b"}" * depth
    return event_json(
        "evt_odd", "customer.updated", customer(id="cus_odd", name=text, metadata={"deep": "HERE"})
    ).replace(b'"HERE"', deep)


def _with(old: bytes, new: bytes, **changes: Any) -> bytes:
    body = event_json("evt_odd", "customer.updated", customer(id="cus_odd", **changes))
    assert old in body
    return body.replace(old, new)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (_with(b'"balance": 7', b'"balance": 9223372036854775808', balance=7), "balance"),
        (_with(b'"balance": 7', b'"balance": -1' + b"0" * 400, balance=7), "balance"),
        (_with(b'"balance": 7', b'"balance": 1e999', balance=7), "balance"),
        (_with(b'"balance": 7', b'"balance": 7.5', balance=7), "balance"),
        (_with(b'"balance": 7', b'"balance": "7"', balance=7), "balance"),
        (_with(b'"created": 7', b'"created": 253402300800', created=7), "created"),
        (_with(b'"name": "N"', b'"name": ["N"]', name="N"), "name"),
        (_with(b'"delinquent": false', b'"delinquent": 2', delinquent=False), "delinquent"),
        (_with(b'"N"', b'"\xff\xfe"', name="N"), "UTF-8"),
        (_nested(700, "\0"), "nested too deep"),
    ],
    ids=[
        *(
            "beyond 64 bits",
            "400 digits",
            "infinite",
            "half a cent",
            "text for a number",
            "after the year 9999",
        ),
        *("list for text", "number for truth", "not UTF-8", "nested"),
    ],
)
async def test_an_absurd_value_fails_its_own_event_with_a_clear_error_and_no_other(
    body: bytes, says: str, db: Connection, worker: Worker
) -> None:
    # The door refuses what is not UTF-8; a worker must not trust that it did.
    odd = read(body.replace(b"\xff\xfe", b"??"))
    neighbours = [event_json(f"evt_{n}", "customer.created", customer(id=f"cus_{n}")) for n in range(3)]
    await put(db, neighbours[0])
    await inbox.put(db, [replace(odd, body=body)])
    await put(db, *neighbours[1:])

    assert await worker.run_once(db) == 4

    assert await statuses(db) == {
        "evt_0": "processed",
        "evt_1": "processed",
        "evt_2": "processed",
        "evt_odd": "failed",
    }
    [failure] = await failures_of(db, "evt_odd")
    assert failure["error_type"] == "kamiyo.projections.ProjectionError"
    assert says in failure["error_message"]
    assert {place for place in await billing(db)} == {("customers", f"cus_{n}") for n in range(3)}


@pytest.mark.parametrize("value", [1.5, 10**25, -(10**400), [1, {"a": None}], True, None])
async def test_metadata_takes_any_value_that_json_can_say(value: Any, db: Connection, worker: Worker) -> None:
    body = event_json("evt_1", "customer.created", customer(id="cus_1", metadata={"k": value}))
    await put(db, body)
    await work_off(worker, db)
    assert (await ledger_row_of(db, "evt_1"))["status"] == "processed"
    assert (await billing(db))["customers", "cus_1"]["metadata"] == {"k": value}


async def test_what_only_the_database_refuses_fails_its_own_event_and_no_other(db: Connection, worker: Worker) -> None:
    await db.execute("ALTER TABLE billing.customers ADD CONSTRAINT refused CHECK (name <> 'refused')")
    try:
        names = ["one", "refused", "two"]
        await put(
            db,
            *(event_json(f"evt_{name}", "customer.created", customer(id=name, name=name)) for name in names),
        )
        assert await worker.run_once(db) == 3
    finally:
        await db.execute("ALTER TABLE billing.customers DROP CONSTRAINT refused")
    assert await statuses(db) == {"evt_one": "processed", "evt_two": "processed", "evt_refused": "failed"}
    [failure] = await failures_of(db, "evt_refused")
    assert failure["error_type"].endswith("CheckViolationError")


async def test_an_event_that_nobody_thought_of_fails_alone(
    db: Connection, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_of = projections.row_of

    def stumbles(event: Any, received: datetime) -> Row | None:
        if event.id == "evt_odd":
            raise ZeroDivisionError("nobody thought of this")
        return row_of(event, received)

    monkeypatch.setattr(projections, "row_of", stumbles)
    await put(db, *(event_json(f"evt_{n}", "customer.created", customer(id=f"cus_{n}")) for n in ("1", "odd", "2")))

    assert await worker.run_once(db) == 3

    assert await statuses(db) == {"evt_1": "processed", "evt_2": "processed", "evt_odd": "failed"}
    [failure] = await failures_of(db, "evt_odd")
    assert (failure["error_type"], failure["retry_count"]) == ("ZeroDivisionError", 1)


def test_an_error_names_the_field_and_never_its_value() -> None:
    body = event_json("e", "customer.updated", customer(name=["Jenny Rosen"], email={"to": "jenny@example.com"}))
    with pytest.raises(ProjectionError) as caught:
        row_of(read(body), RECEIVED)
    assert "enny" not in str(caught.value)


# ── Rank ────────────────────────────────────────────────────────────────────────────────────────────────────


def _ranks(bodies: Iterable[bytes]) -> list[int]:
    rows = [row_of(read(body), RECEIVED) for body in bodies]
    return [row.rank for row in rows if row is not None]


def test_ranks_rise_through_the_life_of_an_invoice_even_within_one_second() -> None:
    invoice = example("invoice", id="in_1", attempt_count=0)
    life: list[tuple[str, dict[str, Any]]] = [
        ("invoice.created", {"status": "draft"}),
        ("invoice.updated", {"status": "draft"}),
        ("invoice.finalized", {"status": "open"}),
        ("invoice.payment_failed", {"status": "open", "attempt_count": 1}),
        ("invoice.payment_failed", {"status": "open", "attempt_count": 2}),
        ("invoice.marked_uncollectible", {"status": "uncollectible", "attempt_count": 2}),
        ("invoice.paid", {"status": "paid", "attempt_count": 3}),
    ]
    ranks = _ranks(event_json("e", kind, {**invoice, **changes}, created=NOW) for kind, changes in life)
    assert ranks == sorted(set(ranks))


def test_a_later_second_outranks_everything_but_the_end_of_a_life() -> None:
    subscription = example("subscription", id="sub_1")
    life = [
        ("customer.subscription.updated", "past_due", NOW),
        ("customer.subscription.created", "incomplete", NOW + 1),
        ("customer.subscription.deleted", "canceled", NOW - 100),
        ("customer.subscription.updated", "canceled", NOW),
    ]
    ranks = _ranks(event_json("e", kind, {**subscription, "status": s}, created=at) for kind, s, at in life)
    assert ranks == sorted(set(ranks))
    assert [projections.second_of(rank) for rank in ranks] == [NOW, NOW + 1, NOW - 100, NOW]


def test_the_greatest_rank_fits_a_bigint() -> None:
    absurd = example("invoice", status="paid", attempt_count=2**63 - 1)
    [rank] = _ranks([event_json("e", "invoice.paid", absurd, created=253_402_300_799)])
    assert 0 < rank < 2**63
    assert projections.second_of(rank) == 253_402_300_799
