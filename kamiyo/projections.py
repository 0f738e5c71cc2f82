"""From Stripe's objects to rows of `billing.*`, never back in time.

**Which events.** Every snapshot that carries one of the four objects, not only the ten types of the guide:
`invoice.voided` says what became of an invoice as surely as `invoice.payment_succeeded`. `invoice.upcoming` is a
preview of an invoice that does not exist yet, and is left out.

**Order.** Stripe does not deliver in order, and `created` has whole seconds. Each event gets a *rank*, an integer
whose bits say, from the most telling down:

    terminal   the object's life is over: customer or draft invoice deleted, subscription canceled, invoice paid or
               void, payment method detached. A final state is never left, whatever a clock says.
    created    Stripe's second
    step       how far along, within one second, in states that only go forward: an invoice is draft, then open,
               then uncollectible; a subscription is incomplete only at first
    stage      `*.created` (and `payment_method.attached`) comes before everything else of its second
    attempts   an invoice's attempt_count only grows
    whole      a deletion that carries the full object outranks the stub that only says it is gone

**Reads.** An object as Stripe's API gave it takes its place among the events. A request that began in Stripe's second
`s` shows what became of every event before `s`, and perhaps some of `s`. So a read ranks as second `s - 1`, with a
stage above every event's: above all events of that second, below any later one.

The row keeps the rank of the event that made it, and only a higher one overwrites it: so the end is the same in any
order, any number of times, in any batches. Equal ranks with different content are a *tie*; `kamiyo/ties.py` weighs
the evidence of all events of that second together, which is again the same in any order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, cast

import asyncpg
import msgspec

from kamiyo.database import Connection, load_queries
from kamiyo.errors import KamiyoError, PayloadError
from kamiyo.event import Event, decode
from kamiyo.shapes import KINDS, TABLES, Kind, overlaid, without_nul

_SQL = load_queries("projections.sql")

_Key = tuple[str, str, bool]

#: Which row of which table: (table, (id, account, livemode)).
Place = tuple[str, _Key]


class ProjectionError(KamiyoError):
    """The object does not have the shape Stripe documents; the message says which field, never its value."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a billing table as one event tells it.

    `values` are the columns of `COLUMNS[table]` in that order: times as unix seconds, money in the currency's smallest
    unit, `metadata` and `items` as JSON text. `received` is when the event was committed here.
    """

    table: str
    id: str
    account: str
    livemode: bool
    values: tuple[Any, ...]
    event_id: str
    received: datetime
    rank: int
    evidence: str = "decided"

    @property
    def key(self) -> _Key:
        """What identifies the object: id, account, livemode."""
        return self.id, self.account, self.livemode

    @property
    def place(self) -> Place:
        """Which row of which table this is."""
        return self.table, self.key

    @property
    def is_stub(self) -> bool:
        """Whether it only says that the object is gone, without the object."""
        return _is_stub(self.rank)

    @property
    def is_read(self) -> bool:
        """Whether it comes from Stripe's API, not from an event."""
        return _is_read(self.rank)


@dataclass(frozen=True, slots=True)
class Standing:
    """How a row stood before a batch was projected: its rank, and the event that had made it so.

    `contested`: the events that were weighed, where they do not tell what was last.
    """

    table: str
    rank: int
    event_id: str
    contested: frozenset[str]

    @property
    def is_stub(self) -> bool:
        """Whether the row was made by a deletion that did not carry the object."""
        return _is_stub(self.rank)

    @property
    def is_read(self) -> bool:
        """Whether the row was made by a read from Stripe's API."""
        return _is_read(self.rank)


@dataclass(frozen=True, slots=True)
class Read:
    """One object as `GET /v1/…` gave it.

    `body` is its JSON; empty where Stripe has no such object (404). The request began in `second` (unix, by Stripe's
    clock) or later, so everything that happened before that second is in it. `source` is the event that led to it,
    or the word for what did (`backfill`, `audit`). `ended` is the second in which the object's life ended, where an
    event has told that: a customer's or an invoice's deletion, a payment method's detachment. `received` is when it
    was stored here.
    """

    object_type: str
    object_id: str
    account: str
    livemode: bool
    body: bytes
    second: int
    source: str
    ended: int | None = None
    received: datetime = datetime(2000, 1, 1, tzinfo=UTC)

    @property
    def key(self) -> _Key:
        """What identifies the object: id, account, livemode."""
        return self.object_id, self.account, self.livemode

    @property
    def gone(self) -> bool:
        """Whether Stripe does not have the object any more. Raises PayloadError where the body is no JSON object."""
        return not self.body or decode(self.body).get("deleted") is True


