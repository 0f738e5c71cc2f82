"""The simulator tells the truth in Stripe's words.

Judged by Stripe's library, by the examples of Stripe's objects, and by what its own events say when they are
read by somebody who knows nothing of the world.
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import stripe
from hypothesis import given, settings
from hypothesis import strategies as st
from stripe._object_classes import OBJECT_CLASSES
from stripe.events._event_classes import get_v2_event_notification_class
from stripe.v2.core import EventNotification

from kamiyo import event as inbound
from kamiyo.simulator import (
    API_VERSIONS,
    CURRENT_API_VERSION,
    EVENT_TYPES,
    STORIES,
    SimulatedEvent,
    World,
    deliveries,
    lifecycle,
    single,
    thin,
)
from kamiyo.simulator.shapes import shape
from kamiyo.simulator.terms import cycle_end

EXAMPLES = Path(__file__).parent / "data" / "stripe"
START = 1_790_000_000
OLDEST = API_VERSIONS[0]
TABLES = {
    "customer": "customers",
    "subscription": "subscriptions",
    "invoice": "invoices",
    "payment_method": "payment_methods",
}
# Objects that can be over: the event that says so, and the column that keeps when.
ENDS = {
    "customer": ("customer.deleted", "deleted_at"),
    "invoice": ("invoice.deleted", "deleted_at"),
    "payment_method": ("payment_method.detached", "detached_at"),
}

seeds = st.integers(0, 2**32)


def lives(seed: int, count: int = 6, **how: Any) -> World:
    """A world in which `count` customers have lived."""
    world = World(seed, start=START, **how)
    rng = random.Random(seed)
    for _ in range(count):
        lifecycle(world, rng, steps=20)
    return world


@pytest.fixture(scope="module")
def world() -> World:
    """Forty lives, for the tests that only look."""
    return lives(7, 40)


def objects_of(events: list[SimulatedEvent], version: str) -> Iterator[tuple[SimulatedEvent, Any, Any]]:
    """Each event with the object it shows and its previous_attributes (None where it has none)."""
    for event in events:
        data = event.render(version)["data"]
        yield event, data["object"], data.get("previous_attributes")


def overlaid(now: Any, before: dict[str, Any]) -> dict[str, Any]:
    """The object as it was: the old values in their places, and an added metadata key gone again."""
    merged = dict(now)
    for name, value in before.items():
        known = merged.get(name)
        merged[name] = overlaid(known, value) if isinstance(value, dict) and isinstance(known, dict) else value
    if "metadata" in before and isinstance(merged["metadata"], dict):
        merged["metadata"] = {key: value for key, value in merged["metadata"].items() if value is not None}
    return merged


# ── A small world that is always the same ───────────────────────────────────────────────────────────────────


def test_the_same_seed_makes_the_same_events_byte_for_byte() -> None:
    first, second = lives(3), lives(3)
    assert [e.body() for e in first.events] == [e.body() for e in second.events]
    assert first.truth() == second.truth()


def test_no_two_worlds_share_an_id_unless_seed_account_and_mode_are_the_same() -> None:
    worlds = [lives(1), lives(-1), lives(2), lives(1, account="acct_1Other"), lives(1, livemode=True)]
    ids: Counter[str] = Counter()
    for one in worlds:
        ids.update({event.id for event in one.events} | {event.object_id or "" for event in one.events} - {""})
    assert ids.most_common(1)[0][1] == 1


def test_event_ids_are_unique_look_like_stripes_and_do_not_tell_the_order(world: World) -> None:
    ids = [event.id for event in world.events]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"evt_1[0-9A-Za-z]{23}", name) for name in ids)
    ascending = sum(one < other for one, other in pairwise(ids))
    assert 0.4 < ascending / len(ids) < 0.6
    shapes = {"customer": r"cus_\w{14}", "subscription": r"sub_1\w{23}", "invoice": r"in_1\w{23}"}
    for kind, pattern in {**shapes, "payment_method": r"pm_1\w{23}"}.items():
        assert all(re.fullmatch(pattern, name) for name in world.truth()[TABLES[kind]])


def test_a_signup_happens_in_one_second_in_the_order_in_which_stripe_tells_it() -> None:
    world = World(1, start=START, payments=False)
    customer = world.create_customer()
    world.attach(customer)
    world.wait(9)
    mark = len(world.events)
    subscription = world.subscribe(customer, "pro")
    events = world.events[mark:]
    assert [event.type for event in events] == [
        "customer.updated",
        "customer.subscription.created",
        "invoice.created",
        "invoice.finalized",
        "invoice.updated",
        "invoice.payment_succeeded",
        "invoice.paid",
        "customer.subscription.updated",
    ]
    assert {event.created for event in events} == {START + 9}
    assert len({event.request for event in events} - {None}) == 1
    last = events[-1].render()["data"]
    assert last["object"]["id"] == subscription
    assert last["object"]["status"] == "active"
    assert last["previous_attributes"] == {"status": "incomplete"}


def test_one_second_can_hold_two_updates_of_one_object(world: World) -> None:
    updates = Counter(
        (event.object_id, event.created)
        for event in world.events
        if event.type in ("customer.updated", "customer.subscription.updated")
    )
    assert sum(count > 1 for count in updates.values()) > 20


def test_what_stripe_does_by_itself_names_no_request() -> None:
    events = STORIES["dunning"](World(1, start=START))
    assert {event.request is None for event in events if event.type == "invoice.payment_failed"} == {True}
    assert {event.request is None for event in events if event.type == "customer.created"} == {False}


def test_a_billing_cycle_keeps_the_day_of_the_month_where_the_month_has_it() -> None:
    def day(year: int, month: int, date: int) -> int:
        return int(datetime(year, month, date, 12, tzinfo=UTC).timestamp())

    anchor = day(2027, 1, 31)
    ends = [anchor]
    for _ in range(13):
        ends.append(cycle_end(anchor, ends[-1], "month"))
    assert ends[1:5] == [day(2027, 2, 28), day(2027, 3, 31), day(2027, 4, 30), day(2027, 5, 31)]
    assert ends[12:] == [day(2028, 1, 31), day(2028, 2, 29)]
    assert cycle_end(day(2028, 2, 29), day(2028, 2, 29), "year") == day(2029, 2, 28)


# ── Stripe's words ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", API_VERSIONS)
def test_stripes_library_reads_every_kind_of_event_in_every_version(world: World, version: str) -> None:
    one_of_each = {(event.type, event.stub): event for event in world.events}
    assert len(one_of_each) > 35
    for event in one_of_each.values():
        payload = json.loads(event.body(version))
        assert payload == event.render(version)
        read = stripe.Event.construct_from(payload, "sk_test_simulator")
        assert (read.id, read.type, read.created, read.api_version) == (
            event.id,
            event.type,
            event.created,
            version,
        )
        told: Any = read.data.object
        assert told.object == event.object
        assert type(told).__name__.lower() == event.object.replace("_", "")
        assert getattr(told, "id", None) == event.object_id


def test_the_receiver_reads_from_the_body_what_the_event_says_of_itself() -> None:
    for world in (lives(4, 12, account="acct_1Connected"), lives(5, 12, livemode=True)):
        for event in world.events:
            read = inbound.parse(event.body(), received=0.0)
            assert (read.id, read.type, read.created, read.account, read.livemode) == (
                event.id,
                event.type,
                event.created,
                event.account,
                event.livemode,
            )
            assert (read.object_type, read.object_id, read.customer) == (
                event.object,
                event.object_id,
                event.customer,
            )


def test_a_body_is_indented_by_two_spaces_and_keeps_text_as_it_is() -> None:
    world = World(1, start=START)
    world.create_customer(name="Łucja 美咲", metadata={"note": 'a "quoted" \n line'})
    body = world.events[0].body()
    assert body.startswith(b'{\n  "id": "evt_1')
    assert "Łucja 美咲".encode() in body
    assert 1_000 < len(body) < 12_000


@pytest.mark.parametrize(
    ("kind", "moved_away"),
    [
        ("customer", {"next_invoice_sequence"}),  # not there where numbers run through the account
        ("subscription", set()),
        ("invoice", {"subscription"}),  # null in the example, gone from the documented object
        ("payment_method", set()),
        ("charge", {"refunds"}),  # only when it is asked for
        ("payment_intent", set()),
        ("refund", set()),
        ("price", set()),
        ("product", set()),
    ],
)
def test_an_object_has_every_field_of_stripes_own_example(world: World, kind: str, moved_away: set[str]) -> None:
    example = json.loads((EXAMPLES / f"{kind}.json").read_text())
    facts: Any = getattr(world, f"{kind}s")
    if kind == "refund":
        facts = {e.object_id: e.after for e in STORIES["refund"](World(1, start=START)) if e.object == kind}
    shaped = shape(next(iter(facts.values())), CURRENT_API_VERSION, livemode=False)
    assert example.keys() - shaped.keys() == moved_away
    if kind == "subscription":
        item = json.loads((EXAMPLES / "subscription_item.json").read_text())
        told = shaped["items"]["data"][0]
        assert told.keys() == item.keys()
        assert told["price"].keys() == item["price"].keys()
        assert told["plan"].keys() == item["plan"].keys()
    if kind == "invoice":
        assert shaped["lines"]["data"][0].keys() == example["lines"]["data"][0].keys()


@pytest.mark.parametrize(
    ("event_type", "example"),
    [
        ("charge.dispute.created", "dispute"),
        ("checkout.session.completed", "checkout.session"),
        ("invoice_payment.paid", "invoice_payment"),
    ],
)
def test_objects_the_world_does_not_act_out_have_the_fields_of_the_example_too(event_type: str, example: str) -> None:
    told = single(event_type, seed=1, now=START)[-1].render()["data"]["object"]
    assert told.keys() == json.loads((EXAMPLES / f"{example}.json").read_text()).keys()


def test_the_envelope_and_the_stub_of_a_deletion_have_the_fields_of_the_examples() -> None:
    world = World(1, start=START)
    world.delete_customer(world.create_customer(), stub=True)
    told = world.events[-1].render()
    assert told.keys() == json.loads((EXAMPLES / "event.json").read_text()).keys()
    assert told["data"]["object"].keys() == json.loads((EXAMPLES / "deleted_customer.json").read_text()).keys()
    connected = single("customer.created", seed=1, now=START, account="acct_1Connected")[-1].render()
    assert connected.keys() - told.keys() == {"account"}


@pytest.mark.parametrize("version", API_VERSIONS)
def test_each_version_has_things_where_stripe_put_them(version: str) -> None:
    before_basil, before_clover = version < "2025-03-31", version < "2025-09-30"
    world = World(1, start=START)
    customer = world.create_customer(country="DE")
    world.add_discount(customer, 25)
    world.attach(customer)
    subscription = world.subscribe(customer, "pro", quantity=3)
    told = {event.type: event.render(version)["data"]["object"] for event in world.events}

    taken, [item] = (
        told["customer.subscription.updated"],
        told["customer.subscription.updated"]["items"]["data"],
    )
    period = world.subscriptions[subscription].current_period_start, START + 30 * 86_400
    where = taken if before_basil else item
    elsewhere = item if before_basil else taken
    assert (where["current_period_start"], where["current_period_end"]) == period
    assert "current_period_end" not in elsewhere
    assert (taken["plan"]["id"], taken["quantity"]) == (item["price"]["id"], 3)
    assert ("billing_thresholds" in taken) is (version != "2025-03-31.basil")
    assert ("aggregate_usage" in item["price"]["recurring"]) is before_basil

    paid, [line] = told["invoice.paid"], told["invoice.paid"]["lines"]["data"]
    removed = {"charge", "payment_intent", "paid", "discount", "tax", "subscription"}
    assert removed & paid.keys() == (removed if before_basil else set())
    if before_basil:
        assert paid["subscription"] == line["subscription"] == subscription
        assert paid["tax"] == paid["total_tax_amounts"][0]["amount"] == 1_239
        assert line["price"]["id"] == line["plan"]["id"]
        assert told["charge.succeeded"]["invoice"] == paid["id"]
    else:
        assert paid["parent"]["subscription_details"]["subscription"] == subscription
        assert line["parent"]["subscription_item_details"]["subscription"] == subscription
        assert paid["total_taxes"][0]["amount"] == 1_239
        assert line["pricing"]["price_details"]["price"] == item["price"]["id"]
        assert "invoice" not in told["charge.succeeded"]
    # Three seats at 29.00, a quarter off, 19 % tax.
    assert (paid["subtotal"], paid["total"], paid["amount_paid"]) == (8_700, 7_764, 7_764)

    discount = told["customer.discount.created"]
    assert told["customer.updated"]["discount"] == discount
    assert ("coupon" in discount, "source" in discount) == (before_clover, not before_clover)


def test_a_list_inside_an_object_is_cut_at_ten(world: World) -> None:
    invoice = next(fact for fact in world.invoices.values() if fact.subscription)
    long = shape(replace(invoice, lines=invoice.lines[:1] * 11), CURRENT_API_VERSION, livemode=False)
    assert (len(long["lines"]["data"]), long["lines"]["has_more"]) == (10, True)


def test_in_live_mode_the_objects_inside_an_object_say_so_too() -> None:
    bodies = b"".join(event.body() for event in lives(5, 3, livemode=True).events)
    assert b'"livemode": true' in bodies
    assert b'"livemode": false' not in bodies


def test_an_unknown_version_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match=r"known are 2024-06-20, .*endive"):
        world.events[0].render("2031-01-01.fern")


# ── previous_attributes ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", API_VERSIONS)
def test_previous_attributes_turn_an_object_back_into_what_the_event_before_showed(world: World, version: str) -> None:
    shown: dict[str, Any] = {}
    checked = 0
    for event, told, previous in objects_of(world.events, version):
        if event.object_id is None or event.stub:
            continue
        if previous is not None and event.object != "discount":
            assert previous, f"{event.type} tells no change"
            assert overlaid(told, previous) == shown[event.object_id], event.type
            assert all(told.get(name) != value for name, value in previous.items())
            checked += 1
        shown[event.object_id] = told
    assert checked > 200


def test_only_updates_and_three_others_tell_what_was_before(world: World) -> None:
    refunded = STORIES["refund"](World(1, start=START))
    telling = {event.type for event, _, previous in objects_of(world.events + refunded, OLDEST) if previous}
    silent = {event.type for event, _, previous in objects_of(world.events + refunded, OLDEST) if previous is None}
    assert not telling & silent
    assert {name for name in telling if not name.endswith(".updated")} == {
        "payment_method.detached",
        "payment_method.automatically_updated",
        "charge.refunded",
    }
    assert not {name for name in silent if name.endswith(".updated")}


def test_a_detached_payment_method_names_the_customer_it_was_taken_from() -> None:
    [*_, event] = single("payment_method.detached", seed=1, now=START)
    told = event.render()["data"]
    assert told["object"]["customer"] is None
    assert told["previous_attributes"] == {"customer": event.customer}
    assert event.customer is not None


def test_an_added_metadata_key_was_null_before_and_a_changed_list_is_told_whole() -> None:
    world = World(1, start=START)
    customer = world.create_customer(metadata={"kept": "1", "gone": "2"})
    world.wait(5)
    world.update_customer(customer, metadata={"new": "3", "gone": None})
    assert world.events[-1].render()["data"]["previous_attributes"] == {"metadata": {"gone": "2", "new": None}}

    world.attach(customer)
    subscription = world.subscribe(customer, add_on="scale")
    before = world.events[-1].render()["data"]["object"]["items"]["data"]
    world.change(subscription, quantity=4)
    changed = next(
        e for e in world.events if e.before and getattr(e.before, "items", None) != getattr(e.after, "items", None)
    )
    assert changed.render()["data"]["previous_attributes"] == {"items": {"data": before}}


# ── Truth ───────────────────────────────────────────────────────────────────────────────────────────────────


def naive_row(kind: str, told: dict[str, Any], version: str) -> dict[str, Any]:
    """The columns of a billing table, picked out by somebody who only knows Stripe's documentation."""
    names = {
        "customer": "email name phone description currency balance delinquent",
        "subscription": "customer status currency cancel_at_period_end cancel_at canceled_at ended_at "
        "trial_start trial_end default_payment_method latest_invoice collection_method",
        "invoice": "customer number status currency amount_due amount_paid amount_remaining subtotal total "
        "attempt_count billing_reason collection_method due_date period_start period_end "
        "hosted_invoice_url invoice_pdf",
        "payment_method": "customer type",
    }[kind]
    row = {name: told[name] for name in ("id", "livemode", "metadata", "created", *names.split())}
    if kind == "customer":
        row["default_payment_method"] = told["invoice_settings"]["default_payment_method"]
    elif kind == "subscription":
        items = told["items"]["data"]
        period = told if version < "2025-03-31" else items[0]
        row["current_period_start"] = period["current_period_start"]
        row["current_period_end"] = period["current_period_end"]
        row["items"] = [{"id": i["id"], "price": i["price"]["id"], "quantity": i["quantity"]} for i in items]
        row["price"], row["quantity"] = items[0]["price"]["id"], items[0]["quantity"]
    elif kind == "invoice":
        parent = told.get("parent")
        row["paid_at"] = told["status_transitions"]["paid_at"]
        row["subscription"] = parent["subscription_details"]["subscription"] if parent else told.get("subscription")
    else:
        details = told[told["type"]]
        for name in ("brand", "last4", "exp_month", "exp_year", "funding", "country", "fingerprint"):
            row[name] = details.get(name)
    return row


