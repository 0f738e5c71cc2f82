"""What events can hold: new types, no id, no object, odd text, the shapes of other years, a lot of it."""

from datetime import datetime

from kamiyo.conform import samples
from kamiyo.conform.check import check
from kamiyo.conform.samples import Sample
from kamiyo.conform.target import NOTHING_TO_OBSERVE, Fault, Target
from kamiyo.simulator import API_VERSIONS

# The most that one entry of Amazon EventBridge long could hold, through which Stripe sends the same events.
_LARGE = 256 * 1024


@check(
    "unknown type",
    "Stripe adds event types, and an endpoint may be sent all of them. One that is not known must still be "
    "answered 2xx: refusing it makes Stripe repeat it for days, and in the end disable the endpoint.",
)
async def unknown_type(target: Target) -> str:
    """A type that does not exist yet, about an object that does not either."""
    payload = samples.customer_payload()
    payload["type"] = "kamiyo.novelty.invented"
    payload["data"]["object"] |= {
        "id": "nov_1" + payload["id"].removeprefix("evt_"),
        "object": "kamiyo.novelty",
    }
    return await _taken(target, samples.sample(payload))


@check(
    "object without id",
    "`invoice.upcoming` previews an invoice that does not exist yet, and `balance.available` is about the "
    'only balance there is: their objects have no id. `object["id"]` breaks on them, for three days each.',
)
async def object_without_id(target: Target) -> str:
    """The preview of a renewal, after the subscription it is about; and a balance."""
    world = samples.new_world()
    customer = world.create_customer()
    subscription = world.subscribe(customer, "pro", trial_days=14)
    world.announce_renewal(subscription)
    *before, upcoming = (samples.sample_of(event) for event in world.events)
    for one in before:
        await target.accepts(one, what=one.event_type)
    balance = samples.customer_payload() | {"type": "balance.available"}
    money = [{"amount": 2900, "currency": "usd", "source_types": {"card": 2900}}]
    balance["data"] = {"object": {"object": "balance", "available": money, "livemode": False, "pending": money}}
    await _taken(target, upcoming, what=upcoming.event_type)
    return await _taken(target, samples.sample(balance), what="balance.available")


@check(
    "thin event",
    "A thin event names its object and carries no data; Stripe recommends them for new endpoints. Reading "
    "`data.object` breaks on the first.",
)
async def thin_event(target: Target) -> str:
    """`v2.core.event` about a new customer."""
    return await _taken(target, samples.thin_customer())


@check(
    "\\u0000 in metadata",
    "Metadata is your own users' text, and JSON can hold a NUL in it. PostgreSQL's jsonb and text cannot: "
    "storing it parsed fails, at each of Stripe's retries again.",
)
async def nul_in_metadata(target: Target) -> str:
    """A customer with `\\u0000` in a value of their metadata."""
    payload = samples.customer_payload()
    payload["data"]["object"]["metadata"] = {"note": "before\0after"}
    return await _taken(target, samples.sample(payload))


@check(
    "old and new shapes",
    "An event keeps the API version it was made with, and one endpoint can see several. 2025-03-31.basil "
    "moved a subscription's period into its items, and an invoice's subscription into its parent.",
)
async def old_and_new_shapes(target: Target) -> str:
    """One signup in the shape of each API version, from the oldest to the newest."""
    compared = seen = False
    for version in API_VERSIONS:
        world = samples.new_world()
        customer = world.create_customer()
        world.attach(customer)
        subscription = world.subscribe(customer, "pro")
        told = [samples.sample_of(event, version) for event in world.events]
        for one in told:
            await target.accepts(one, what=f"{one.event_type} as of {version}")
        for one in told:
            seen = await target.effect(one, what=f"{one.event_type} as of {version}")
        if target.objects is not None:
            fact = world.subscriptions[subscription]
            compared |= await _same(
                target, version, "subscription", subscription, "current_period_end", fact.current_period_end
            )
            compared |= await _same(target, version, "invoice", fact.latest_invoice or "", "subscription", subscription)
    kept = ", and kept alike" if compared else ", and processed" if seen else f"; {NOTHING_TO_OBSERVE}"
    return f"accepted in {len(API_VERSIONS)} API versions{kept}"


@check(
    "a large event",
    "An invoice with many lines is large, and some servers stop at 100 KB: what is refused for its size is "
    "refused at every retry.",
)
async def large_event(target: Target) -> str:
    """An event of 256 KiB."""
    return await _taken(target, samples.padded(_LARGE))


async def _taken(target: Target, sample: Sample, what: str = "") -> str:
    await target.accepts(sample, what=what)
    seen = await target.effect(sample, what=what)
    return "accepted, and processed" if seen else f"accepted; {NOTHING_TO_OBSERVE}"


async def _same(target: Target, version: str, object_type: str, object_id: str, name: str, expected: int | str) -> bool:
    held = await target.object(object_type, object_id)
    if held is None or name not in held:
        return False
    if _plain(held[name]) != expected:
        empty = held[name] is None
        raise Fault(f"as of {version}, {object_type}.{name} {'is empty' if empty else 'is something else'}")
    return True


def _plain(value: object) -> object:
    """Times in unix seconds, whatever the view shows them as."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return value
    return int(value.timestamp()) if isinstance(value, datetime) else value


CHECKS = (unknown_type, object_without_id, thin_event, nul_in_metadata, old_and_new_shapes, large_event)
