"""A small deterministic Stripe, so that nobody needs an account to see what Stripe sends.

`World` holds customers, subscriptions, invoices and payment methods, and records the events that Stripe
would send when they change. An event is rendered in any API version; `truth()` says what the billing tables
must hold in the end; `deliveries()` brings the events into the disorder in which they really arrive.

    facts · terms    what is true: one frozen value for each object; currencies, taxes, billing cycles
    ledger           clock, ids, what exists, what was said
    customers · invoices · subscriptions · world    what Stripe does, one layer on the other
    shapes           how an object is worded in each API version, from the templates in `objects/`
    events · thin    one event on the wire, and `previous_attributes`
    truth            what the billing tables must say
    stories          six lives always told the same way, and any number that chance makes up
    single · catalogue    one event of any type, with what must come before it
    disorder         late, twice, in another order

Everything comes from a seed: no clock, no network, no file but its own templates.
"""

from kamiyo.simulator.catalogue import EVENT_TYPES, OBJECTS
from kamiyo.simulator.disorder import deliveries
from kamiyo.simulator.events import SimulatedEvent, encode, previous_attributes
from kamiyo.simulator.ledger import PLANS
from kamiyo.simulator.shapes import API_VERSIONS, CURRENT_API_VERSION
from kamiyo.simulator.single import single
from kamiyo.simulator.stories import STORIES, Story, lifecycle
from kamiyo.simulator.thin import thin
from kamiyo.simulator.truth import Truth
from kamiyo.simulator.world import World

__all__ = [
    "API_VERSIONS",
    "CURRENT_API_VERSION",
    "EVENT_TYPES",
    "OBJECTS",
    "PLANS",
    "STORIES",
    "SimulatedEvent",
    "Story",
    "Truth",
    "World",
    "deliveries",
    "encode",
    "lifecycle",
    "previous_attributes",
    "single",
    "thin",
]