def naive_tables(world: World, version: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The tables of somebody who gets each event once, in order, and keeps the last of each object."""
    tables: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in TABLES.values()}
    for event, told, _ in objects_of(world.events, version):
        if event.object not in TABLES or event.object_id is None:
            continue
        rows = tables[TABLES[event.object]]
        known = rows.get(event.object_id, {})
        row = known if event.stub else naive_row(event.object, told, version)
        if event.object in ENDS:
            event_type, column = ENDS[event.object]
            row = row | {column: event.created if event.type == event_type else known.get(column)}
        rows[event.object_id] = row | {"account": world.account}
    return tables


@settings(max_examples=15)
@given(seeds, st.sampled_from([OLDEST, CURRENT_API_VERSION]), st.booleans())
def test_the_truth_is_what_the_last_event_of_each_object_says(seed: int, version: str, livemode: bool) -> None:
    world = lives(seed, 4, account="acct_1Connected", livemode=livemode)
    assert naive_tables(world, version) == world.truth()


@given(seeds)
@settings(max_examples=15)
def test_a_final_state_is_never_left_and_the_deleted_are_never_changed(seed: int) -> None:
    final = {"void", "canceled", "incomplete_expired", "paid"}
    gone: dict[str, str] = {}
    for event, told, _ in objects_of(lives(seed, 4).events, CURRENT_API_VERSION):
        if event.object_id is None or event.object not in TABLES:
            continue
        assert gone.get(event.object_id) in (None, told.get("status")), event.type
        if event.type in ("customer.deleted", "invoice.deleted", "payment_method.detached"):
            gone[event.object_id] = "gone"
        elif told.get("status") in final:
            gone[event.object_id] = told["status"]


@given(seeds)
@settings(max_examples=15)
def test_time_never_runs_backwards_for_one_customer(seed: int) -> None:
    clocks: dict[str | None, int] = defaultdict(int)
    for event in lives(seed, 4).events:
        assert event.created >= clocks[event.customer] or event.customer is None
        clocks[event.customer] = event.created


def returns_within_a_second(world: World) -> int:
    """How often an update brings an object back, within one second, to a state that it had in that second."""
    entered: dict[tuple[str | None, int], list[Any]] = defaultdict(list)
    returned = 0
    for event in world.events:
        states = entered[event.object_id, event.created]
        if event.before is not None:
            states.append(event.before) if not states else None
            returned += event.after in states
        if event.after not in states:
            states.append(event.after)
    return returned


def test_a_change_and_its_undoing_share_a_second_only_when_flips_are_asked_for() -> None:
    assert returns_within_a_second(lives(11, 60)) == 0
    world, rng = World(11, start=START), random.Random(11)
    for _ in range(60):
        lifecycle(world, rng, steps=20, flips=True)
    assert returns_within_a_second(world) > 0


def test_lives_touch_every_corner_of_the_four_tables() -> None:
    world = lives(1, 250)
    seen = {event.type for event in world.events}
    acted_out = ("customer.subscription.", "invoice.", "payment_method.")
    expected = {name for name in EVENT_TYPES if name.startswith(acted_out) or name in STORIES_TYPES}
    assert expected - seen == {"invoice.payment_attempt_required"}
    statuses = {fact.status for fact in world.subscriptions.values()}
    assert statuses >= {
        "active",
        "trialing",
        "past_due",
        "paused",
        "canceled",
        "incomplete",
        "incomplete_expired",
    }
    assert {event.stub for event in world.events if event.type == "customer.deleted"} == {True, False}


STORIES_TYPES = {"customer.created", "customer.updated", "customer.deleted", "customer.discount.updated"}


def test_what_stripe_would_refuse_is_refused() -> None:
    world = World(1, start=START)
    customer = world.create_customer()
    with pytest.raises(ValueError, match="no payment method"):
        world.subscribe(customer)
    assert [event.type for event in world.events] == ["customer.created"]
    card = world.attach(customer)
    subscription = world.subscribe(customer)
    invoice = world.subscriptions[subscription].latest_invoice or ""
    for refused in (world.void, world.pay, world.decline, world.pay_out_of_band, world.delete_draft):
        with pytest.raises(ValueError, match="is paid"):
            refused(invoice)
    world.detach(card)
    with pytest.raises(ValueError, match="not attached"):
        world.detach(card)
    world.cancel(subscription)
    with pytest.raises(ValueError, match="is canceled"):
        world.renew(subscription)
    world.delete_customer(customer)
    with pytest.raises(ValueError, match="deleted"):
        world.update_customer(customer, email="late@example.com")


def test_four_declined_payments_cancel_a_subscription_and_its_invoice_stays_open() -> None:
    world = World(1, start=START)
    customer = world.create_customer()
    world.attach(customer)
    subscription = world.subscribe(customer)
    world.renew(subscription, pays=False)
    invoice = world.subscriptions[subscription].latest_invoice or ""
    tried = [world.now]
    for _ in range(3):
        world.retry(invoice, pays=False)
        tried.append(world.now)
    assert [later - sooner for sooner, later in pairwise(tried)] == [
        3 * 86_400,
        5 * 86_400,
        7 * 86_400,
    ]
    truth = world.truth()
    assert truth["subscriptions"][subscription]["status"] == "canceled"
    assert (truth["invoices"][invoice]["status"], truth["invoices"][invoice]["attempt_count"]) == ("open", 4)
    assert truth["customers"][customer]["delinquent"] is True


def test_a_customers_credit_pays_their_invoices_first_and_is_used_up() -> None:
    world = World(1, start=START)
    customer = world.create_customer(country="US")
    world.attach(customer)
    world.credit(customer, 1_000)
    subscription = world.subscribe(customer)
    world.renew(subscription)
    first, second = world.invoices_of(customer)
    assert (first.total, first.amount_due, first.amount_paid, first.status) == (900, 0, 0, "paid")
    assert (second.total, second.amount_due, second.amount_paid) == (900, 800, 800)
    assert [charge.amount for charge in world.charges.values()] == [800]
    assert world.truth()["customers"][customer]["balance"] == 0
    told = [e.render()["data"]["object"] for e in world.events if e.type == "invoice.finalized"]
    assert [(o["starting_balance"], o["ending_balance"]) for o in told] == [(-1_000, -100), (-100, 0)]


def test_an_invoice_paid_by_other_means_is_paid_but_no_payment_succeeded() -> None:
    types = [event.type for event in single("invoice.overpaid", seed=1, now=START)]
    assert "invoice.paid" in types
    assert "invoice.payment_succeeded" not in types


# ── Stories, single events, thin events, disorder ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", STORIES)
def test_a_story_is_about_one_customer_and_ends_in_the_truth(name: str) -> None:
    world = World(1, start=START)
    events = STORIES[name](world)
    assert events == world.events
    assert {event.customer for event in events} - {None} == set(world.customers)
    assert [event.created for event in events] == sorted(event.created for event in events)
    assert naive_tables(world, CURRENT_API_VERSION) == world.truth()


def test_the_stories_end_as_they_say() -> None:
    def end(name: str) -> tuple[str, int, bool]:
        world = World(1, start=START)
        STORIES[name](world)
        [subscription], [customer] = world.subscriptions.values(), world.customers.values()
        return subscription.status, subscription.items[0].quantity, customer.deleted_at is not None

    assert {name: end(name) for name in STORIES} == {
        "signup": ("active", 1, False),
        "trial": ("active", 1, False),
        "upgrade": ("active", 5, False),
        "dunning": ("active", 1, False),
        "refund": ("active", 1, False),
        "churn": ("canceled", 1, True),
    }


def test_every_event_type_of_stripe_can_be_made_and_read_by_its_library() -> None:
    listed = (EXAMPLES / "event_types.txt").read_text().split()
    assert list(EVENT_TYPES) == listed
    for event_type in listed:
        events = single(event_type, seed=5, now=START)
        assert [e.created for e in events] == sorted(e.created for e in events)
        last = events[-1]
        assert (last.type, last.created) == (event_type, START)
        assert single(event_type, seed=5, now=START, prelude=False) == [last]
        for version in API_VERSIONS:
            payload = json.loads(last.body(version))
            assert payload["data"]["object"]["object"] in OBJECT_CLASSES, event_type
            assert payload["data"].get("previous_attributes") != {}
        read = stripe.Event.construct_from(payload, "sk_test_simulator")
        assert read.type == event_type
        assert type(read.data.object) is not stripe.StripeObject
        assert inbound.parse(last.body(), received=0.0).customer == last.customer


def test_what_must_come_before_an_event_comes_before_it() -> None:
    types = [event.type for event in single("customer.subscription.resumed", seed=1, now=START)]
    assert types.index("customer.subscription.created") < types.index("customer.subscription.paused")
    assert types[-1] == "customer.subscription.resumed"
    upcoming = single("invoice.upcoming", seed=1, now=START)[-1]
    assert upcoming.object_id is None
    assert "id" not in upcoming.render()["data"]["object"]


@pytest.mark.parametrize("now", [1_785_240_000, 1_801_500_000, 1_803_800_000, 1_835_300_000])
def test_a_single_event_happens_now_whatever_the_calendar(now: int) -> None:
    assert single("invoice.payment_failed", seed=2, now=now)[-1].created == now


def test_a_renewal_that_cannot_be_today_was_yesterday() -> None:
    last_of_july = int(datetime(2026, 7, 31, 12, tzinfo=UTC).timestamp())
    assert single("invoice.payment_failed", seed=2, now=last_of_july)[-1].created == last_of_july - 86_400


def test_a_mistyped_event_type_is_answered_with_the_closest() -> None:
    with pytest.raises(ValueError, match=r"did you mean invoice\.payment_succeeded"):
        single("invoice.payment_succeded", seed=1, now=START)
    with pytest.raises(ValueError, match=r"did you mean customer\.created"):
        single("v1.customer.created", seed=1, now=START)
    with pytest.raises(ValueError, match=r"such as invoice\.paid"):
        single("", seed=1, now=START)


def test_stripes_library_reads_the_thin_twin_of_every_event_that_has_one() -> None:
    client = stripe.StripeClient("sk_test_simulator")
    for event_type in EVENT_TYPES:
        event = single(event_type, seed=5, now=START)[-1]
        known = get_v2_event_notification_class(f"v1.{event_type}").__name__ != "UnknownEventNotification"
        if not known:
            with pytest.raises(ValueError, match="no thin event"):
                thin(event)
            continue
        twin = thin(event)
        read: Any = EventNotification.from_json(json.dumps(twin), client)
        assert read.type == f"v1.{event_type}"
        assert datetime.fromisoformat(read.created).timestamp() == START
        assert hasattr(read, "related_object") == ("related_object" in twin)
        assert not hasattr(read, "related_object") or read.related_object.type == twin["related_object"]["type"]


def test_a_thin_event_names_its_object_and_its_twin() -> None:
    [*_, paid] = single("invoice.paid", seed=1, now=START, account="acct_1Connected")
    twin = thin(paid)
    assert twin["snapshot_event"] == paid.id != twin["id"]
    assert twin["related_object"] == {
        "id": paid.object_id,
        "type": "invoice",
        "url": f"/v1/invoices/{paid.object_id}",
    }
    assert (twin["context"], twin["object"]) == ("acct_1Connected", "v2.core.event")
    [*_, upcoming] = single("invoice.upcoming", seed=1, now=START)
    assert thin(upcoming)["data"]["customer"] == upcoming.customer
    assert "related_object" not in thin(upcoming)


def test_every_event_is_delivered_some_twice_and_the_order_is_lost(world: World) -> None:
    sent = deliveries(world.events, random.Random(1), duplicates=0.3)
    assert set(sent) == set(world.events)
    assert 1.2 < len(sent) / len(world.events) < 1.7
    places = {event: place for place, event in enumerate(world.events)}
    overtaken = sum(places[a] > places[b] for a, b in pairwise(sent))
    assert 0.4 < overtaken / len(sent) < 0.6
    assert sent == deliveries(world.events, random.Random(1), duplicates=0.3)


def test_a_window_bounds_how_far_an_event_can_fall_behind(world: World) -> None:
    sent = deliveries(world.events, random.Random(1), duplicates=0, shuffle=5)
    places = {event: place for place, event in enumerate(world.events)}
    distances = {abs(places[event] - place) for place, event in enumerate(sent)}
    assert max(distances) <= 5
    assert len(distances) > 2
    assert deliveries(world.events, random.Random(1), duplicates=0, shuffle=False) == world.events
