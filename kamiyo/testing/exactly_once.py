"""Exactly once, put to the test: whatever the deliveries are like, the effects are those of a perfect day.

The perfect day comes first: each event once, in order, nothing fails. What it changes is what is right. Then the
database is brought back to where it was, and the same events come backwards; in disorder, several times, late; and with
a worker that dies after the handlers of an event have run and before their effects are committed. Each time the effects
must be the same.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from fastapi import FastAPI

from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Handler, Registry
from kamiyo.simulator import CURRENT_API_VERSION
from kamiyo.testing.database import Database, current
from kamiyo.testing.deliveries import PATH, AnyEvent, Order, bodies_of, order_of, run
from kamiyo.web.system import System

#: A query, or a callable for what is kept elsewhere: one row, or one thing, for each effect.
Effects: TypeAlias = str | Callable[[], Iterable[object]]

# Each death costs a worker's turn, up to half a second.
_MOST_DEATHS = 10


def assert_exactly_once(
    app: FastAPI,
    events: Iterable[AnyEvent],
    effects: Effects,
    *,
    shuffles: int = 3,
    seed: int = 0,
    crash: bool = True,
    reset: Callable[[], object] = lambda: None,
    api_version: str = CURRENT_API_VERSION,
    path: str = PATH,
    within: float = 30.0,
) -> None:
    """Assert that `events` have the same effects on a bad day as on a perfect one: each of them exactly once.

    `effects` is a query whose rows show them (leave out what may differ, such as a time), or a callable that returns
    them, for what is not in the database. What the tables hold when this is called is what every delivery begins with;
    `reset` does the same for what is outside. Bad days are: everything backwards, one by one; `shuffles` disorders with
    copies, their seeds from `seed` on; and, with `crash`, a worker that dies between effect and commit, once for each
    of the first ten events that are handled.

    Needs the fixture `kamiyo_database`. The database is left as the last of these days left it. Raises AssertionError
    with what was missing or too many, and how to see it again; also when the perfect day has no effects at all.
    """
    __tracebackhide__ = True  # pytest: the failure is the caller's
    database = current()
    bodies = bodies_of(events, api_version)
    database.keep("arranged")

    def changes(day: _Day) -> _Change:
        database.bring_back("arranged")
        reset()
        before = _seen(database, effects)
        run(app, day.order, path=path, allow_dead=False, within=within, meddle=day.meddle)
        after = _seen(database, effects)
        return _Change(came=after - before, went=before - after)

    perfect = changes(_Day("of a perfect delivery", order_of(bodies, None)))
    if not perfect.came and not perfect.went:
        raise AssertionError(
            "these events have no effect that can be seen: the effects were the same before and after a perfect "
            "delivery. Is the handler registered (imported, or in KAMIYO_HANDLERS) for one of their types, and does "
            "the query look at what it writes?"
        )
    for day in _bad_days(bodies, range(seed, seed + shuffles), crash=crash):
        try:
            found = changes(day)
        except AssertionError as error:
            raise AssertionError(f"on the day {day.which}, though a perfect delivery went well: {error}") from None
        _compare(perfect, found, day)


def _no_meddling(system: System) -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Day:
    """How events come on a day, what is done to the application meanwhile, and what to say if that goes wrong."""

    which: str
    order: Order
    advice: str = ""
    meddle: Callable[[System], None] = _no_meddling


def _bad_days(bodies: Sequence[bytes], seeds: Iterable[int], *, crash: bool) -> Iterator[_Day]:
    again = "See it again: deliver(app, {}). " + (
        "Stripe delivers in any order and more than once: let the handler make its effect from the billing row, or "
        "look at event.superseded first."
    )
    yield _Day("on which all came backwards", order_of(bodies[::-1], None), again.format("[*events][::-1]"))
    for seed in seeds:
        yield _Day(f"of shuffle={seed}", order_of(bodies, seed), again.format(f"events, shuffle={seed}"))
    if crash:
        yield _Day(
            "with a crash between effect and commit",
            [bodies],
            "What was written with the handler's own `db` was undone by the crash and written again. An effect that is "
            "there twice was made with another connection, or outside the database: write it down with `db` and send "
            "it later, or give it an idempotency key.",
            _Deaths().meddle,
        )


@dataclass(frozen=True, slots=True)
class _Change:
    came: Counter[object]
    went: Counter[object]


def _compare(perfect: _Change, found: _Change, day: _Day) -> None:
    __tracebackhide__ = True
    lines = [
        f"    {word} {count} × {effect!r}"
        for word, more, less in (
            ("missing", perfect.came, found.came),
            ("too many", found.came, perfect.came),
            ("not changed", perfect.went, found.went),
            ("changed", found.went, perfect.went),
        )
        for effect, count in (more - less).items()
    ]
    if lines:
        told = "\n".join(lines)
        raise AssertionError(
            f"the effects on the day {day.which} are not those of a perfect delivery:\n{told}\n{day.advice}"
        )


def _seen(database: Database, effects: Effects) -> Counter[object]:
    found = database.fetch(effects) if isinstance(effects, str) else effects()
    return Counter(map(_countable, found))


def _countable(value: object) -> object:
    if isinstance(value, list | tuple):
        return tuple(map(_countable, value))
    if isinstance(value, dict):
        return tuple((name, _countable(inner)) for name, inner in sorted(value.items()))
    return value


@dataclass
class _Deaths:
    """A worker's death after the handlers of an event, once for each event: PostgreSQL ends the session, as it does
    when the process is killed, and everything of its transaction is undone."""

    _died: set[str] = field(default_factory=set)

    def meddle(self, system: System) -> None:
        """Let this system's worker die like this."""
        system.worker.turns.registry = _Mortal(system.worker.turns.registry, self._die)

    async def _die(self, event: Event, db: Connection) -> None:
        if event.id not in self._died and len(self._died) < _MOST_DEATHS:
            self._died.add(event.id)
            await db.execute("SELECT pg_terminate_backend(pg_backend_pid())")


class _Mortal(Registry):
    """The same handlers, and death as the last of them."""

    def __init__(self, inner: Registry, death: Handler) -> None:
        super().__init__()
        self._inner, self._death = inner, death

    def of(self, event_type: str) -> tuple[Handler, ...]:
        handlers = self._inner.of(event_type)
        return (*handlers, self._death) if handlers else ()
