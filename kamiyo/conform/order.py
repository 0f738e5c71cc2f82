"""What comes in another order than it happened. Only a view of the objects can tell how that ends."""

from collections.abc import Sequence

from kamiyo.conform import samples
from kamiyo.conform.check import check
from kamiyo.conform.samples import Sample
from kamiyo.conform.target import Fault, Target, Unseen


@check(
    "older event last",
    "Stripe does not deliver in order, and a retry comes days late. A customer who has paid must not be "
    "locked out by the news of a week ago that he had not.",
)
async def older_event_last(target: Target) -> str:
    """A renewal fails and is paid three days later; the news of the failure comes last."""
    world = samples.new_world()
    customer = world.create_customer()
    world.attach(customer)
    subscription = world.subscribe(customer, "pro")
    world.wait(60)
    world.renew(subscription, pays=False)
    world.retry(world.subscriptions[subscription].latest_invoice or "", pays=True)
    told = [samples.sample_of(event) for event in world.events]
    changes = [one for one in told if one.object_id == subscription]
    late, newest = changes[-2:]
    await _deliver(target, [one for one in told if one is not late] + [late])
    await _judge(target, late, newest)
    return "the newer state stays"


@check(
    "same second, in order",
    "`created` has whole seconds, and one change at Stripe is often two events. Who keeps what is strictly "
    "newer drops the second of them.",
)
async def same_second_in_order(target: Target) -> str:
    """Two changes of a customer in one second, the first first."""
    created, older, newer = _pair()
    await _deliver(target, [created, older, newer])
    await _judge(target, older, newer)
    return "the later one stays"


@check(
    "same second, reversed",
    "The same two, overtaking: `created` cannot tell them apart, but `previous_attributes` can. Who keeps "
    "what came last goes back in time.",
)
async def same_second_reversed(target: Target) -> str:
    """Two changes of a customer in one second, the second first."""
    created, older, newer = _pair()
    await _deliver(target, [created, newer, older])
    await _judge(target, older, newer)
    return "the later one stays"


def _pair() -> tuple[Sample, Sample, Sample]:
    world = samples.new_world()
    customer = world.create_customer()
    world.wait(60)
    for name in ("Ada Middle", "Ada Last"):
        world.update_customer(customer, name=name, email=world.new_email())
    created, older, newer = (samples.sample_of(event) for event in world.events)
    return created, older, newer


async def _deliver(target: Target, ordered: Sequence[Sample]) -> None:
    for one in ordered:
        await target.accepts(one, what=one.event_type)
    for one in ordered:
        await target.effect(one, what=one.event_type)
    # For a receiver that works in the background and shows no events: what came after all of them is done, so
    # they are as well, unless it works on several at once.
    after = samples.customer()
    await target.accepts(after, what=after.event_type)
    await target.effect(after, what=after.event_type)


async def _judge(target: Target, older: Sample, newer: Sample) -> None:
    """Raises Fault unless the receiver's object says what `newer` says where `older` says something else."""
    held = await target.object(newer.object_type, newer.object_id or "")
    if held is None:
        raise Fault(f"the {newer.object_type} is not there")
    different = [
        name
        for name, value in newer.object.items()
        if isinstance(value, str | bool) and older.object.get(name) != value
    ]
    shown = [name for name in different if name in held]
    if not shown:
        raise Unseen(f"the view of objects shows none of what changed: {', '.join(different)}")
    wrong = [name for name in shown if held[name] != newer.object[name]]
    if wrong:
        went_back = all(held[name] == older.object.get(name) for name in wrong)
        raise Fault(f"{'the older one won' if went_back else 'something else is kept'}: {', '.join(wrong)}")


CHECKS = (older_event_last, same_second_in_order, same_second_reversed)
