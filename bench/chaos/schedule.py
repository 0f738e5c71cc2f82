"""What breaks, what operators do meanwhile, and when. A function of the seed, the length and what the machine can do;
nothing else."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain

#: Servers and workers, by their numbers.
APIS = 2
WORKERS = 2


class Act(StrEnum):
    """A thing that happens to a running system."""

    kill_api = "kill_api"  # SIGKILL
    kill_worker = "kill_worker"
    restart_api = "restart_api"  # SIGTERM: in order, under load
    restart_worker = "restart_worker"
    pause_worker = "pause_worker"  # SIGSTOP past its claim, then SIGCONT
    pause_api = "pause_api"
    crash_postgres = "crash_postgres"  # immediate stop and restart
    kill_postgres = "kill_postgres"  # SIGKILL of the postmaster
    restart_postgres = "restart_postgres"  # fast stop, in order, and restart
    cut = "cut"  # connections end at once
    swallow = "swallow"  # PostgreSQL hears and acts, its answers are lost, then the connection ends
    freeze = "freeze"  # nothing passes for a while, then the connection ends
    blackhole = "blackhole"  # nothing passes any more, and nobody says so
    unreachable = "unreachable"  # no connection to PostgreSQL for a while
    terminate = "terminate"  # pg_terminate_backend
    exhaust = "exhaust"  # every connection slot of PostgreSQL is taken, and operators ask for much
    lock = "lock"  # somebody in psql locks a table
    hold = "hold"  # somebody in psql holds events that wait
    log_full = "log_full"  # a process writes its log to a full disk
    disk_full = "disk_full"  # PostgreSQL's disk is full
    stripe_busy = "stripe_busy"  # its API answers 429 for a while
    stripe_fails = "stripe_fails"  # 500
    stripe_hangs = "stripe_hangs"  # nothing, until the caller gives up
    kill_stripe = "kill_stripe"  # SIGKILL of the API, which stays away for a while
    clock = "clock"  # the sender's clock jumps, so its signatures are too old or too new
    # What operators do: commands, and calls with the admin key.
    rebuild = "rebuild"  # the billing tables are made again
    cleanup = "cleanup"  # events of lives that are told to their end are removed
    replay_failed = "replay_failed"  # those that are retrying, those that are dead, or both, of one type
    replay_processed = "replay_processed"  # their handlers run once more
    retry = "retry"  # one that is dead
    backfill = "backfill"  # tables are filled from Stripe's lists
    audit = "audit"  # rows are compared with Stripe's objects, and mended


@dataclass(frozen=True, slots=True)
class Blow:
    """One act: `at` seconds into the storm, lasting `seconds`, on number `target`, with `share` of what there is.

    A command's operator is patient for `seconds`, and breaks it off then; 0: waits for its end.
    """

    at: float
    act: Act
    seconds: float
    target: int
    share: float

    def __str__(self) -> str:
        how = f"target={self.target} seconds={self.seconds:.2f} share={self.share:.2f}"
        return f"{self.at:7.2f} s  {self.act.value:<16} {how}"


# How often each act is in the deck, and how long it lasts in seconds, from and to. A length of zero is a moment.
_DECK: dict[Act, tuple[int, float, float]] = {
    Act.kill_worker: (3, 0, 0),
    Act.kill_api: (3, 0, 0),
    Act.crash_postgres: (2, 0, 0),
    Act.kill_postgres: (1, 0, 0),
    Act.swallow: (2, 0.05, 0.3),
    Act.cut: (2, 0, 0),
    Act.pause_worker: (2, 0, 0),  # as long as the fence asks for: see `_length`
    Act.terminate: (2, 0, 0),
    Act.restart_worker: (1, 0, 0),
    Act.restart_api: (1, 0, 0),
    Act.freeze: (1, 0.5, 2.0),
    Act.blackhole: (1, 0, 0),
    Act.unreachable: (1, 0.3, 1.5),
    Act.exhaust: (1, 0.5, 2.0),
    Act.lock: (1, 0.3, 2.0),
    Act.hold: (2, 0.3, 2.0),
    Act.clock: (1, 0.5, 2.0),
    Act.stripe_busy: (2, 0.5, 3.0),
    Act.stripe_fails: (1, 0.5, 3.0),
    Act.stripe_hangs: (1, 0.5, 3.0),
    Act.kill_stripe: (1, 0.5, 3.0),
    Act.log_full: (1, 3.0, 6.0),
    Act.pause_api: (1, 0.5, 2.0),
    Act.disk_full: (1, 0.8, 2.5),
    Act.restart_postgres: (1, 0, 0),
}

# What even the shortest storm has.
_FIRST = (Act.kill_worker, Act.kill_api, Act.crash_postgres, Act.swallow, Act.pause_worker, Act.stripe_busy)

_GAP_SECONDS = (0.25, 1.9)

# The same of commands, which begin beside the blows and beside one another. Starting one takes a second or so.
_COMMANDS: dict[Act, int] = {
    Act.rebuild: 2,
    Act.cleanup: 3,
    Act.replay_failed: 2,
    Act.replay_processed: 3,
    Act.retry: 2,
    Act.backfill: 2,
    Act.audit: 1,
}
_COMMAND_GAP_SECONDS = (1.0, 4.0)

# How many of the operators break off what they do, and after how many seconds.
_IMPATIENT = 0.3
_PATIENCE_SECONDS = (0.8, 5.0)


def schedule(seed: int, seconds: float, *, fence: float, disk: bool = True, operators: bool = True) -> list[Blow]:
    """The blows of a storm of `seconds`, and what `operators` do meanwhile, in order.

    `fence` is after how many seconds PostgreSQL ends a session that says nothing: a paused worker sleeps longer.
    Without `disk`, where a disk that can be filled is not to be had, those blows are left out and the others stay
    where they are; so they do without operators.
    """
    blows = _blows(seed, seconds, fence=fence)
    commands = _commands(seed, seconds) if operators else []
    kept = [blow for blow in blows if disk or blow.act is not Act.disk_full]
    return sorted([*kept, *commands], key=lambda blow: blow.at)


def _blows(seed: int, seconds: float, *, fence: float) -> list[Blow]:
    rng = random.Random(f"storm/{seed}")
    blows: list[Blow] = []
    at = rng.uniform(0.5, 1.0)
    for act in _deal(rng):
        if at >= seconds:
            break
        length = _length(act, rng, fence)
        target, share = rng.randrange(1_000), rng.choice((0.25, 0.5, 1.0))
        blows.append(Blow(round(at, 3), act, round(length, 3), target, share))
        # What lasts overlaps with what comes next: the worst moments are those with two troubles at once.
        at += rng.uniform(*_GAP_SECONDS)
    return blows


def _commands(seed: int, seconds: float) -> list[Blow]:
    rng = random.Random(f"operators/{seed}")
    commands: list[Blow] = []
    at = rng.uniform(1.0, 2.0)
    # Each once, even in a short storm.
    for act in chain(rng.sample(list(_COMMANDS), len(_COMMANDS)), _shuffled(rng, _COMMANDS)):
        if at >= seconds:
            break
        patience = rng.uniform(*_PATIENCE_SECONDS) if rng.random() < _IMPATIENT else 0.0
        commands.append(Blow(round(at, 3), act, round(patience, 3), rng.randrange(1_000), 1.0))
        at += rng.uniform(*_COMMAND_GAP_SECONDS)
    return commands


def _deal(rng: random.Random) -> Iterator[Act]:
    """Acts without end: first the six that matter most, then one of each other, then as the deck has them."""
    others = [act for act in _DECK if act not in _FIRST]
    yield from rng.sample(_FIRST, len(_FIRST))
    yield from rng.sample(others, len(others))
    yield from _shuffled(rng, {act: weight for act, (weight, _, _) in _DECK.items()})


def _shuffled(rng: random.Random, weights: Mapping[Act, int]) -> Iterator[Act]:
    """Acts without end, deck after deck, each as often in one as its weight says."""
    while True:
        deck = [act for act, weight in weights.items() for _ in range(weight)]
        rng.shuffle(deck)
        yield from deck


def _length(act: Act, rng: random.Random, fence: float) -> float:
    _, shortest, longest = _DECK[act]
    drawn = rng.uniform(shortest, longest)
    return fence * rng.uniform(1.15, 1.6) if act is Act.pause_worker else drawn