_CUSTOMER_TYPES = ("customer.created", "customer.updated", "customer.deleted")


def _kind_of(event: Event) -> Kind | None:
    object_type = _object_type(event.type)
    # A type that speaks of one thing and carries another is not ours to interpret.
    if object_type is None or event.thin or event.object_id is None or event.object_type not in (None, object_type):
        return None
    return KINDS[object_type]


def _object_type(event_type: str) -> str | None:
    if event_type.startswith("customer.subscription."):
        return "subscription"
    if event_type in _CUSTOMER_TYPES:
        return "customer"
    if event_type.startswith("invoice.") and event_type != "invoice.upcoming":
        return "invoice"
    return "payment_method" if event_type.startswith("payment_method.") else None


def table_of(event: Event) -> str | None:
    """The billing table this event changes, or None where there is none."""
    kind = _kind_of(event)
    return kind.table if kind else None


def row_of(event: Event, received: datetime) -> Row | None:
    """The row as `event` tells it, or None where the event has none to tell.

    Raises ProjectionError when the object cannot be read, or has a field of a type Stripe does not document.
    """
    kind = _kind_of(event)
    if kind is None:
        return None
    shaped = _shaped(kind, event)
    if getattr(shaped, "deleted", False) and event.type != "customer.deleted":
        return None  # a stub of something long gone, carried by an event about something else
    return _row(kind, event, shaped, received)


def row_before(event: Event, received: datetime) -> Row | None:
    """The row as it was before `event`, from its `previous_attributes`; None where Stripe gives none.

    Raises ProjectionError when that cannot be read, or has a field of a type that Stripe does not document.
    """
    kind = _kind_of(event)
    if kind is None:
        return None
    try:
        previous = event.previous_attributes
        if not previous:
            return None
        # Cleaned like the row itself, or a state would not equal the one that it became.
        shaped = _converted(kind, without_nul(overlaid(event.object, previous)))
    except _UNREADABLE:
        raise ProjectionError(_CANNOT_BE_READ) from None
    return _row(kind, event, shaped, received)


def plain_object(event: Event) -> dict[str, Any]:
    """`event.object`, without what PostgreSQL's jsonb refuses. Raises ProjectionError when it cannot be read."""
    try:
        return cast(dict[str, Any], without_nul(event.object))
    except _UNREADABLE:
        raise ProjectionError(_CANNOT_BE_READ) from None


def plain_object_before(event: Event) -> dict[str, Any] | None:
    """The same as it was before `event`, from its `previous_attributes`; None where Stripe gives none.

    Raises ProjectionError when it cannot be read.
    """
    try:
        previous = event.previous_attributes
        return cast(dict[str, Any], without_nul(overlaid(event.object, previous))) if previous else None
    except _UNREADABLE:
        raise ProjectionError(_CANNOT_BE_READ) from None


def is_stub(event: Event) -> bool:
    """Whether this deletion only says that the customer is gone, without the customer."""
    if event.type != "customer.deleted":
        return False
    try:
        return event.object.get("created") is None
    except _UNREADABLE:
        return False  # what is wrong with it, `row_of` says


def begins(event: Event) -> bool:
    """Whether this event is the first of its object's life, so that nothing was there before it."""
    return event.type in _FIRST_TYPES


def second_of(rank: int) -> int:
    """Stripe's second (unix) in a rank."""
    return (rank & (_TERMINAL - 1)) >> 14


def _row(kind: Kind, event: Event, shaped: Any, received: datetime) -> Row:
    return Row(
        kind.table,
        cast(str, event.object_id),
        event.account,
        event.livemode,
        kind.columns_of(shaped, event.created if _ends(event) else None),
        event.id,
        received,
        _rank(kind, event, shaped),
    )


