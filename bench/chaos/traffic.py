"""What Stripe sends: whole lives of customers, in the disorder in which they arrive. A function of seed and length.

Every event is sent at least once. Some come twice at the same instant to both servers, some again seconds or minutes
later; neighbours overtake one another; two events of one object within one of Stripe's seconds come in either order,
or together. A few are *poison* to the user's handler: see `Fate`.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from kamiyo.event import Event, parse
from kamiyo.simulator import API_VERSIONS, SimulatedEvent, Truth, World, lifecycle

#: Types that a user's handler is registered for; everything else needs its billing row at most.
HANDLED = (
    *("customer.created", "customer.updated", "customer.deleted"),
    *("customer.subscription.created", "customer.subscription.updated", "customer.subscription.deleted"),
    *("invoice.paid", "invoice.payment_failed", "payment_method.attached", "payment_method.detached"),
    "charge.succeeded",
)

# The lives begin within the month after it. In the past, as Stripe's are when they arrive.
_START = 1_790_000_000

_EVENTS_OF_A_LIFE = 21.0


class Fate(StrEnum):
    """What happens to an event in the handler."""

    plain = "plain"
    flaky = "flaky"  # the first two tries raise
    later = "later"  # asks once for another try
    raises = "raises"  # every try raises: dead after five
    gives_up = "gives_up"  # Bury: dead after one
    hangs = "hangs"  # awaits for ever: the time limit ends each try
    cancels = "cancels"  # raises CancelledError, as a library's own cancelled task does
    leaves = "leaves"  # calls sys.exit
    kills = "kills"  # SIGKILL to its own process
    blocks = "blocks"  # blocks the event loop for good: the watchdog ends the process

    @property
    def is_poison(self) -> bool:
        """Whether it must end dead."""
        return self not in (Fate.plain, Fate.flaky, Fate.later)

    @property
    def tries(self) -> int:
        """How many recorded tries a poison gets."""
        return 1 if self is Fate.gives_up else 5


@dataclass(frozen=True, slots=True)
class Letter:
    """One event as it goes over the wire: its id and type, whose it is, its bytes, and its fate."""

    event_id: str
    event_type: str
    owner: str
    body: bytes
    fate: Fate

    @property
    def handled(self) -> bool:
        """Whether a user's handler runs for it."""
        return self.event_type in HANDLED


@dataclass(frozen=True, slots=True)
class Posting:
    """`letter` (its number) is posted `at` seconds into the storm to `server`, or to both at once (None)."""

    at: float
    letter: int
    server: int | None


@dataclass(frozen=True)
class Traffic:
    """Everything that is sent, and what must be true in the end."""

    letters: Sequence[Letter]
    postings: Sequence[Posting]
    worlds: Sequence[World]

    @cached_property
    def truth(self) -> Truth:
        """The four tables as Stripe has them."""
        whole: Truth = {}
        for world in self.worlds:
            for table, rows in world.truth().items():
                whole.setdefault(table, {}).update(rows)
        return whole

    @property
    def customers(self) -> int:
        """How many lives."""
        return sum(len(world.customers) for world in self.worlds)


def owner_of(event: Event) -> str:
    """Whose an event is: of one owner, events are handled one at a time."""
    return f"{event.account}/{event.customer or event.object_id or event.id}"


