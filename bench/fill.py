"""Millions of events, as a year of use would have left them: COPY in PostgreSQL's binary format, indexes afterwards.

Day after day of processed events, some dead, of customers with a subscription, a payment method and invoices each.
"""

import struct
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from bench.events import API_VERSION, KINDS, body_about, customer_id, event_id
from bench.lab import Connection
from kamiyo.event import lane_of

#: Days over which the events are spread; the last one is yesterday.
DAYS = 30

#: One event in so many is dead.
DEAD_EVERY = 1000

_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_TRAILER = struct.pack(">h", -1)
# PostgreSQL counts microseconds from here.
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_CHUNK = 1000

_LEDGER = (
    *("seq", "created_at", "stripe_created", "next_try_at", "processed_at", "failed_at", "lane", "processing_us"),
    *("attempts", "event_id", "event_type", "status", "outcome", "object_type", "object_id", "customer"),
    "api_version",
)
_BODIES = ("seq", "created_at", "body")

_INT2, _INT4, _INT8 = struct.Struct(">ih"), struct.Struct(">ii"), struct.Struct(">iq")
_LENGTH = struct.Struct(">i")
_NULL = _LENGTH.pack(-1)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Event:
    """One event of the fill, by its number; `seq` is the number plus one."""

    number: int
    made: str
    owner: str
    created_at: datetime