# ── Reads ───────────────────────────────────────────────────────────────────────────────────────────────────────


def table_of_type(object_type: str | None) -> str | None:
    """The billing table of a type of object (`customer`, …), or None where there is none."""
    kind = KINDS.get(object_type or "")
    return kind.table if kind else None


def row_of_read(read: Read) -> Row | None:
    """The row as a read tells it, or None where it has none to tell.

    That is so for objects without a table, and for a bare 404: it may as well mean that the key is of another account,
    so it ends nothing unless an event has said that the object's life is over. Raises ProjectionError when the object
    cannot be read, or has a field of a type Stripe does not document.
    """
    kind = KINDS.get(read.object_type)
    if kind is None:
        return None
    try:
        value = decode(read.body) if read.body else {}
        if not read.body or value.get("deleted") is True:
            return _row_of_gone(kind, read)
        shaped = _converted(kind, without_nul(value))
    except _UNREADABLE:
        raise ProjectionError(_CANNOT_BE_READ) from None
    # Of what is still there, only a payment method's life can be over: without its customer, for good.
    ended = read.ended if kind.table == "payment_methods" and not kind.columns_of(shaped, None)[0] else None
    step, attempts = _progress(kind, shaped)
    terminal = ended is not None or getattr(shaped, "status", None) in _FINAL_STATUSES
    rank = terminal * _TERMINAL | (read.second - 1) << 14 | step << 12 | _READ << 10 | attempts << 1 | 1
    return _row_as_read(kind, read, kind.columns_of(shaped, ended), rank)


def _row_of_gone(kind: Kind, read: Read) -> Row | None:
    if kind.table == "subscriptions" or (read.ended is None and not read.body):
        return None
    # Like an event that only says "gone", of the second in which it went. Where no event has told which that was, below
    # every event that does.
    rank = _TERMINAL | (read.ended or 0) << 14 | 2 << 10
    ended = read.ended if read.ended is not None else read.second
    return _row_as_read(kind, read, kind.columns_of(kind.shape(), ended), rank)


def _row_as_read(kind: Kind, read: Read, values: tuple[Any, ...], rank: int) -> Row:
    return Row(kind.table, *read.key, values, read.source, read.received, rank)


def rank_of_read(read: Read) -> int:
    """Where a read stands among the reads of its object, and among the events where it has a row."""
    try:
        row = row_of_read(read)
    except ProjectionError:
        row = None
    return row.rank if row else (read.second - 1) << 14 | _READ << 10


def ends(event: Event) -> bool:
    """Whether this event, thin or not, says that its object's life is over in a way that the object may not show."""
    return event.snapshot_type in _LAST_TYPES


def completed(row: Row, known: Row) -> Row:
    """A stub's row, with what was last known of the object."""
    values = [*known.values[:-1], row.values[-1]]
    if row.table == "payment_methods":
        values[0] = None  # it is no longer its customer's
    return replace(row, values=tuple(values), evidence=known.evidence)


# What reading raises for text that is no UTF-8 (nobody looked inside the strings before), and for an object
# nested deeper than Python's stack.
_UNREADABLE = (PayloadError, RecursionError)
_CANNOT_BE_READ = "The object cannot be read: its text is not UTF-8, or it is nested too deep"


