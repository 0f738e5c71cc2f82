"""The inbox: the durable table of events. Everything that changes it is a function here, its SQL in `inbox.sql`.

The caller owns the transaction: what a function writes is true once the caller commits.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

import asyncpg

from kamiyo import projections
from kamiyo.database import Connection, load_queries
from kamiyo.errors import EventNotFailed, EventUnknown, KamiyoError
from kamiyo.event import Event
from kamiyo.projections import Read, Row
from kamiyo.shapes import TABLES

_SQL = load_queries("inbox.sql")

#: What people call the account that is kept as '': one's own. No id of an account looks like it.
OWN = "own"

#: Events that one statement of a long piece of work touches, so that no lock is held for long.
CHUNK = 1000


#: Seconds that Stripe's clock may be before ours. An event from further ahead (a test clock) is not waited for; the
#: same number is in `webhook_second_over`.
FUTURE_SECONDS = 5


class Status(StrEnum):
    """Where an event stands."""

    pending = "pending"
    processing = "processing"
    processed = "processed"
    failed = "failed"


class State(StrEnum):
    """Where an event stands, in the words that people see and lists are narrowed by.

    A failed event is `retrying` or `dead`; a pending one may be `unread`.
    """

    pending = "pending"
    unread = "unread"  # it waits until what it names is read from Stripe
    processing = "processing"
    processed = "processed"
    failed = "failed"
    retrying = "retrying"  # it runs again by itself
    dead = "dead"  # it does not


#: What can be run again by hand.
REPLAYABLE = (State.failed, State.retrying, State.dead, State.processed)


class Outcome(StrEnum):
    """What processing an event came to."""

    projected = "projected"  # a billing row, or one of stripe_objects, speaks of it, or of something newer
    handled = "handled"  # handlers of the user's own ran
    ignored = "ignored"  # nobody asked for it
    paired = "paired"  # its twin of the other kind, snapshot or thin, was handled: one occurrence, told twice


class ClaimLost(KamiyoError):
    """Another worker took these events over; whatever this one did must be rolled back."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """An event in a worker's hands.

    `attempts` are the tries before this one. A `suspect` was in the batch of a worker that died, and runs alone;
    one that `was_running` at that moment has used up a try. `started`: this try is counted already. `read` is what
    Stripe's API said of a thin event's object.
    """

    event: Event
    seq: int
    received: datetime
    lane: int
    attempts: int
    suspect: bool
    abandoned: bool
    was_running: bool
    body_kept: bool
    started: bool = False
    read: Read | None = None

    @property
    def second(self) -> int:
        """Stripe's second of the event; where it lies in the future, the second of its arrival counts."""
        return min(self.event.created, int(self.received.timestamp()) + FUTURE_SECONDS)


@dataclass(frozen=True, slots=True)
class Settled:
    """How a try of one event ended well: its outcome, the number of the try, and what it took in microseconds."""

    event_id: str
    outcome: Outcome
    attempt: int
    microseconds: int


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong: the type of the error, its message and traceback, and a fingerprint of the cause."""

    error_type: str
    message: str
    traceback: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Filters:
    """Which events: each filter is None (any) or a value. `since` is inclusive, `until` exclusive.

    `status` is one of State. `account` '' is one's own. Where `context` is one, it is compared as a whole.
    """

    status: str | None = None
    type: str | None = None
    customer: str | None = None
    object_id: str | None = None
    account: str | None = None
    context: str | None = None
    livemode: bool | None = None
    since: datetime | None = None
    until: datetime | None = None

    def values(self) -> tuple[Any, ...]:
        """In the order of the queries' parameters."""
        named = (self.status, self.type, self.customer, self.object_id, self.account, self.context)
        return *named, self.livemode, self.since, self.until


