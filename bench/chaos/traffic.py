"""What Stripe sends: whole lives of customers, in the disorder in which they arrive. A function of seed and length.

Every event is sent at least once. Some come twice at the same instant to both servers, some again seconds or minutes
later; neighbours overtake one another; two events of one object within one of Stripe's seconds come in either order,
or together. A few are *poison* to the user's handler: see `Fate`.

Most lives are told by snapshots, some by both kinds of events, and some by thin ones alone: see `Told`. In some, one
second can hold a change and its undoing, and only Stripe can say which came last. Some are ahead of their time, so that
for Kamiyo they are recent, and a cleanup may take them.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

from kamiyo.event import Event, parse, snapshot_type
from kamiyo.simulator import API_VERSIONS, SimulatedEvent, Truth, World, encode, lifecycle, thin
from kamiyo.simulator.facts import ENDED

#: Types that a user's handler is registered for; everything else needs its billing row at most.
HANDLED = (
    *("customer.created", "customer.updated", "customer.deleted"),
    *("customer.subscription.created", "customer.subscription.updated", "customer.subscription.deleted"),
    *("invoice.paid", "invoice.payment_failed", "payment_method.attached", "payment_method.detached"),
    "charge.succeeded",
)

# The lives begin within the month after it, and the longest takes years. All in the past, as Stripe's are when they
# arrive: an event from the future is one that Stripe cannot be asked about yet.
_START = 1_200_000_000

#: The account whose clock is ahead, as a test clock's is. Of an event that Stripe may still send again a cleanup leaves
#: the id behind, and of those that are years old it does not: those are never cleaned up here.
AHEAD = "acct_ahead"
_AHEAD = 2_100_000_000

# Copies left out, twins counted.
_EVENTS_OF_A_LIFE = 26.0

# Of how many of the lives one second can hold a change and its undoing, and of how many the last one does.
_FLIPS, _TIES = 0.3, 0.06


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


class Told(StrEnum):
    """How a life is told."""

    snapshots = "snapshots"  # by events that show the object
    twins = "twins"  # and each of them has a thin twin, which names it
    thin = "thin"  # by thin events alone: what they are about has to be read from Stripe


_TOLD = (Told.snapshots,) * 6 + (Told.twins,) * 3 + (Told.thin,) * 2


@dataclass(frozen=True, slots=True)
class Letter:
    """One event as it goes over the wire: its id and type, whose it is, its bytes, and its fate.

    `occurrence` is what it has in common with its twin of the other kind, where it has one.
    """

    event_id: str
    event_type: str
    owner: str
    body: bytes
    occurrence: str
    twin: bool
    fate: Fate = Fate.plain

    @property
    def thin(self) -> bool:
        """Whether it only names its object."""
        return self.event_id != self.occurrence

    @property
    def handled(self) -> bool:
        """Whether a user's handler runs for it."""
        return snapshot_type(self.event_type) in HANDLED


@dataclass(frozen=True, slots=True)
class Posting:
    """`letter` (its number) is posted `at` seconds into the storm to `server`, or to both at once (None)."""

    at: float
    letter: int
    server: int | None


@dataclass(frozen=True)
class Life:
    """One customer's life: its events in the order in which they happened, and the letters that tell it.

    `sent` are the letters, by their numbers from `first` on: the event that each tells, and whether it is thin.
    """

    events: Sequence[SimulatedEvent]
    version: str
    told: Told
    first: int
    sent: Sequence[tuple[SimulatedEvent, bool]]
    postings: Sequence[Posting]

    @property
    def is_ahead(self) -> bool:
        """Whether it is of the account whose clock is ahead."""
        return self.events[0].account == AHEAD

    @cached_property
    def seconds(self) -> Sequence[tuple[float, int]]:
        """When each of Stripe's seconds of this life has happened, in seconds into the storm: before the first letter
        of it, or of a later one, is posted. What happened in one second has happened at once."""
        due: dict[int, float] = {}
        for posting in self.postings:
            event, _ = self.sent[posting.letter - self.first]
            due[event.created] = min(posting.at, due.get(event.created, posting.at))
        happened, soonest = [], float("inf")
        for second in sorted(due, reverse=True):
            soonest = min(soonest, due[second])
            happened.append((soonest, second))
        return happened[::-1]


@dataclass(frozen=True)
class Traffic:
    """Everything that is sent, and what must be true in the end."""

    letters: Sequence[Letter]
    postings: Sequence[Posting]
    worlds: Sequence[World]
    lives: Sequence[Life]

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

    def told_to_the_end(self, answered: Mapping[int, int]) -> list[str]:
        """The events of the lives that are ahead and have nothing to tell any more, if `answered` were these letters.

        Copies of them may still come.
        """
        return [
            self.letters[number].event_id
            for life in self.lives
            if life.is_ahead
            for numbers in (range(life.first, life.first + len(life.sent)),)
            if all(answered.get(number) for number in numbers)
            for number in numbers
        ]

    @property
    def unseen(self) -> set[tuple[str, str]]:
        """Objects (account, id) that are gone, and of which only thin events told: what they were nobody could see."""
        return {
            (event.account, event.object_id or "")
            for life in self.lives
            if life.told is Told.thin
            for event in life.events
            if event.type in ("customer.deleted", "invoice.deleted")
        }


