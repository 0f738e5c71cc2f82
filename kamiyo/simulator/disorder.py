"""How events really arrive: late, twice, and in another order."""

import random
from collections.abc import Sequence
from typing import TypeVar

_Event = TypeVar("_Event")


def deliveries(
    events: Sequence[_Event],
    rng: random.Random,
    *,
    duplicates: float = 0.3,
    shuffle: bool | int = True,
) -> list[_Event]:
    """Every event at least once, in the order in which a receiver might see them.

    `duplicates` is the share of events that come again (some of them more than once), at any time. `shuffle`
    is True for any order at all, False for the order given, or a number: how many places an event can be
    overtaken by.
    """
    sent = [(float(place), event) for place, event in enumerate(events)]
    for event in events:
        while rng.random() < duplicates:
            sent.append((rng.uniform(0, len(events)), event))
    if shuffle is True:
        rng.shuffle(sent)
    else:
        sent = [(place + rng.uniform(0, shuffle), event) for place, event in sent]
        sent.sort(key=lambda delivery: delivery[0])
    return [event for _, event in sent]