# ── In ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def put(db: Connection, events: Sequence[Event], *, source: str = "webhook") -> dict[str, Status]:
    """Store what is new, with its body, and wake the workers; return the status of what was already known, by id.

    `events` must not name an id twice. One statement: outside a transaction it is one commit, and a notice after it.
    """
    arrivals = [(*Arrival(event, None).told, None, 0) for event in events]
    known: list[asyncpg.Record] = await db.fetch(_SQL["put"], arrivals, [event.body for event in events], source)
    return {event_id: Status(status) for event_id, status in known}


class Arrival:
    """A new event, and what it comes to if its billing row is all it needs; None leaves it to the workers."""

    __slots__ = ("event", "lane", "outcome", "told")

    def __init__(self, event: Event, outcome: Outcome | None) -> None:
        self.event, self.outcome, self.lane = event, outcome, event.lane
        # As PostgreSQL's type `webhook_arrival` takes it, but for outcome and cost, which are known when it is stored.
        self.told = (
            *(event.id, event.type, event.created, event.livemode, event.thin, event.account, event.context),
            *(event.api_version, event.object_type, event.object_id, event.customer, event.snapshot_event, self.lane),
        )


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of a batch: the status of what was known before, and the new ids that are left to the workers."""

    known: dict[str, Status]
    left: set[str]


async def put_projected(
    db: Connection,
    arrivals: Sequence[Arrival],
    rows: Sequence[Row],
    *,
    microseconds: int,
    source: str = "webhook",
) -> Stored:
    """Store what is new and project it in the same commit, where nothing stands in the way.

    `rows` are the billing rows of the arrivals that have an outcome, one for each object at most; `microseconds` is
    what an event has cost so far. Neither `arrivals` nor `rows` may name an event or an object twice.
    """
    by_table = [[projections.composite(row) for row in rows if row.table == table] for table in TABLES]
    told = [(*a.told, a.outcome, microseconds) for a in arrivals]
    bodies = [a.event.body for a in arrivals]
    lanes = [*{a.lane for a in arrivals if a.outcome}]
    known, left = {}, {a.event.id for a in arrivals if not a.outcome}
    for event_id, status, is_new in await db.fetch(_SQL["receive"], told, bodies, lanes, *by_table, source):
        if is_new:
            left.add(event_id)
        else:
            known[event_id] = Status(status)
    return Stored(known, left - known.keys())


async def ensure_partitions(db: Connection) -> int:
    """Make the tables for the bodies of the coming days; return how many were missing."""
    return int(await db.fetchval(_SQL["ensure_partitions"]))


# ── The worker's turn ───────────────────────────────────────────────────────────────────────────────────────────


async def claim(db: Connection, limit: int, handled: Collection[str] = ()) -> tuple[int, list[Claimed]]:
    """Claim up to `limit` due events, oldest first, and hold their lanes on this session until `unlock`.

    Lets go of the lanes of the last claim. An event that is alone in its claim, of a type in `handled` or a suspect,
    has its try counted already (`Claimed.started`). Returns the claim's number, which settling asks for, and the events
    in Stripe's order. Commits: call it outside a transaction.
    """
    taken = await claim_since(db, None, limit, handled)
    return taken.number, taken.events


@dataclass(frozen=True, slots=True)
class Taken:
    """A claim: its number, and the events in Stripe's order.

    `due_in`: where there are none, seconds until the next is due, None: nothing waits. `first_due`: the oldest due
    event that was seen, whoever holds it, or the moment of the look.
    """

    number: int
    events: list[Claimed]
    due_in: float | None
    first_due: datetime


async def claim_since(db: Connection, since: datetime | None, limit: int, handled: Collection[str] = ()) -> Taken:
    """As `claim`, of what became due at `since` or after; None: of everything. See webhook_claim() for why."""
    rows = await db.fetch(_SQL["claim"], limit, list(handled), since)
    claimed = [_claimed(row) for row in rows if row["event_id"] is not None]
    return Taken(rows[0]["claim"], claimed, rows[0]["due_in"], rows[0]["first_due"])


async def unlock(db: Connection) -> None:
    """Let go of every lane this session holds."""
    await db.execute(_SQL["unlock"])


async def wake_own(db: Connection) -> None:
    """Send no notice over this session from now on: who stores wakes the worker of its own process."""
    await db.execute(_SQL["wake_own"])


async def notify(db: Connection) -> None:
    """Wake the workers of every process."""
    await db.execute(_SQL["notify"], timeout=5)


async def end_silent(db: Connection, after: float) -> int:
    """End the sessions of this application that went silent in mid-question over `after` seconds ago; return how many.

    Whatever they held is free then. `after` must be longer than any process may take between two messages.
    """
    return int(await db.fetchval(_SQL["end_silent"], after))


async def start(db: Connection, claim_number: int, event_id: str, attempt: int) -> None:
    """Count a try before it is run. Raises ClaimLost when the claim is no longer ours."""
    if await db.fetchval(_SQL["start"], event_id, claim_number, attempt) is None:
        raise ClaimLost(f"{event_id} is no longer held by claim {claim_number}")


async def succeed(db: Connection, claim_number: int, settled: Sequence[Settled]) -> None:
    """Settle processed events, in the transaction of their effects. Raises ClaimLost unless all are still ours."""
    columns = zip(*((s.event_id, s.outcome.value, s.attempt, s.microseconds) for s in settled), strict=True)
    rows = await db.fetch(_SQL["succeed"], claim_number, *map(list, columns))
    if len(rows) != len(settled):
        raise ClaimLost(f"claim {claim_number} has lost {len(settled) - len(rows)} of {len(settled)} events")


async def fail(
    db: Connection,
    claim_number: int,
    event_id: str,
    failure: Failure,
    *,
    attempt: int,
    retry_in: float | None,
    microseconds: int,
) -> None:
    """Record a failed try. `retry_in` seconds from now it is due again; None: it is dead.

    Raises ClaimLost when the claim is no longer ours.
    """
    recorded = await db.fetchval(
        _SQL["fail"],
        *(event_id, claim_number, attempt, retry_in, microseconds),
        *(failure.error_type, failure.message, failure.traceback, failure.fingerprint),
    )
    if recorded is None:
        raise ClaimLost(f"{event_id} is no longer held by claim {claim_number}")


async def release(db: Connection, claim_number: int, event_ids: Sequence[str], *, due_in: float = 0.0) -> None:
    """Give claimed events back untried; `due_in` seconds from now somebody may take them."""
    await db.execute(_SQL["release"], list(event_ids), claim_number, due_in)


async def move(db: Connection, claim_number: int, owners: Mapping[str, tuple[str, int]]) -> None:
    """Give claimed events back untried, into the lanes of the customers that they turned out to be of.

    `owners`: for each event id, the customer and its lane.
    """
    columns = list(owners), [customer for customer, _ in owners.values()], [lane for _, lane in owners.values()]
    await db.execute(_SQL["move"], claim_number, *columns)


async def await_read(db: Connection, claim_number: int, event_ids: Sequence[str]) -> None:
    """Put claimed events aside, untried, until their objects were read from Stripe."""
    await db.execute(_SQL["await_read"], list(event_ids), claim_number)


@dataclass(frozen=True, slots=True)
class Twin:
    """One of the events that tell an occurrence: a snapshot, or a thin event that names it."""

    event_id: str
    thin: bool
    status: Status
    outcome: Outcome | None


async def twins(db: Connection, occurrences: Iterable[str]) -> dict[str, list[Twin]]:
    """The stored events of these occurrences (see `Event.occurrence`)."""
    found: dict[str, list[Twin]] = {}
    for occurrence, event_id, thin, status, outcome in await db.fetch(_SQL["twins"], list(occurrences)):
        twin = Twin(event_id, thin, Status(status), Outcome(outcome) if outcome else None)
        found.setdefault(occurrence, []).append(twin)
    return found


async def try_occurrences(db: Connection, occurrences: Iterable[str]) -> set[str]:
    """Those of these occurrences that nobody else runs handlers for, ours until the transaction ends."""
    return {name for (name,) in await db.fetch(_SQL["try_occurrences"], sorted(set(occurrences)))}


async def next_due_in(db: Connection) -> float | None:
    """Seconds until the next event is due, negative when it is overdue; None when nothing waits."""
    value = await db.fetchval(_SQL["next_due"])
    return None if value is None else float(value)


# ── What was said before ────────────────────────────────────────────────────────────────────────────────────────


async def of_second(
    db: Connection, object_id: str, account: str, livemode: bool, second: int
) -> list[tuple[Event, datetime]]:
    """The events of one object within one of Stripe's seconds, each with when it was received."""
    rows = await db.fetch(_SQL["of_second"], object_id, account, livemode, second)
    return [(event_of(row), row["created_at"]) for row in rows]


