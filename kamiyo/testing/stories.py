"""Lives of customers, as Stripe tells them: whole, in order, from a seed.

    story = stories.dunning(seed=1)
    story.customer                    # cus_…
    story.of("invoice.paid")          # the events of that type
    for event in story: ...           # every event, in the order in which it happened

The same seed tells the same story with the same ids; another seed is another customer.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from kamiyo import simulator
from kamiyo.simulator import SimulatedEvent, World


@dataclass(frozen=True, eq=False)
class Story(Sequence[SimulatedEvent]):
    """One customer's life. `world` is the Stripe in which it happened: what is true there in the end, and at hand for
    going on."""

    events: tuple[SimulatedEvent, ...]
    customer: str
    world: World

    def of(self, *event_types: str) -> list[SimulatedEvent]:
        """The events of these types, in order."""
        return [event for event in self.events if event.type in event_types]

    @overload
    def __getitem__(self, place: int) -> SimulatedEvent: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[SimulatedEvent, ...]: ...

    def __getitem__(self, place: int | slice) -> SimulatedEvent | tuple[SimulatedEvent, ...]:
        return self.events[place]

    def __iter__(self) -> Iterator[SimulatedEvent]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)


def sign_up(seed: int = 0, *, start: int | None = None) -> Story:
    """A customer comes, gives a card and subscribes; the first invoice is paid in the same second."""
    return _told("signup", seed, start)


def trial(seed: int = 0, *, start: int | None = None) -> Story:
    """A customer tries for fourteen days without a card, gives one after the reminder, and stays."""
    return _told("trial", seed, start)


def upgrade(seed: int = 0, *, start: int | None = None) -> Story:
    """A subscriber takes the larger plan ten days into the month, then five seats of it, and renews."""
    return _told("upgrade", seed, start)


def dunning(seed: int = 0, *, start: int | None = None) -> Story:
    """A renewal is declined twice; the customer brings another card, and the third try succeeds."""
    return _told("dunning", seed, start)


def refund(seed: int = 0, *, start: int | None = None) -> Story:
    """A subscriber gets a part of the first payment back, then the rest."""
    return _told("refund", seed, start)


def churn(seed: int = 0, *, start: int | None = None) -> Story:
    """A subscriber leaves at the end of the month, changes their mind, leaves after all, and is deleted."""
    return _told("churn", seed, start)


def single(event_type: str, seed: int = 0, *, start: int | None = None) -> Story:
    """One event of any type that Stripe has, last, with what must have happened before it.

    Raises ValueError, with the closest names, for a type that Stripe does not have.
    """
    begin = int(time.time()) if start is None else start
    events = simulator.single(event_type, seed=seed, now=begin)
    return Story(tuple(events), events[-1].customer or "", World(seed, start=begin))


def _told(name: str, seed: int, start: int | None) -> Story:
    world = World(seed, start=int(time.time()) if start is None else start)
    events = simulator.STORIES[name](world)
    return Story(tuple(events), next(iter(world.customers)), world)