def traffic(seed: int, seconds: float, *, rate: float, gentle: bool = False) -> Traffic:
    """About `rate` events a second for `seconds`; if `gentle`, without poison that takes a process or long."""
    rng = random.Random(f"traffic/{seed}")
    # Two accounts, of which one is a connected account, so that the same ids could mean two things.
    worlds = [
        World(seed, start=_START, livemode=True),
        World(seed, start=_START, account="acct_chaos", livemode=True),
    ]
    lives = max(4, round(rate * seconds / _EVENTS_OF_A_LIFE))
    told: list[tuple[SimulatedEvent, str]] = []
    postings: list[Posting] = []
    for number in range(lives):
        # The older the shape, the rarer.
        version = rng.choice((*API_VERSIONS, *API_VERSIONS[2:], *API_VERSIONS[-1:] * 3))
        life = lifecycle(worlds[number % 7 == 0], rng, steps=rng.randint(3, 14))
        first = len(told)
        told += [(event, version) for event in life]
        postings += _disorder(life, first, rng, seconds)
    postings.sort(key=lambda posting: posting.at)
    due = {posting.letter: posting.at for posting in reversed(postings)}
    letters = [_letter(event, version) for event, version in told]
    fates = _fates(letters, due, rng, seconds, gentle)
    letters = [
        Letter(one.event_id, one.event_type, one.owner, one.body, fates.get(number, Fate.plain))
        for number, one in enumerate(letters)
    ]
    return Traffic(letters, postings, worlds)


def _letter(event: SimulatedEvent, version: str) -> Letter:
    body = event.body(version)
    return Letter(event.id, event.type, owner_of(parse(body, received=_START)), body, Fate.plain)


def _disorder(life: Sequence[SimulatedEvent], first: int, rng: random.Random, seconds: float) -> Iterator[Posting]:
    """When each event of one life is posted, and where."""
    start = rng.uniform(0, 0.8 * seconds)
    gap = rng.choice((0.0, 0.02, 0.1, min(0.5, seconds / 100)))
    # How far an event can be overtaken: not at all, by its neighbours, by its whole life.
    reach = rng.choice((0.0, 0.05, 1.0, 5.0))
    dues = [min(start + place * gap + rng.uniform(0, reach), 0.97 * seconds) for place in range(len(life))]
    for place in range(1, len(life)):
        one, other = life[place - 1], life[place]
        if (one.object_id, one.created) == (other.object_id, other.created):
            # A pair that shares its second, once this way, once that way, once together.
            how = rng.randrange(3)
            if how == 0:
                dues[place - 1], dues[place] = dues[place], dues[place - 1]
            elif how == 1:
                dues[place - 1] = dues[place]
    for place, due in enumerate(dues):
        letter = first + place
        yield Posting(due, letter, None if rng.random() < 0.08 else rng.randrange(2))
        if rng.random() < 0.15:
            yield Posting(due + rng.choice((0.0, rng.uniform(0, 3))), letter, rng.randrange(2))
        if rng.random() < 0.08:
            # Minutes later where there are minutes.
            yield Posting(min(due + rng.uniform(0.2, 0.6) * min(seconds, 600), seconds), letter, rng.randrange(2))


# How many events in a thousand handled ones have a fate, and how many at least and at most. What takes a process
# down takes the time of everyone, so there is little of it.
_FATES: dict[Fate, tuple[float, int, int]] = {
    Fate.flaky: (15, 2, 2_000),
    Fate.later: (10, 1, 2_000),
    Fate.raises: (4, 2, 200),
    Fate.gives_up: (2, 1, 100),
    Fate.cancels: (1, 1, 20),
    Fate.leaves: (1, 1, 20),
    Fate.hangs: (0.5, 1, 8),
    Fate.kills: (0.25, 1, 6),
    Fate.blocks: (0.1, 0, 3),
}


def _fates(
    letters: Sequence[Letter], due: dict[int, float], rng: random.Random, seconds: float, gentle: bool
) -> dict[int, Fate]:
    """The events that do not simply succeed. All come in the first half, so that five tries end in time."""
    candidates = [number for number, letter in enumerate(letters) if letter.handled and due[number] < 0.5 * seconds]
    rng.shuffle(candidates)
    handled = sum(letter.handled for letter in letters)
    fates: dict[int, Fate] = {}
    for fate, (share, least, most) in _FATES.items():
        if gentle and fate in (Fate.leaves, Fate.hangs, Fate.kills, Fate.blocks):
            continue
        for _ in range(min(max(least, int(handled * share / 1000)), most, len(candidates))):
            fates[candidates.pop()] = fate
    return fates
