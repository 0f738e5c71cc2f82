"""Lives of customers: six that are always told the same way, and any number that chance makes up."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from kamiyo.simulator.events import SimulatedEvent
from kamiyo.simulator.facts import ENDED, Invoice, Subscription
from kamiyo.simulator.terms import DAY, HOUR
from kamiyo.simulator.world import World

Story = Callable[[World], list[SimulatedEvent]]


def signup(world: World) -> list[SimulatedEvent]:
    """A customer comes, gives a card and subscribes; the first invoice is paid in the same second."""
    mark = len(world.events)
    _sign_up(world)
    return world.events[mark:]


def trial(world: World) -> list[SimulatedEvent]:
    """A customer tries for fourteen days without a card, gives one after the reminder, and stays."""
    mark = len(world.events)
    customer = world.create_customer()
    world.wait(40)
    subscription = world.subscribe(customer, "pro", trial_days=14, pauses_without_card=True)
    world.announce_trial_end(subscription)
    world.wait(5 * HOUR)
    world.set_default(customer, world.attach(customer))
    world.renew(subscription)
    return world.events[mark:]


def upgrade(world: World) -> list[SimulatedEvent]:
    """A subscriber takes the larger plan ten days into the month, then five seats of it, and renews."""
    mark = len(world.events)
    _, subscription = _sign_up(world)
    world.wait(10 * DAY)
    world.change(subscription, plan="pro")
    world.wait(3 * DAY)
    world.change(subscription, quantity=5)
    world.announce_renewal(subscription)
    world.renew(subscription)
    return world.events[mark:]


def dunning(world: World) -> list[SimulatedEvent]:
    """A renewal is declined twice; the customer brings another card, and the third try succeeds."""
    mark = len(world.events)
    customer, subscription = _sign_up(world)
    world.renew(subscription, pays=False)
    invoice = world.subscriptions[subscription].latest_invoice or ""
    world.retry(invoice, pays=False)
    world.wait(2 * HOUR)
    world.set_default(customer, world.attach(customer))
    world.retry(invoice, pays=True)
    return world.events[mark:]


def refund(world: World) -> list[SimulatedEvent]:
    """A subscriber gets a part of the first payment back, then the rest. No billing table follows refunds."""
    mark = len(world.events)
    customer, _ = _sign_up(world)
    charge = next(fact for fact in world.charges.values() if fact.customer == customer)
    world.wait(2 * DAY)
    world.refund(charge.id, charge.amount // 3)
    world.wait(DAY)
    world.refund(charge.id)
    return world.events[mark:]


def churn(world: World) -> list[SimulatedEvent]:
    """A subscriber leaves at the end of the month, changes their mind, leaves after all, and is deleted."""
    mark = len(world.events)
    customer, subscription = _sign_up(world)
    card = world.wallet(customer)[0].id
    world.wait(5 * DAY)
    world.cancel_at_period_end(subscription)
    world.wait(HOUR)
    world.keep(subscription)
    world.wait(6 * DAY)
    world.cancel_at_period_end(subscription)
    world.renew(subscription)
    world.wait(DAY)
    world.detach(card)
    world.wait(30)
    world.delete_customer(customer)
    return world.events[mark:]


#: The stories by name. Each tells one customer's life in a world and gives its events in the order they
#: happened.
STORIES: dict[str, Story] = {
    "signup": signup,
    "trial": trial,
    "upgrade": upgrade,
    "dunning": dunning,
    "refund": refund,
    "churn": churn,
}


def _sign_up(world: World) -> tuple[str, str]:
    customer = world.create_customer()
    world.wait(25)
    world.set_default(customer, world.attach(customer))
    world.wait(4)
    return customer, world.subscribe(customer)


# ── Chance ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Act:
    """Something that can happen next, and how likely it is.

    `returns` says that it can bring an object back to a state that it had before.
    """

    weight: int
    act: Callable[[], object]
    returns: bool = True


def lifecycle(world: World, rng: random.Random, *, steps: int = 12, flips: bool = False) -> list[SimulatedEvent]:
    """One plausible life of a customer, made up of `steps` that fit what is true at the time.

    It begins within a month of `world.start`, however many lives the world has had: lives go on side by
    side. So `world.events` is in true order for each customer, and sorted by `created` (the sort is stable)
    for all of them.

    Many steps share a second. With `flips`, one second can also hold a change and its undoing; which of the
    two came last cannot then be told from the events, only by reading the object again. Without, it always
    can.
    """
    mark, clock = len(world.events), world.now
    world.now = world.start + rng.randrange(30 * DAY)
    customer = world.create_customer()
    for _ in range(steps):
        pause = rng.choice((0, 0, 0, rng.randint(1, 5), rng.randint(60, 3_600), rng.randint(DAY, 5 * DAY)))
        world.wait(pause)
        possible = list(_possible(world, rng, customer))
        step = rng.choices(possible, [one.weight for one in possible])[0]
        if step.returns and not pause and not flips:
            world.wait(1)
        step.act()
    world.now = max(clock, world.now)
    return world.events[mark:]


def _possible(world: World, rng: random.Random, customer: str) -> Iterator[_Act]:
    owner, wallet = world.customers[customer], world.wallet(customer)
    for method in wallet:
        if method.exp_month is not None and method.exp_year is not None:
            # Always later than before, so a card never gets an old expiry back.
            later = partial(world.update_card, method.id, exp_month=method.exp_month, exp_year=method.exp_year + 1)
            yield _Act(1, partial(later, by_network=rng.random() < 0.5), returns=False)
    if owner.deleted_at is not None:
        yield _Act(1, partial(world.wait, DAY))
        return

    word = f"{rng.randrange(10**9):09d}"
    yield _Act(3, partial(world.update_customer, customer, email=world.new_email()), returns=False)
    yield _Act(3, partial(world.update_customer, customer, metadata={"note": word}), returns=False)
    yield _Act(1, partial(world.update_customer, customer, phone=f"+1555{word}", name=f"Name {word}"), returns=False)
    yield _Act(1, partial(world.update_customer, customer, metadata={"note": None}))
    yield _Act(1, partial(world.credit, customer, rng.randrange(100, 3_000)))
    yield _Act(1, partial(world.add_discount, customer, rng.choice((10, 25, 50))), returns=False)
    if owner.discount:
        yield _Act(1, partial(world.remove_discount, customer))
    if len(wallet) < 3:
        kind = rng.choice(("card", "card", "card", "us_bank_account", "link"))
        yield _Act(6 if not wallet else 1, partial(world.attach, customer, kind), returns=False)
    for method in wallet:
        yield _Act(1, partial(world.detach, method.id))
        if method.id != owner.default_payment_method:
            yield _Act(1, partial(world.set_default, customer, method.id))

    subscriptions = world.subscriptions_of(customer)
    live = [fact for fact in subscriptions if fact.status not in ENDED]
    if len(live) < 2:
        yield from _ways_to_subscribe(world, rng, customer, has_card=bool(wallet), eager=not live)
    for subscription in live:
        yield from _next_of_subscription(world, rng, subscription, has_card=bool(wallet))
    for invoice in world.invoices_of(customer)[-6:]:
        yield from _next_of_invoice(world, rng, invoice, has_card=bool(wallet))
    yield _Act(1, partial(world.create_invoice, customer, rng.randrange(500, 50_000)))
    yield _Act(1, partial(world.create_invoice, customer, rng.randrange(500, 50_000), days_until_due=14))
    if subscriptions and rng.random() < 0.5:
        yield _Act(1, partial(world.delete_customer, customer, stub=rng.random() < 0.3), returns=False)


def _ways_to_subscribe(
    world: World, rng: random.Random, customer: str, *, has_card: bool, eager: bool
) -> Iterator[_Act]:
    plan = rng.choice(("starter", "pro", "pro_yearly"))
    subscribe = partial(
        world.subscribe,
        customer,
        plan,
        quantity=rng.randint(1, 5),
        add_on="scale" if plan != "pro_yearly" and rng.random() < 0.3 else None,
        metadata={"order": f"{rng.randrange(10**6):06d}"} if rng.random() < 0.5 else None,
    )
    weight = 6 if eager else 1
    yield _Act(weight, partial(subscribe, trial_days=rng.choice((7, 14, 30)), pauses_without_card=True))
    yield _Act(weight // 3 + 1, partial(subscribe, days_until_due=30))
    yield _Act(weight // 2, partial(subscribe, pays=False))
    if has_card:
        chosen = world.wallet(customer)[0].id if rng.random() < 0.3 else None
        yield _Act(weight * 2, partial(subscribe, payment_method=chosen))


def _next_of_subscription(world: World, rng: random.Random, fact: Subscription, *, has_card: bool) -> Iterator[_Act]:
    word = f"{rng.randrange(10**9):09d}"
    yield _Act(3, partial(world.update_subscription, fact.id, note=word), returns=False)
    yield _Act(1, partial(world.cancel, fact.id), returns=False)
    pays = has_card and rng.random() < 0.75
    if fact.status == "incomplete":
        yield _Act(2, partial(world.expire, fact.id))
    elif fact.status == "paused":
        if has_card:
            yield _Act(4, partial(world.resume, fact.id))
    elif fact.pending_update:
        yield _Act(4, partial(world.expire_change, fact.id))
    else:
        if fact.status == "trialing":
            yield _Act(2, partial(world.announce_trial_end, fact.id))
        elif fact.status == "active":
            yield _Act(1, partial(world.announce_renewal, fact.id))
        # A change is billed for the rest of the period, so there must be some left.
        early = world.now + DAY < fact.current_period_end
        if early and fact.status == "active" and fact.items[0].price.nickname != "pro_yearly":
            yield _Act(2, partial(world.change, fact.id, quantity=rng.randint(1, 9), pays=pays))
            yield _Act(2, partial(world.change, fact.id, plan=rng.choice(("starter", "pro")), pays=pays))
            if fact.items[0].price.nickname == "starter" and fact.days_until_due is None:
                yield _Act(4, partial(world.request_change, fact.id, "pro"))
        if fact.cancel_at_period_end:
            yield _Act(2, partial(world.keep, fact.id))
        else:
            yield _Act(1, partial(world.cancel_at_period_end, fact.id))
        yield _Act(6, partial(world.renew, fact.id, pays=pays))


def _next_of_invoice(world: World, rng: random.Random, fact: Invoice, *, has_card: bool) -> Iterator[_Act]:
    if fact.deleted_at is not None:
        return
    word = f"{rng.randrange(10**9):09d}"
    yield _Act(1, partial(world.update_invoice, fact.id, note=word), returns=False)
    if fact.status == "draft":
        yield _Act(8, partial(world.finalize, fact.id))
        yield _Act(1, partial(world.fail_finalization, fact.id))
        if fact.subscription is None:
            yield _Act(1, partial(world.delete_draft, fact.id))
    elif fact.status == "open":
        if has_card:
            yield _Act(3, partial(world.pay, fact.id))
            yield _Act(1, partial(world.require_action, fact.id))
        yield _Act(1, partial(world.decline, fact.id))
        if fact.next_payment_attempt is not None:
            yield _Act(6, partial(world.retry, fact.id, pays=has_card and rng.random() < 0.4))
        if fact.due_date is not None:
            yield _Act(1, partial(world.remind, fact.id, rng.choice(("invoice.will_be_due", "invoice.overdue"))))
        yield _Act(1, partial(world.pay_out_of_band, fact.id, overpaid=rng.choice((0, 0, 250))))
        yield _Act(1, partial(world.mark_uncollectible, fact.id))
        if fact.billing_reason != "subscription_create":
            yield _Act(1, partial(world.void, fact.id))
    elif fact.status == "uncollectible":
        yield _Act(2, partial(world.pay_out_of_band, fact.id))
        yield _Act(1, partial(world.void, fact.id))
