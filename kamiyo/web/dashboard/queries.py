"""What the pages ask the database. Every question is bounded; the SQL is in `dashboard.sql`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from kamiyo import inbox
from kamiyo.database import Connection, load_queries
from kamiyo.event import LONGEST_NAME, Event
from kamiyo.web.dashboard import changes

_SQL = load_queries("web/dashboard/dashboard.sql")

#: Beyond this nobody counts: `10 000+`.
MOST_COUNTED = 10_000

#: Failed events that are put into groups, the newest first.
MOST_GROUPED = 20_000

#: At most this many failures are followed through a replay, so that looking each second costs little.
MOST_FOLLOWED = 20_000

#: Events on a page.
PAGE = 50

Position = tuple[datetime, int]


async def limit(db: Connection, seconds: int) -> None:
    """Bound what this transaction may ask: so many seconds for each question."""
    await db.execute(_SQL["limits"], f"{seconds}s")


async def dead(db: Connection) -> int:
    """How many events are dead, up to MOST_COUNTED."""
    return int(await db.fetchval(_SQL["dead"], MOST_COUNTED))


# ── Overview ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Range:
    """A range of time, cut into steps."""

    name: str
    length: timedelta
    step: timedelta
    words: str
    #: How often the page is asked for again, in seconds.
    every: int

    @property
    def steps(self) -> int:
        """How many steps the range has; the last one is still going on."""
        return self.length // self.step

    def starts(self, now: datetime) -> list[datetime]:
        """Where each step begins, in UTC."""
        last = datetime.fromtimestamp(now.timestamp() // self.step.total_seconds() * self.step.total_seconds(), UTC)
        return [last - self.step * back for back in range(self.steps - 1, -1, -1)]


#: The ranges a person can choose, by name.
RANGES = {
    "1h": Range("1h", timedelta(hours=1), timedelta(minutes=1), "last hour", 5),
    "24h": Range("24h", timedelta(hours=24), timedelta(minutes=15), "last 24 hours", 15),
    "7d": Range("7d", timedelta(days=7), timedelta(hours=2), "last 7 days", 60),
}


@dataclass(frozen=True, slots=True)
class Step:
    """What came in within one step, and how the queue stood; None where nobody looked."""

    at: datetime
    received: int = 0
    processed: int = 0
    failed: int = 0
    processing_us: int = 0
    waiting: int | None = None
    retrying: int | None = None
    oldest_due_seconds: float | None = None

    @property
    def unfinished(self) -> int:
        """Received in this step, and neither processed nor failed yet."""
        return max(self.received - self.processed - self.failed, 0)

    @property
    def failure_rate(self) -> float | None:
        """The share of the finished ones that are failed; None when nothing is finished."""
        finished = self.processed + self.failed
        return self.failed / finished if finished > 0 else None

    @property
    def mean_seconds(self) -> float | None:
        """Mean time spent on an event that is processed; None when none is."""
        return self.processing_us / self.processed / 1e6 if self.processed > 0 else None


async def standing(db: Connection) -> asyncpg.Record:
    """How things stand now: see the query."""
    row = await db.fetchrow(_SQL["standing"], MOST_COUNTED)
    assert row is not None  # noqa: S101 - an aggregate without GROUP BY has exactly one row
    return row


async def steps(db: Connection, chosen: Range, now: datetime) -> list[Step]:
    """The range's steps up to `now`, oldest first, none missing."""
    starts = chosen.starts(now)
    seconds = int(chosen.step.total_seconds())
    counts = _SQL["traffic_by_minute"] if chosen.step < timedelta(hours=1) else _SQL["traffic_by_hour"]
    traffic = {row["at"]: row for row in await db.fetch(counts, starts[0], seconds)}
    backlog = {row["at"]: row for row in await db.fetch(_SQL["backlog"], starts[0], seconds)}
    return [Step(**{"at": at, **_fields(traffic.get(at)), **_fields(backlog.get(at))}) for at in starts]