def _shaped(kind: Kind, event: Event) -> Any:
    try:
        # PostgreSQL's text and jsonb hold no NUL; JSON does. Such bodies take the slow road, cleaned on the way.
        if b"\\u0000" in event.body:
            return _converted(kind, without_nul(event.object))
        try:
            return kind.read(event.body).data.object
        except msgspec.ValidationError as error:
            raise ProjectionError(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _converted(kind, event.object)
    except _UNREADABLE:
        raise ProjectionError(_CANNOT_BE_READ) from None


def _converted(kind: Kind, value: dict[str, Any]) -> Any:
    try:
        return msgspec.convert(value, kind.shape)
    except msgspec.ValidationError as error:
        raise ProjectionError(str(error)) from None


# ── Rank ────────────────────────────────────────────────────────────────────────────────────────────────────────

_INVOICE_STEPS = {"draft": 0, "open": 1, "uncollectible": 2, "paid": 3, "void": 3}
_SUBSCRIPTION_STEPS = {"incomplete": 0, "canceled": 2, "incomplete_expired": 2}
_FINAL_STATUSES = frozenset({"paid", "void", "canceled", "incomplete_expired"})
_FIRST_TYPES = frozenset(
    {"customer.created", "customer.subscription.created", "invoice.created", "payment_method.attached"}
)
_LAST_TYPES = frozenset(
    {"customer.deleted", "customer.subscription.deleted", "invoice.deleted", "payment_method.detached"}
)

#: Thin events that say that a life has ended: see `ends`.
THIN_ENDS = tuple(sorted(f"v1.{name}" for name in _LAST_TYPES))

_TERMINAL = 1 << 56

#: Below every rank: it overwrites nothing, and everything overwrites it.
NOTHING = -1

# The stage of a read: above every event's.
_READ = 3


def _is_stub(rank: int) -> bool:
    return bool(rank & _TERMINAL) and not rank & 1


def _is_read(rank: int) -> bool:
    return rank >> 10 & 3 == _READ


def _ends(event: Event) -> bool:
    return event.type in _LAST_TYPES


def _rank(kind: Kind, event: Event, shaped: Any) -> int:
    terminal = _ends(event) or getattr(shaped, "status", None) in _FINAL_STATUSES
    step, attempts = _progress(kind, shaped)
    stage = 2 if _ends(event) else 0 if begins(event) else 1
    whole = not (kind.table == "customers" and _ends(event) and shaped.created is None)
    return terminal * _TERMINAL | event.created << 14 | step << 12 | stage << 10 | attempts << 1 | whole


def _progress(kind: Kind, shaped: Any) -> tuple[int, int]:
    """How far along the object is within one second, and how often its payment was tried."""
    status = getattr(shaped, "status", None) or ""
    if kind.table == "invoices":
        return _INVOICE_STEPS.get(status, 1), min(max(shaped.attempt_count or 0, 0), 255)
    return (_SUBSCRIPTION_STEPS.get(status, 1), 0) if kind.table == "subscriptions" else (0, 0)


# ── Writing ─────────────────────────────────────────────────────────────────────────────────────────────────────


def highest(rows: Iterable[Row]) -> list[Row]:
    """The row of highest rank for each object; of equals, the one of the greater event id."""
    best: dict[Place, Row] = {}
    for row in rows:
        other = best.get(row.place)
        if other is None or (other.rank, other.event_id) < (row.rank, row.event_id):
            best[row.place] = row
    return list(best.values())


async def write(db: Connection, rows: Sequence[Row], *, force: bool = False) -> dict[Place, Standing]:
    """Write `rows` (one for each object at most) where they outrank what is there; say how those rows stood before.

    One round trip for each table. `force` writes whatever the rank: for settling a tie, and nothing else.
    """
    before: dict[Place, Standing] = {}
    for table in TABLES:
        mine = [row for row in rows if row.table == table]
        if not mine:
            continue
        found: list[asyncpg.Record] = await db.fetch(_SQL[f"project_{table}"], [composite(row) for row in mine], force)
        for key_id, account, livemode, rank, event_id, contested in found:
            before[table, (key_id, account, livemode)] = Standing(table, rank, event_id, frozenset(contested or ()))
    return before


async def begin_to_write(db: Connection) -> None:
    """For whoever writes to the tables in another order than TABLES': wait for a rebuild now, with nothing in hand."""
    await db.execute(_SQL["begin_to_write"])


async def are_held(db: Connection) -> bool:
    """Whether the tables are being made again, so that nobody else can write to them."""
    return bool(await db.fetchval(_SQL["are_held"]))


@dataclass(frozen=True, slots=True)
class Kept:
    """A row as it stands, and what it remembers of its events.

    `shown`: the rank and event of what last showed its object. That is the row's own, but for a deletion without the
    object; None where such a one was applied by a version that did not note it; its rank is NOTHING where nothing had
    ever shown the object. `contested`: the events that were weighed, where they do not tell what was last.
    """

    row: Row
    shown: tuple[int, str] | None
    contested: frozenset[str]


async def kept(db: Connection, place: Place) -> Kept | None:
    """A row as it stands; None where there is none."""
    table, key = place
    found = await db.fetchrow(_SQL[f"kept_{table}"], *key)
    if found is None:
        return None
    *values, event_id, received, rank, evidence, shown_rank, shown_by, contested_by = found
    row = Row(table, *key, tuple(values), event_id, received, rank, evidence)
    contested = frozenset(contested_by or () if evidence == "undecided" else ())
    if not row.is_stub:
        return Kept(row, (rank, event_id), contested)
    return Kept(row, None if shown_rank is None else (shown_rank, shown_by), contested)


async def note_shown(db: Connection, place: Place, shown: tuple[int, str] | None) -> None:
    """Beside a row that was just written: which rank and event last showed its object."""
    table, key = place
    await db.execute(_SQL[f"note_shown_{table}"], *key, *(shown or (None, None)))


async def note_contested(db: Connection, place: Place, event_ids: Iterable[str]) -> None:
    """Beside a row that was just written as undecided: the events that were weighed for it."""
    table, key = place
    await db.execute(_SQL[f"note_contested_{table}"], *key, sorted(event_ids))


@dataclass(frozen=True, slots=True)
class Stored:
    """A read as it is kept. `asked_to`: Stripe was asked again until this second, and had nothing newer to say."""

    read: Read
    asked_to: int


async def reads_of(db: Connection, keys: Iterable[_Key]) -> dict[_Key, list[Stored]]:
    """What is kept of these objects: the latest read that showed each, the latest that found it gone, or both."""
    columns = [list(column) for column in zip(*keys, strict=True)] or [[], [], []]
    found: dict[_Key, list[Stored]] = {}
    for row in await db.fetch(_SQL["reads_of"], *columns):
        stored = _stored(row)
        found.setdefault(stored.read.key, []).append(stored)
    return found


async def reads_after(db: Connection, after: tuple[str, str, bool, bool] | None, limit: int) -> list[Read]:
    """Up to `limit` reads after the one of this id, account, livemode and gone, in that order."""
    return [_stored(row).read for row in await db.fetch(_SQL["reads_after"], *(after or ("", "", False, False)), limit)]


async def keep_reads(db: Connection, reads: Sequence[Read]) -> list[Read]:
    """Store what Stripe said, in the caller's transaction; return the reads as they are stored.

    The latest is kept, unless an older one ranks higher: a final state is never left. That a life has ended, where an
    event once said so, is remembered.
    """
    known = await reads_of(db, {read.key for read in reads})
    best: dict[tuple[_Key, bool], Read] = {}
    for read in reads:
        told = [one.read.ended for one in known.get(read.key, ())]
        read = replace(read, ended=read.ended or next((at for at in told if at is not None), None))
        other = best.get((read.key, read.gone))
        if other is None or rank_of_read(other) < rank_of_read(read):
            best[read.key, read.gone] = read
    rows = [
        (*read.key, read.gone, read.object_type, read.second, read.ended, rank_of_read(read), read.source, read.body)
        for read in best.values()
    ]
    columns = [list(column) for column in zip(*rows, strict=True)]
    return [_stored(row).read for row in await db.fetch(_SQL["keep_reads"], *columns)] if rows else []


def _stored(row: asyncpg.Record) -> Stored:
    read = Read(
        *(row["object_type"], row["object_id"], row["account"], row["livemode"], row["body"], row["stripe_second"]),
        *(row["source"], row["ended"], row["read_at"]),
    )
    return Stored(read, row["asked_to"])


def composite(row: Row) -> tuple[Any, ...]:
    """`row` as PostgreSQL's type `billing.<table>_row` takes it."""
    return *row.key, *row.values, row.event_id, row.received, row.rank, row.evidence


def marked(row: Row, evidence: str) -> Row:
    """`row`, saying how sure its order is: `decided` or `undecided`."""
    return replace(row, evidence=evidence)