@dataclass(frozen=True)
class Fill:
    """What is filled: `rows` events of `customers`, from `start` on, evenly; bodies of the last `kept` days only."""

    rows: int
    customers: int
    start: datetime
    kept: int = DAYS

    @classmethod
    def until_today(cls, rows: int, customers: int, kept: int = DAYS) -> "Fill":
        """The last DAYS whole days."""
        today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        return cls(rows, customers, today - timedelta(days=DAYS), kept)

    def partition(self, which: int) -> str:
        """The table with the bodies of a day."""
        return f"webhook_payloads_{self.start + timedelta(days=which):%Y%m%d}"

    def event(self, number: int) -> Event:
        """Event `number` of the fill."""
        at = self.start + timedelta(days=DAYS) * (number / self.rows)
        owner = customer_id(number, self.customers)
        kind = KINDS[number % 4]
        if kind.shape == "customer":
            return Event(number, owner, owner, at)
        # Each customer's one subscription and one payment method change now and then; each invoice is its own.
        made = f"in_1{number:012d}Filled" if kind.shape == "invoice" else kind.prefix + owner[4:]
        return Event(number, made, owner, at)

    def day(self, which: int) -> range:
        """The numbers of one day's events."""
        return range(-(-self.rows * which // DAYS), -(-self.rows * (which + 1) // DAYS))


def _text(value: str) -> bytes:
    raw = value.encode()
    return _LENGTH.pack(len(raw)) + raw


def _moment(at: datetime) -> bytes:
    return _INT8.pack(8, (at - _EPOCH) // timedelta(microseconds=1))


def ledger_row(event: Event, *, status: str) -> bytes:
    """The event in `webhook_events`: `processed`, `failed` (dead), or `pending`."""
    kind = KINDS[event.number % 4]
    at = _moment(event.created_at)
    done, dead, waiting = status == "processed", status == "failed", status == "pending"
    return b"".join(
        (
            struct.pack(">h", len(_LEDGER)),
            _INT8.pack(8, event.number + 1),
            at,
            _moment(event.created_at.replace(microsecond=0)),
            at if waiting else _NULL,
            at if done else _NULL,
            at if dead else _NULL,
            _INT4.pack(4, lane_of("", event.owner)),
            _INT8.pack(8, 0 if waiting else 400),
            _INT2.pack(2, 0 if waiting else 5 if dead else 1),
            _text(event_id(event.number)),
            _text(kind.event_type),
            _text(status),
            _text("projected") if done else _NULL,
            _text(kind.shape),
            _text(event.made),
            _text(event.owner),
            _text(API_VERSION),
        )
    )


def body_row(event: Event) -> bytes:
    """The event's body in `webhook_payloads`."""
    body = body_about(event.made, event.number, created=int(event.created_at.timestamp()), owner=event.owner)
    return b"".join(
        (
            struct.pack(">h", len(_BODIES)),
            _INT8.pack(8, event.number + 1),
            _moment(event.created_at),
            _LENGTH.pack(len(body)),
            body,
        )
    )


async def _stream(numbers: range, row: Callable[[int], bytes], progress: Callable[[int], None]) -> AsyncIterator[bytes]:
    yield _HEADER
    for at in range(numbers.start, numbers.stop, _CHUNK):
        chunk = range(at, min(at + _CHUNK, numbers.stop))
        yield b"".join(map(row, chunk))
        progress(chunk.stop)
    yield _TRAILER


async def fill(db: Connection, plan: Fill, say: Progress) -> None:
    """Fill an empty database, and bring its indexes, counts and statistics up to date."""
    await db.execute("SET maintenance_work_mem = '512MB'")
    await db.execute("SELECT webhook_ensure_partitions($1, $2)", plan.start.date(), DAYS)
    indexes = await db.fetch(
        "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'webhook_events' AND schemaname = 'public' "
        "AND indexname <> 'webhook_events_pkey'"
    )

    def ledger(number: int) -> bytes:
        status = "failed" if number % DEAD_EVERY == DEAD_EVERY - 1 else "processed"
        return ledger_row(plan.event(number), status=status)

    async with db.transaction():
        # Emptied in the same transaction, so that rows can be written frozen and no vacuum has to visit them again.
        await db.execute("TRUNCATE webhook_events, webhook_failures")
        for index in indexes:
            await db.execute(f'DROP INDEX "{index["indexname"]}"')
        await db.execute("ALTER TABLE webhook_events DISABLE TRIGGER USER")
        await db.copy_to_table(
            "webhook_events",
            source=_stream(range(plan.rows), ledger, lambda done: say("events", done, plan.rows)),
            columns=list(_LEDGER),
            format="binary",
            freeze=True,
        )
        await db.execute("ALTER TABLE webhook_events ENABLE TRIGGER USER")
    for which in range(DAYS - plan.kept, DAYS):
        table = plan.partition(which)
        async with db.transaction():
            await db.execute(f"TRUNCATE {table}")
            await db.copy_to_table(
                table,
                source=_stream(
                    plan.day(which),
                    lambda number: body_row(plan.event(number)),
                    lambda done: say("bodies", done, plan.rows),
                ),
                columns=list(_BODIES),
                format="binary",
                freeze=True,
            )
    for at, index in enumerate(indexes, 1):
        await db.execute(index["indexdef"])
        say("indexes", at, len(indexes))
    await _beside(db, plan)
    await settle(db)


async def _beside(db: Connection, plan: Fill) -> None:
    """The rows that belong to the events: failures, billing rows, counts."""
    for statement in _BILLING:
        await db.execute(statement, plan.customers)
    await db.execute(_INVOICES)
    await db.execute(_FAILURES)
    await db.execute("SELECT webhook_recount()")


_BILLING = (
    """
INSERT INTO billing.customers (id, livemode, last_webhook_event_id, last_event_rank)
SELECT 'cus_bench' || lpad(n::text, 12, '0'), false, 'evt_filled', 1 FROM generate_series(0, $1::int - 1) AS n
""",
    """
INSERT INTO billing.subscriptions (id, customer, livemode, last_webhook_event_id, last_event_rank)
SELECT 'sub_bench' || lpad(n::text, 12, '0'), 'cus_bench' || lpad(n::text, 12, '0'), false, 'evt_filled', 1
FROM generate_series(0, $1::int - 1) AS n
""",
    """
INSERT INTO billing.payment_methods (id, customer, livemode, last_webhook_event_id, last_event_rank)
SELECT 'pm_bench' || lpad(n::text, 12, '0'), 'cus_bench' || lpad(n::text, 12, '0'), false, 'evt_filled', 1
FROM generate_series(0, $1::int - 1) AS n
""",
)

_INVOICES = """
INSERT INTO billing.invoices (id, customer, livemode, last_webhook_event_id, last_event_rank)
SELECT object_id, customer, false, 'evt_filled', 1 FROM webhook_events WHERE object_type = 'invoice'
"""

_FAILURES = """
INSERT INTO webhook_failures (created_at, event_id, event_type, retry_count, error_type, error_message, fingerprint)
SELECT created_at, event_id, event_type, n, 'ValueError', 'the benchmark says so', 'benchmark'
FROM webhook_events, generate_series(1, 5) AS n WHERE failed_at IS NOT NULL
"""


async def settle(db: Connection) -> None:
    """Continue the sequence, fold the counts, vacuum, checkpoint: nothing is left that would disturb a measurement."""
    await db.execute("SELECT setval(pg_get_serial_sequence('webhook_events', 'seq'), max(seq)) FROM webhook_events")
    while await db.fetchval("SELECT webhook_fold_counts()"):
        pass
    await db.execute("VACUUM (ANALYZE)")
    await db.execute("CHECKPOINT")


async def warm(db: Connection) -> None:
    """Read the ledger's large indexes, so that they are in memory, as where events have come for a month."""
    async with db.transaction():
        await db.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")
        for column in ("event_id", "customer", "object_id"):
            await db.execute(f"SELECT count({column}) FROM webhook_events WHERE {column} >= ''")  # noqa: S608 - named above


async def add_backlog(db: Connection, plan: Fill, numbers: range, say: Progress) -> None:
    """Store events of today as a server without a worker would leave them: pending, all due; every fifth is of one
    busy customer."""
    await db.execute("SELECT webhook_ensure_partitions($1, 2)", plan.start.date() + timedelta(days=DAYS - 1))
    now = datetime.now(UTC)
    busy = customer_id(0, plan.customers)

    def waiting(number: int) -> Event:
        event = plan.event(number)
        owner = busy if number % 5 == 0 else event.owner
        # As they come a thousand a second while no worker runs.
        at = now - timedelta(milliseconds=numbers[-1] - number)
        return Event(number, f"{KINDS[number % 4].prefix}1{number:012d}Waiting", owner, at)

    for table, columns, row in (
        ("webhook_events", _LEDGER, lambda number: ledger_row(waiting(number), status="pending")),
        ("webhook_payloads", _BODIES, lambda number: body_row(waiting(number))),
    ):
        source = _stream(numbers, row, lambda done: say("backlog", done - numbers.start, len(numbers)))
        await db.copy_to_table(table, source=source, columns=list(columns), format="binary")
    await settle(db)


def progress_line() -> Progress:
    """A line on standard error: rewritten on a terminal, a new one every fifteen seconds elsewhere."""
    began = last = time.monotonic()
    terminal = sys.stderr.isatty()

    def say(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (1 if terminal else 15) and done != total:
            return
        last = now
        end = "\r" if terminal and done != total else "\n"
        print(f"{what}: {done:,} of {total:,} ({now - began:.0f} s)", end=end, file=sys.stderr, flush=True)

    return say