def _fields(row: asyncpg.Record | None) -> dict[str, Any]:
    return dict(row) if row is not None else {}


async def types(db: Connection, since: datetime, most: int) -> list[asyncpg.Record]:
    """The most frequent types received since then."""
    return await db.fetch(_SQL["types"], since, most)


async def day(db: Connection) -> asyncpg.Record:
    """received and failed in the last 24 hours."""
    row = await db.fetchrow(_SQL["day"])
    assert row is not None  # noqa: S101 - an aggregate without GROUP BY has exactly one row
    return row


async def undecided(db: Connection, most: int) -> list[asyncpg.Record]:
    """Billing rows whose order nothing decides."""
    return await db.fetch(_SQL["undecided"], most)


async def sample_backlog(db: Connection) -> None:
    """Write down how the queue stands, once a minute however often it is asked for."""
    await db.execute(_SQL["sample_backlog"])


# ── Events ──────────────────────────────────────────────────────────────────────────────────────────────────

#: What the list of events can be narrowed to: the four statuses, the two kinds of failed, and what is unread.
STATES = tuple(inbox.State)


@dataclass(frozen=True, slots=True)
class Search:
    """Which events: each field is None (any) or a value. `since` is inclusive, `until` exclusive. `account` '' is one's
    own."""

    status: str | None = None
    type: str | None = None
    customer: str | None = None
    object: str | None = None
    account: str | None = None
    context: str | None = None
    livemode: bool | None = None
    since: datetime | None = None
    until: datetime | None = None

    def values(self) -> tuple[Any, ...]:
        """In the order of the queries' parameters."""
        named = (self.status, self.type, self.customer, self.object, self.account, self.context)
        return *named, self.livemode, self.since, self.until


@dataclass(frozen=True, slots=True)
class Page:
    """Events, newest first, and the positions to go on from; None where there is nothing further."""

    events: Sequence[asyncpg.Record]
    newer: Position | None
    older: Position | None


async def events(
    db: Connection, search: Search, *, before: Position | None = None, after: Position | None = None, size: int = PAGE
) -> Page:
    """A page of events: the newest, or those below `before`, or those right above `after`."""
    if after is not None:
        newer = inbox.of_unfinished(_SQL["newer_events"], search.status)
        rows = await db.fetch(newer, *search.values(), *after, size + 1)
        more, rows = len(rows) > size, rows[:size][::-1]
        return Page(rows, _position(rows[0]) if rows and more else None, _position(rows[-1]) if rows else None)
    rows = await inbox.listed(db, inbox.Filters(*search.values()), before=before, limit=size + 1)
    more, rows = len(rows) > size, rows[:size]
    return Page(
        rows, _position(rows[0]) if rows and before is not None else None, _position(rows[-1]) if more else None
    )


def _position(row: asyncpg.Record) -> Position:
    return row["created_at"], row["seq"]


async def known_types(db: Connection) -> list[str]:
    """Types received in the last week."""
    return [name for (name,) in await db.fetch(_SQL["known_types"])]


@dataclass(frozen=True, slots=True)
class Found:
    """Something with an id: an `event`, a `customer`, an `object` or an `account`."""

    kind: str
    id: str
    detail: str


# Beginnings shorter than this are on too many ids to mean one.
_SHORTEST_BEGINNING = 6


async def found(db: Connection, text: str, most: int = 10) -> list[Found]:
    """What has this id, whole if there is such a thing, otherwise beginning with it."""
    wanted = asked_for(text)
    if wanted is None:
        return []
    # No id goes on with the last code point there is, and none with the first.
    end = wanted + ("\U0010ffff" if len(wanted) >= _SHORTEST_BEGINNING else "\x01")
    rows = [Found(*row) for row in await db.fetch(_SQL["found"], wanted, end, most)]
    return [one for one in rows if one.id == wanted] or rows


