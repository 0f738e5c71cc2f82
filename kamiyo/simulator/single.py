"""One event of any type, with the life that leads up to it where there is one."""

import random
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from kamiyo.simulator.catalogue import EVENT_TYPES, plain
from kamiyo.simulator.events import SimulatedEvent
from kamiyo.simulator.facts import Fact, Plain
from kamiyo.simulator.shapes import CURRENT_API_VERSION, plan
from kamiyo.simulator.terms import DAY, HOUR
from kamiyo.simulator.world import World


def single(
    event_type: str,
    *,
    seed: int,
    now: int,
    prelude: bool = True,
    account: str = "",
    livemode: bool = False,
) -> list[SimulatedEvent]:
    """A realistic event of `event_type` that happens at `now` (unix seconds), last in a list.

    Where that cannot be it is as little earlier as can be: no month's subscription renews on a 31 July.

    Before it come the events that must have happened for it to be true, in order: a subscription cannot be
    canceled that nobody took. Without `prelude` the list is that one event. The same seed and time give the
    same events.

    Raises ValueError, with the closest names, for a type that Stripe does not have.
    """
    if event_type not in EVENT_TYPES:
        raise ValueError(_unknown(event_type))
    recipe = _RECIPES.get(event_type, _invent(event_type))
    start, best = now, list[SimulatedEvent]()
    # How long the prelude takes depends a little on when it begins (months differ), so approach it.
    for _ in range(4):
        world = World(seed, start=start, account=account, livemode=livemode)
        recipe(world)
        last = max(place for place, event in enumerate(world.events) if event.type == event_type)
        reached = world.events[last].created
        if reached <= now and (not best or best[-1].created < reached):
            best = world.events[: last + 1]
        start -= reached - now
    return best if prelude else best[-1:]


def _unknown(event_type: str) -> str:
    close = get_close_matches(event_type.removeprefix("v1."), EVENT_TYPES, n=3, cutoff=0.5)
    if close:
        return f"Stripe has no event type {event_type!r}; did you mean {' or '.join(close)}?"
    return f"Stripe has no event type {event_type!r}; it has {len(EVENT_TYPES)} others, such as invoice.paid"


# ── What must happen ────────────────────────────────────────────────────────────────────────────────────────

_Recipe = Callable[[World], Any]


def _customer(world: World) -> str:
    customer = world.create_customer()
    world.wait(30)
    return customer


def _with_card(world: World) -> tuple[str, str]:
    customer = _customer(world)
    card = world.attach(customer)
    world.wait(2)
    return customer, card


def _default_card(world: World) -> None:
    customer, card = _with_card(world)
    world.set_default(customer, card)


def _subscribed(world: World, plan_name: str = "starter", **how: Any) -> str:
    customer, _ = _with_card(world)
    subscription = world.subscribe(customer, plan_name, **how)
    world.wait(2 * DAY)
    return subscription


def _trialing(world: World) -> str:
    return world.subscribe(_customer(world), "pro", trial_days=14, pauses_without_card=True)


def _paused(world: World) -> str:
    subscription = _trialing(world)
    world.renew(subscription)
    world.wait(DAY)
    return subscription


def _resumed(world: World) -> None:
    subscription = _paused(world)
    world.attach(world.subscriptions[subscription].customer)
    world.resume(subscription)


def _change_requested(world: World) -> str:
    subscription = _subscribed(world)
    world.request_change(subscription, "scale")
    return subscription


def _change_paid(world: World) -> None:
    subscription = _change_requested(world)
    world.wait(HOUR)
    world.pay(world.subscriptions[subscription].latest_invoice or "")


def _draft(world: World, *, sent: bool = False) -> str:
    customer, _ = _with_card(world)
    invoice = world.create_invoice(customer, 4_900, days_until_due=14 if sent else None)
    world.wait(HOUR)
    return invoice


def _open(world: World, *, sent: bool = False) -> str:
    invoice = _draft(world, sent=sent)
    world.finalize(invoice)
    world.wait(HOUR)
    return invoice


def _last_charge(world: World) -> str:
    _subscribed(world)
    return next(reversed(world.charges))


def _discounted(world: World) -> str:
    customer = _customer(world)
    world.add_discount(customer, 25)
    world.wait(DAY)
    return customer


def _discount_replaced(world: World) -> None:
    world.add_discount(_discounted(world), 50)


def _new_expiry(world: World, *, by_network: bool) -> None:
    _, card = _with_card(world)
    world.update_card(card, exp_month=1, exp_year=2036, by_network=by_network)


def _said(event_type: str, facts: str, **changes: Any) -> _Recipe:
    """Somebody subscribes; then an event about the last of these facts, with these values in it."""

    def recipe(world: World) -> None:
        _subscribed(world)
        fact: Fact = next(reversed(getattr(world, facts).values()))
        after = replace(fact, **changes)
        world.say(event_type, after, before=fact if event_type.endswith(".updated") else None)

    return recipe


def _plan(event_type: str) -> _Recipe:
    def recipe(world: World) -> None:
        price = world.price("pro")
        renamed = replace(price, nickname="Pro (2026)")
        before, after = (
            Plain(id=one.id, created=one.created, value=plan(one, CURRENT_API_VERSION)) for one in (price, renamed)
        )
        if event_type == "plan.updated":
            world.say(event_type, after, before=before)
        else:
            world.say(event_type, before)

    return recipe