async def of_object(db: Connection, object_id: str, account: str, livemode: bool) -> list[tuple[Event, datetime]]:
    """The latest 200 events of one object, each with when it was received."""
    rows = await db.fetch(_SQL["of_object"], object_id, account, livemode)
    return [(event_of(row), row["created_at"]) for row in rows]


async def after(db: Connection, at: datetime, seq: int, limit: int) -> list[tuple[Event, datetime, int]]:
    """Up to `limit` snapshots after (`at`, `seq`) in order of arrival, each with when it came and its number."""
    rows = await db.fetch(_SQL["after"], at, seq, limit)
    return [(event_of(row), row["created_at"], row["seq"]) for row in rows]


# ── By hand ─────────────────────────────────────────────────────────────────────────────────────────────────────


_INSTEAD_OF_RETRY: Mapping[Status, str] = {
    Status.pending: "it is in line already",
    Status.processing: "a worker has it in hand",
    Status.processed: "a finished event runs again by `kamiyo replay --event`, which takes its id",
}
_LOOK_AGAIN = "it was a moment ago; look again"
# What is not in line, and not in a worker's hands.
_FINISHED = (Status.failed, Status.processed)


async def retry(db: Connection, event_id: str) -> None:
    """Run a failed event again, now, with five new tries. Raises EventUnknown or EventNotFailed."""
    async with db.transaction():
        if await db.fetchrow(_SQL["retry"], event_id, [Status.failed]) is not None:
            await audit(db, "retry", {"event_id": event_id}, 1)
            return
    status = await _status_of(db, event_id)
    raise EventNotFailed(f"Event {event_id} is {status}, not failed: {_INSTEAD_OF_RETRY.get(status, _LOOK_AGAIN)}")