def asked_for(text: str) -> str | None:
    """The id in what a person typed or pasted: spaces and quotes off, the last part of an address."""
    text = text.strip().strip("\"'`,;<>()[]").split("?", 1)[0].split("#", 1)[0].rstrip("/")
    wanted = re.split(r"[/\s]", text)[-1]
    return wanted if 0 < len(wanted) <= LONGEST_NAME and "\0" not in wanted else None


# ── Event ───────────────────────────────────────────────────────────────────────────────────────────────────


async def around(db: Connection, event: asyncpg.Record, each_side: int = 5) -> list[asyncpg.Record]:
    """The events of the same customer around this one, newest first; of the same object where nobody's."""
    position = (event["seq"], each_side, event["account"], event["livemode"])
    if event["customer"] is not None:
        return await db.fetch(_SQL["around_customer"], event["customer"], event["created_at"], *position)
    if event["object_id"] is None:
        return []
    return await db.fetch(_SQL["around_object"], event["object_id"], event["stripe_created"], *position)


async def effect(db: Connection, event: Event, received: datetime) -> changes.Effect | None:
    """What the event says of its billing row, before, after and now; None where there is none."""
    row = changes.row_of(event, received)
    if row is None:
        return None
    created = datetime.fromtimestamp(event.created, UTC)
    earlier = await db.fetch(_SQL["earlier_of_object"], *row.key, created, event.id)
    events = [changes.event_of(one["body"], one["created_at"], row.account, row.livemode) for one in earlier]
    now = await db.fetchrow(_SQL[f"now_{row.table}"], *row.key)
    return changes.effect_of(event, received, [one for one in events if one is not None], now)


async def mirrored(db: Connection, event: asyncpg.Record) -> asyncpg.Record | None:
    """The row of `stripe_objects` about the event's object; None where there is none."""
    key = event["object_id"] or event["customer"] or ""
    return await db.fetchrow(_SQL["mirrored"], key, event["object_type"], event["account"], event["livemode"])


# ── Failures ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Group:
    """Failures with one cause: the same type of error, raised at the same place."""

    fingerprint: str
    error_type: str
    message: str
    traceback: str
    event_id: str
    first_seen: datetime
    last_seen: datetime
    events: int = 0
    dead: int = 0
    next_try_at: datetime | None = None
    types: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The error's own name, without its module."""
        return self.error_type.rpartition(".")[2]

    @property
    def module(self) -> str:
        """The error's module, with the dot that ends it; empty for Python's own errors."""
        module, dot, _ = self.error_type.rpartition(".")
        return module + dot

    @property
    def where(self) -> str | None:
        """The place in the code: `billing.py:41 in grant_credits`."""
        return place_of(self.traceback)


_FRAME = re.compile(r'^  File "([^"\n]+)", line (\d+), in (.+)$', re.MULTILINE)


def place_of(traceback: str) -> str | None:
    """Where the error was raised, from its traceback; None where that does not say."""
    frames = _FRAME.findall(traceback)
    if not frames:
        return None
    path, number, function = frames[-1]
    return f"{path.replace(chr(92), '/').rpartition('/')[2]}:{number} in {function}"


async def groups(db: Connection, *, dead_only: bool = False, of: int = MOST_GROUPED) -> list[Group]:
    """What is failed now, by cause: of the newest `of` events."""
    return [
        Group(**{name: value for name, value in row.items() if name != "error_message"}, message=row["error_message"])
        for row in await db.fetch(_SQL["groups"], of, dead_only)
    ]


async def group(db: Connection, fingerprint: str) -> Group | None:
    """The latest failure with this fingerprint, without counts; None when there never was one."""
    row = await db.fetchrow(_SQL["group_example"], fingerprint)
    if row is None:
        return None
    told = {name: value for name, value in row.items() if name != "error_message"}
    return Group(fingerprint=fingerprint, message=row["error_message"], **told)