def _refunded(event_type: str, status: str) -> _Recipe:
    def recipe(world: World) -> None:
        world.refund(_last_charge(world))
        refund = next(reversed(world.refunds.values()))
        before = refund if event_type.endswith(".updated") else None
        world.say(event_type, replace(refund, status=status), before=before)

    return recipe


def _invent(event_type: str) -> _Recipe:
    def recipe(world: World) -> None:
        rng = random.Random(f"{world.seed}/{event_type}")  # noqa: S311 (repeatable on purpose)
        fact = plain(event_type, rng, world.now)
        if event_type.endswith(".updated") and "metadata" in fact.value:
            reviewed = replace(fact, value={**fact.value, "metadata": {"reviewed": "yes"}})
            world.say(event_type, reviewed, before=fact)
        else:
            world.say(event_type, fact)

    return recipe


_RECIPES: dict[str, _Recipe] = {
    "customer.created": _customer,
    "customer.updated": _default_card,
    "customer.deleted": lambda world: world.delete_customer(_customer(world)),
    "customer.discount.created": _discounted,
    "customer.discount.updated": _discount_replaced,
    "customer.discount.deleted": lambda world: world.remove_discount(_discounted(world)),
    "payment_method.attached": _with_card,
    "payment_method.detached": lambda world: world.detach(_with_card(world)[1]),
    "payment_method.updated": lambda world: _new_expiry(world, by_network=False),
    "payment_method.automatically_updated": lambda world: _new_expiry(world, by_network=True),
    "customer.subscription.created": _subscribed,
    "customer.subscription.updated": lambda world: world.change(_subscribed(world), plan="pro"),
    "customer.subscription.deleted": lambda world: world.cancel(_subscribed(world)),
    "customer.subscription.trial_will_end": lambda world: world.announce_trial_end(_trialing(world)),
    "customer.subscription.paused": _paused,
    "customer.subscription.resumed": _resumed,
    "customer.subscription.pending_update_applied": _change_paid,
    "customer.subscription.pending_update_expired": lambda world: world.expire_change(_change_requested(world)),
    "invoice.created": _draft,
    "invoice.updated": lambda world: world.update_invoice(_draft(world), purchase_order="PO-1042"),
    "invoice.deleted": lambda world: world.delete_draft(_draft(world)),
    "invoice.finalization_failed": lambda world: world.fail_finalization(_draft(world)),
    "invoice.finalized": _open,
    "invoice.sent": lambda world: _open(world, sent=True),
    "invoice.will_be_due": lambda world: world.remind(_open(world, sent=True), "invoice.will_be_due"),
    "invoice.overdue": lambda world: world.remind(_open(world, sent=True), "invoice.overdue"),
    "invoice.overpaid": lambda world: world.pay_out_of_band(_open(world, sent=True), overpaid=250),
    "invoice.paid": _subscribed,
    "invoice.payment_succeeded": lambda world: world.renew(_subscribed(world)),
    "invoice.payment_failed": lambda world: world.renew(_subscribed(world), pays=False),
    "invoice.payment_action_required": lambda world: world.require_action(_open(world)),
    "invoice.payment_attempt_required": lambda world: world.remind(_open(world), "invoice.payment_attempt_required"),
    "invoice.marked_uncollectible": lambda world: world.mark_uncollectible(_open(world)),
    "invoice.voided": lambda world: world.void(_open(world)),
    "invoice.upcoming": lambda world: world.announce_renewal(_subscribed(world)),
    "charge.succeeded": _subscribed,
    "charge.failed": lambda world: world.decline(_open(world)),
    "charge.refunded": lambda world: world.refund(_last_charge(world)),
    "refund.created": lambda world: world.refund(_last_charge(world)),
    "charge.refund.updated": _refunded("charge.refund.updated", "failed"),
    "refund.updated": _refunded("refund.updated", "failed"),
    "refund.failed": _refunded("refund.failed", "failed"),
    "charge.captured": _said("charge.captured", "charges"),
    "charge.expired": _said("charge.expired", "charges", captured=False),
    "charge.pending": _said("charge.pending", "charges", status="pending"),
    "charge.updated": _said("charge.updated", "charges", customer_name="Jenny Rosen"),
    "payment_intent.created": _open,
    "payment_intent.succeeded": _subscribed,
    "payment_intent.payment_failed": lambda world: world.decline(_open(world)),
    "payment_intent.requires_action": lambda world: world.require_action(_open(world)),
    "payment_intent.canceled": lambda world: world.void(_open(world)),
    "payment_intent.processing": _said("payment_intent.processing", "payment_intents", status="processing"),
    "payment_intent.partially_funded": _said(
        "payment_intent.partially_funded", "payment_intents", status="requires_action"
    ),
    "payment_intent.amount_capturable_updated": _said(
        "payment_intent.amount_capturable_updated", "payment_intents", status="requires_capture"
    ),
    "price.created": _said("price.created", "prices"),
    "price.updated": _said("price.updated", "prices", nickname="Pro (2026)"),
    "price.deleted": _said("price.deleted", "prices", active=False),
    "product.created": _said("product.created", "products"),
    "product.updated": _said("product.updated", "products", name="Kamiyo Pro (2026)"),
    "product.deleted": _said("product.deleted", "products", active=False),
    "plan.created": _plan("plan.created"),
    "plan.updated": _plan("plan.updated"),
    "plan.deleted": _plan("plan.deleted"),
}