async def replay_one(db: Connection, event_id: str) -> None:
    """Run an event again, failed or processed, and write it to the audit. Raises EventUnknown or EventNotFailed."""
    async with db.transaction():
        if await db.fetchrow(_SQL["retry"], event_id, _FINISHED) is not None:
            await audit(db, "replay", {"event_id": event_id}, 1)
            return
    await require_replayable(db, event_id)
    raise EventNotFailed(f"Event {event_id} was in work a moment ago; look again")


async def require_replayable(db: Connection, event_id: str) -> Status:
    """Where an event stands that can be run again. Raises EventUnknown, or EventNotFailed where it is being run."""
    status = await _status_of(db, event_id)
    if status not in _FINISHED:
        raise EventNotFailed(f"Event {event_id} is {status}: {_INSTEAD_OF_RETRY[status]}")
    return status


async def _status_of(db: Connection, event_id: str) -> Status:
    status = await db.fetchval(_SQL["status"], event_id)
    if status is None:
        raise EventUnknown(f"Event not found: {event_id}")
    return Status(status)


async def count_matching(db: Connection, filters: Filters, fingerprint: str | None = None) -> int:
    """How many events a replay with these filters would run again; `status` defaults to failed."""
    return int(await db.fetchval(_SQL["count_matching"], *_replayable(filters).values(), fingerprint))