async def group_events(db: Connection, fingerprint: str, most: int = PAGE) -> list[asyncpg.Record]:
    """The events that are failed now with this fingerprint, the latest failure first."""
    return await db.fetch(_SQL["group_events"], fingerprint, most)


async def failed_counts(db: Connection) -> asyncpg.Record:
    """failed, dead and oldest of the newest MOST_GROUPED failed events."""
    row = await db.fetchrow(_SQL["failed_counts"], MOST_GROUPED)
    assert row is not None  # noqa: S101 - an aggregate without GROUP BY has exactly one row
    return row


async def by_hand(db: Connection, most: int) -> list[asyncpg.Record]:
    """What people did lately: at, action, filters (JSON text), count."""
    return await db.fetch(_SQL["by_hand"], most)


async def begin_replay(db: Connection, fingerprint: str, total: int) -> int:
    """Write down that a replay begins; return its number."""
    return int(await db.fetchval(_SQL["begin_replay"], fingerprint, total))


async def tell_replay(db: Connection, number: int, done: int) -> None:
    """Say how far it is."""
    await db.execute(_SQL["tell_replay"], number, done)


async def end_replay(db: Connection, number: int, done: int, stopped_by: str | None) -> None:
    """Say that it is over: at its end, or stopped by an error of this type."""
    await db.execute(_SQL["end_replay"], number, done, stopped_by)


async def replay(db: Connection, number: int) -> asyncpg.Record | None:
    """A replay as it stands; None when there is none of this number."""
    return await db.fetchrow(_SQL["replay"], number)


async def replay_outcome(db: Connection, fingerprint: str, since: datetime) -> asyncpg.Record:
    """processed, waiting and failed: where the events stand that a replay put back in line.

    `followed` of them were looked at, and `all_followed` says whether that is all.
    """
    row = await db.fetchrow(_SQL["replay_outcome"], fingerprint, since, MOST_FOLLOWED)
    assert row is not None  # noqa: S101 - an aggregate without GROUP BY has exactly one row
    return row


# ── Customer ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Customer:
    """What is known of one customer of one account in one mode. `row` is None where only events name them.

    `elsewhere` are the other accounts and modes that know a customer of this id: other customers.
    """

    id: str
    account: str
    livemode: bool
    elsewhere: Sequence[tuple[str, bool]]
    row: asyncpg.Record | None
    subscriptions: Sequence[asyncpg.Record]
    invoices: Sequence[asyncpg.Record]
    payment_methods: Sequence[asyncpg.Record]


async def customer(
    db: Connection, customer_id: str, account: str | None = None, livemode: bool | None = None, most: int = 25
) -> Customer | None:
    """Everything the billing tables say of a customer; None when no row and no event names them.

    Where an id is known in several accounts or modes, the one asked for, or the first.
    """
    known = [(row["account"], row["livemode"]) for row in await db.fetch(_SQL["whose_customer"], customer_id)]
    fitting = [one for one in known if account in (None, one[0]) and livemode in (None, one[1])]
    if not fitting:
        return None
    key = (customer_id, *fitting[0])
    return Customer(
        *key,
        [one for one in known if one != fitting[0]],
        await db.fetchrow(_SQL["customer"], *key),
        await db.fetch(_SQL["subscriptions"], *key, most),
        await db.fetch(_SQL["invoices"], *key, most),
        await db.fetch(_SQL["payment_methods"], *key, most),
    )


async def timeline(
    db: Connection, whose: Customer, *, before: Position | None = None, size: int = 30
) -> tuple[list[asyncpg.Record], Position | None]:
    """A customer's events with their bodies, newest first, and the position of the page below."""
    key = (whose.id, whose.account, whose.livemode)
    rows = await db.fetch(_SQL["timeline"], *key, *(before or (None, None)), size + 1)
    return rows[:size], _position(rows[size - 1]) if len(rows) > size else None