def owner_of(event: Event) -> str:
    """Whose an event is: of one owner, events are handled one at a time."""
    return f"{event.account}/{event.customer or event.object_id or event.id}"


def live(seed: int, seconds: float, *, rate: float, gentle: bool = False) -> tuple[Sequence[World], Sequence[Life]]:
    """The lives of a storm of `seconds`, told by about `rate` events a second, and the worlds that they are in."""
    rng = random.Random(f"traffic/{seed}")
    # One's own account, a connected one, so that the same ids could mean two things, and one that is ahead.
    worlds = [
        World(seed, start=_START, livemode=True),
        World(seed, start=_START, account="acct_chaos", livemode=True),
        World(seed, start=_AHEAD, account=AHEAD, livemode=True),
    ]
    lives: list[Life] = []
    first = 0
    for number in range(max(4, round(rate * seconds / _EVENTS_OF_A_LIFE))):
        # The older the shape, the rarer.
        version = rng.choice((*API_VERSIONS, *API_VERSIONS[2:], *API_VERSIONS[-1:] * 3))
        # Each kind early, so that the shortest storm has them all.
        told = _TOLD[-1 - 3 * number] if number < 3 else rng.choice(_TOLD)
        # What is ahead cannot be read in time, so nothing of it may need to be.
        ahead = number % 3 == 1 and told is Told.snapshots
        world = worlds[2 if ahead else number % 7 == 0]
        events = lifecycle(world, rng, steps=rng.randint(3, 14), flips=rng.random() < _FLIPS and not ahead)
        if not gentle and (number == 2 or rng.random() < _TIES) and not ahead:
            events += _undone(world, events)
        kinds = {Told.snapshots: (False,), Told.twins: (False, True), Told.thin: (True,)}[told]
        sent = [(event, is_thin) for event in events for is_thin in kinds]
        postings = list(_disorder(events, sent, first, rng, seconds))
        lives.append(Life(events, version, told, first, sent, postings))
        first += len(sent)
    return worlds, lives


def _undone(world: World, life: Sequence[SimulatedEvent]) -> Sequence[SimulatedEvent]:
    """A change and its undoing in one second, the last of this life: which of them came last, no event tells."""
    customer = life[0].customer or ""
    if world.customers[customer].deleted_at is not None:
        return ()
    mark, clock = len(world.events), world.now
    world.now = life[-1].created + 60
    for word in ("1", None):
        world.update_customer(customer, metadata={"tie": word})
    for subscription in world.subscriptions_of(customer):
        if subscription.status not in ENDED:
            for word in ("1", None):
                world.update_subscription(subscription.id, tie=word)
    world.now = max(clock, world.now)
    return world.events[mark:]


def traffic(seed: int, seconds: float, *, rate: float, gentle: bool = False) -> Traffic:
    """About `rate` events a second for `seconds`; if `gentle`, without what takes a process, or long to rest."""
    worlds, lives = live(seed, seconds, rate=rate, gentle=gentle)
    postings = sorted((posting for life in lives for posting in life.postings), key=lambda posting: posting.at)
    due = {posting.letter: posting.at for posting in reversed(postings)}
    letters = [letter for life in lives for letter in _letters(life)]
    fates = _fates(letters, due, random.Random(f"fates/{seed}"), seconds, gentle)
    letters = [replace(one, fate=fates.get(number, Fate.plain)) for number, one in enumerate(letters)]
    return Traffic(letters, postings, worlds, lives)


def _letters(life: Life) -> Iterator[Letter]:
    for event, is_thin in life.sent:
        snapshot = event.body(life.version)
        owner = owner_of(parse(snapshot, received=_START))
        paired = life.told is Told.twins
        if is_thin:
            told = thin(event)
            yield Letter(told["id"], told["type"], owner, encode(told), event.id, paired)
        else:
            yield Letter(event.id, event.type, owner, snapshot, event.id, paired)


def _disorder(
    life: Sequence[SimulatedEvent],
    sent: Sequence[tuple[SimulatedEvent, bool]],
    first: int,
    rng: random.Random,
    seconds: float,
) -> Iterator[Posting]:
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
    places = {event.id: place for place, event in enumerate(life)}
    for letter, (event, is_thin) in enumerate(sent, first):
        due = dues[places[event.id]]
        if is_thin:
            # Of twins either comes first, or both at once.
            apart = rng.choice((0.0, rng.uniform(-0.2, 0.2), rng.uniform(-3, 3)))
            due = min(max(due + apart, 0.0), 0.97 * seconds)
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
        # Of twins, one that fails leaves its work to the other: only what has no twin must end as its fate says.
        fit = [number for number in candidates if not (fate.is_poison and letters[number].twin)]
        if gentle and fate in (Fate.leaves, Fate.hangs, Fate.kills, Fate.blocks):
            continue
        chosen = fit[: min(max(least, int(handled * share / 1000)), most)]
        fates |= dict.fromkeys(chosen, fate)
        candidates = [number for number in candidates if number not in fates]
    return fates