async def replay(
    db: Connection,
    filters: Filters,
    fingerprint: str | None = None,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Put every matching event back in line, CHUNK by CHUNK, and write it to the audit; return how many.

    Each chunk commits by itself, together with its part of the audit: call it outside a transaction. `progress` hears
    how many are done so far.
    """
    filters = _replayable(filters)
    told = described(filters) | ({"fingerprint": fingerprint} if fingerprint else {})
    line = await audit(db, "replay", told, 0)
    done, at, seq = 0, _DAWN, 0
    while True:
        async with db.transaction():
            row = await db.fetchrow(_SQL["replay"], *filters.values(), fingerprint, at, seq, CHUNK)
            assert row is not None  # noqa: S101 - an aggregate without GROUP BY has exactly one row
            await audit_part(db, line, row["count"])
        if not row["count"]:
            return done
        done, at, seq = done + row["count"], row["created_at"], row["seq"]
        progress(done)


async def audit(db: Connection, action: str, filters: Mapping[str, Any], count: int) -> int:
    """Write down what a person did, or, of what is done part by part, that they began; return the line's number."""
    return int(await db.fetchval(_SQL["audit"], action, json.dumps(filters, default=str), count))


async def audit_part(db: Connection, line: int, count: int) -> None:
    """Add to a line what was done just now: in the transaction of that part, should the next one never come."""
    await db.execute(_SQL["audit_part"], line, count)


def described(filters: Filters) -> dict[str, Any]:
    """The filters that are set, for the audit."""
    return {name: value for name, value in asdict(filters).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Prunable:
    """What a cleanup would remove: events, their bodies, and when the first and the last of them was received."""

    events: int
    bodies: int
    first: datetime | None
    last: datetime | None


async def count_prunable(db: Connection, days: int) -> Prunable:
    """What `clean_up` would remove now; changes nothing."""
    row = await db.fetchrow(_SQL["count_prunable"], _ago(days))
    assert row is not None  # noqa: S101 - an aggregate without GROUP BY has exactly one row
    return Prunable(*row)


def _ago(days: int) -> datetime:
    return datetime.now(UTC) - timedelta(days=days)


async def clean_up(db: Connection, days: int, *, progress: Callable[[int], None] = lambda done: None) -> int:
    """Remove the processed events of more than `days` days ago, and write it to the audit; return how many."""
    line = await audit(db, "cleanup", {"days": days}, 0)
    return await prune(db, _ago(days), line=line, progress=progress)


async def prune(
    db: Connection,
    before: datetime,
    *,
    line: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Remove the processed events received before `before`, CHUNK by CHUNK; return how many.

    Never an unprocessed one. Each chunk commits by itself, together with its part of the audit's `line`, where there is
    one: call it outside a transaction.
    """
    done = 0
    while count := await _prune_chunk(db, before, line):
        done += count
        progress(done)
    return done


async def _prune_chunk(db: Connection, before: datetime, line: int | None) -> int:
    async with db.transaction():
        await db.execute(_SQL["begin_prune"])
        count = int(await db.fetchval(_SQL["prune"], before, CHUNK))
        if line is not None:
            await audit_part(db, line, count)
        return count


async def prune_tombstones(db: Connection) -> None:
    """Forget ids that Stripe cannot send again."""
    await db.execute(_SQL["prune_tombstones"])


# ── Looking ─────────────────────────────────────────────────────────────────────────────────────────────────────


#: For the transaction of a list. Its filters are optional parameters: a plan made once for all of them would scan. And
#: every list has an index, whatever old statistics say of how little there is.
AS_A_LIST = "SET LOCAL plan_cache_mode = force_custom_plan; SET LOCAL enable_seqscan = off"


def of_unfinished(query: str, status: str | None) -> str:
    """The list `query`, of the unfinished events alone where a list by `status` has no others."""
    if status in (State.pending, State.processing, State.retrying, State.dead):
        return query.replace("FROM webhook_events\n", "FROM webhook_unfinished_events\n")
    return query


async def listed(
    db: Connection, filters: Filters, *, before: tuple[datetime, int] | None = None, limit: int = 50
) -> list[asyncpg.Record]:
    """Events newest first, `limit` of them, below the position `before` (created_at, seq), each with its last error."""
    async with db.transaction(readonly=True):
        await db.execute(AS_A_LIST)
        query = of_unfinished(_SQL["list"], filters.status)
        return await db.fetch(query, *filters.values(), *(before or (None, None)), limit)


async def one(db: Connection, event_id: str) -> tuple[asyncpg.Record, list[asyncpg.Record]]:
    """The event's row, with its body, and its failed tries in order. Raises EventUnknown."""
    row = await db.fetchrow(_SQL["event"], event_id)
    if row is None:
        raise EventUnknown(f"Event not found: {event_id}")
    return row, await db.fetch(_SQL["failures_of"], event_id)


async def failed(db: Connection, limit: int) -> list[asyncpg.Record]:
    """Failed events newest first, each with its last error."""
    return await db.fetch(_SQL["failed"], limit)


async def health(db: Connection) -> asyncpg.Record:
    """One row: status, events_last_24h, failed_events_last_24h, oldest_due_seconds."""
    row = await db.fetchrow(_SQL["health"])
    assert row is not None  # noqa: S101 - an aggregate without GROUP BY has exactly one row
    return row


async def statistics(db: Connection, days: int) -> list[asyncpg.Record]:
    """A row for each type received in the last `days`: received, processed, failed, pending, processing_us."""
    return await db.fetch(_SQL["statistics"], days)


async def queue(db: Connection) -> asyncpg.Record:
    """One row: backlog, oldest_due_seconds, waiting_reads, oldest_unread_seconds, circuit_open, dead, missed."""
    row = await db.fetchrow(_SQL["queue"])
    assert row is not None  # noqa: S101 - a SELECT without FROM has exactly one row
    return row


async def fold_counts(db: Connection) -> int:
    """Fold the latest changes into the counts; return how many lines were folded."""
    return int(await db.fetchval(_SQL["fold"]))


async def days_left(db: Connection) -> int | None:
    """For how many days after today events can be stored; None while maintenance makes the coming days' tables."""
    days = max(int(await db.fetchval(_SQL["days_ahead"]) or 0), 0)
    return days if days < _DAYS_AHEAD else None


# Every hour a worker makes the tables of the next seven days. Where there are fewer than six, none did since yesterday.
_DAYS_AHEAD = 6


def state_of(row: asyncpg.Record | Mapping[str, Any]) -> State:
    """Where the event of a row stands, in one word: never `failed`, of which there are two kinds."""
    if row["status"] == "pending" and row.get("read_due_at") is not None:
        return State.unread
    if row["status"] == "failed":
        return State.dead if row["next_try_at"] is None else State.retrying
    return State(row["status"])


# PostgreSQL's timestamptz reaches further back than any event.
_DAWN = datetime.fromisoformat("2000-01-01T00:00:00+00:00")


def _replayable(filters: Filters) -> Filters:
    return filters if filters.status else replace(filters, status=Status.failed)


def event_of(row: asyncpg.Record, **more: Any) -> Event:
    """The event of a row that has the columns of an event under their names, and its body."""
    return Event(
        id=row["event_id"],
        type=row["event_type"],
        created=row["stripe_created"],
        thin=row["thin"],
        livemode=row["livemode"],
        account=row["account"],
        context=row["context"],
        api_version=row["api_version"],
        object_type=row["object_type"],
        object_id=row["object_id"],
        customer=row["customer"],
        snapshot_event=row["snapshot_event"],
        body=row["body"] or b"",
        **more,
    )


def _claimed(row: asyncpg.Record) -> Claimed:
    return Claimed(
        event=event_of(row),
        seq=row["seq"],
        received=row["created_at"],
        lane=row["lane"],
        attempts=row["attempts"],
        suspect=row["suspect"],
        abandoned=row["abandoned"],
        was_running=row["was_running"],
        body_kept=row["body"] is not None,
        started=row["started"],
    )
