"""The billing tables compared with Stripe, row by row, each with its object as it is at this moment.

The tables are right without this: events and reads make them so. This is for whoever wants to see it, and for what can
go wrong beside them: rows that somebody wrote to, events that were never delivered and are past Stripe's 30 days.

A row that differs is looked at again before it is told, because Stripe and we do not stand still: the event that says
what Stripe already shows may be on its way. Told is what still differs a while later, while the row stayed the same,
nothing of that object was in line, and nothing that the row knows is newer than what Stripe was asked.
"""

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from kamiyo import inbox, projections, reads
from kamiyo.database import Connection, Pool, load_queries
from kamiyo.projections import ProjectionError, Read, Row
from kamiyo.refused import Refusal
from kamiyo.shapes import COLUMNS, PATHS, TABLES
from kamiyo.stripe_api import StripeApi, StripeGone, together
from kamiyo.telemetry import happened

_SQL = load_queries("audit.sql")

#: Columns that hold a customer's data, so that their values are shown only where somebody asks for them.
PRIVATE = frozenset(
    {
        *("email", "name", "phone", "description", "metadata", "number", "hosted_invoice_url", "invoice_pdf"),
        *("brand", "last4", "exp_month", "exp_year", "funding", "country", "fingerprint"),
        *("balance", "subtotal", "total", "amount_due", "amount_paid", "amount_remaining"),
    }
)

#: Rows of a table that are compared at least, however small the share: one percent of ten rows is none.
AT_LEAST = 20

# Rows that are asked for, and held in memory, together.
_CHUNK = 100

#: Between two looks at a row that differs: most of Stripe's deliveries are here by then.
WAIT_SECONDS = 10.0

# Looks at a row that keeps changing, before it is left alone.
_MOST_LOOKS = 5

_PATIENCE_SECONDS = 600.0
_LANE_SECONDS = 0.05
_MOST_LANE_TRIES = 600

_TYPES = {str(projections.table_of_type(name)): name for name in PATHS}


class Verdict(StrEnum):
    """What is wrong with a row."""

    differs = "differs"  # Stripe says something else
    gone = "gone"  # Stripe has no such object (404), which by itself proves nothing: the key may be another account's
    unreadable = "unreadable"  # the object does not have the shape that Stripe documents


@dataclass(frozen=True, slots=True)
class Difference:
    """One column: what our row says, and what Stripe says. Times are unix seconds."""

    column: str
    ours: Any
    stripes: Any

    @property
    def private(self) -> bool:
        """Whether the values are a customer's data."""
        return self.column in PRIVATE


@dataclass(frozen=True, slots=True)
class Finding:
    """A row that is not as Stripe has it, the event or the read that had made it so, and whether it was mended."""

    table: str
    id: str
    account: str
    livemode: bool
    verdict: Verdict
    differences: tuple[Difference, ...]
    event_id: str
    evidence: str
    mended: bool = False


@dataclass(frozen=True, slots=True)
class Audited:
    """How many rows were compared, what is wrong, how many changed too often to tell, and which PostgreSQL
    does not let be mended."""

    checked: int
    findings: list[Finding]
    unsettled: int
    refused: tuple[Refusal, ...]


async def sizes(db: Connection, account: str, livemode: bool, share: float) -> dict[str, tuple[int, float]]:
    """For each table how many rows there are to compare, about, and which share of it that is."""
    counts = await db.fetchrow(_SQL["count"], account, livemode)
    assert counts is not None  # noqa: S101 - a SELECT without FROM has exactly one row
    shares = {table: min(1.0, max(share, AT_LEAST / max(counts[table], 1))) for table in TABLES}
    return {table: (round(counts[table] * shares[table]), shares[table]) for table in TABLES}


async def audit(
    pool: Pool,
    api: StripeApi,
    *,
    share: float = 0.01,
    account: str = "",
    repair: bool = False,
    pause: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(WAIT_SECONDS),
    progress: Callable[[int], None] = lambda checked: None,
) -> Audited:
    """Compare a random `share` (0 to 1) of the rows of an account, in the key's mode, with Stripe's objects.

    `pause` is waited for between two looks at rows that differ. With `repair`, what Stripe says goes into the tables as
    any read does, and never over anything newer. Raises StripeError, with what was mended until then kept.
    """
    comparison = _Comparison(pool, api, account)
    checked, suspects = 0, list[_Look]()
    async with pool.acquire(timeout=10) as db:
        shares = await sizes(db, account, api.livemode, share)
    seed = secrets.randbits(62)
    for table in TABLES:
        after = ""
        while ids := await comparison.sample(table, after, seed, shares[table][1]):
            looks = await comparison.look(table, ids)
            suspects += [look for look in looks if look.finding]
            checked, after = checked + len(ids), ids[-1]
            progress(checked)
    told: list[_Look] = []
    for _ in range(_MOST_LOOKS - 1):
        if not suspects:
            break
        await pause()
        certain, suspects = await comparison.look_again(suspects)
        told += certain
    findings, refused = [look.finding for look in told if look.finding], list[Refusal]()
    if repair:
        findings, refused = await comparison.mend(told)
    happened("audited", count=checked, differing=len(findings), mended=sum(one.mended for one in findings))
    return Audited(checked, findings, len(suspects), tuple(refused))


@dataclass(frozen=True, slots=True)
class _Look:
    """A row and its object, seen together: the row as it stood a moment after Stripe was asked."""

    row: Row
    read: Read
    finding: Finding | None
    #: False while an event of the object is in line, or the row knows of a second that the answer may not show.
    settled: bool

    def confirms(self, earlier: "_Look") -> bool:
        return self.settled and (self.row.rank, self.row.event_id) == (earlier.row.rank, earlier.row.event_id)


@dataclass(frozen=True, slots=True)
class _Comparison:
    pool: Pool
    api: StripeApi
    account: str

    async def sample(self, table: str, after: str, seed: int, share: float) -> list[str]:
        async with self.pool.acquire(timeout=10) as db:
            rows = await db.fetch(_SQL[f"sample_{table}"], self.account, self.api.livemode, after, seed, share, _CHUNK)
        return [object_id for (object_id,) in rows]

    async def look(self, table: str, ids: Sequence[str]) -> list[_Look]:
        found = await together(self._ask(table, object_id) for object_id in ids)
        async with self.pool.acquire(timeout=10) as db:
            rows = await self._rows(db, table, ids)
            in_line = {name for (name,) in await db.fetch(_SQL["in_line"], list(ids), self.account, self.api.livemode)}
        return [
            _look(rows[read.object_id], read, read.object_id in in_line) for read in found if read.object_id in rows
        ]

    async def look_again(self, suspects: Sequence[_Look]) -> tuple[list[_Look], list[_Look]]:
        """Those of the suspects that are wrong for certain, and those to be looked at once more."""
        certain, again = list[_Look](), list[_Look]()
        for table, ids in _by_table(suspects):
            earlier = {look.row.id: look for look in suspects if look.row.table == table}
            for look in await self.look(table, ids):
                if look.finding:
                    (certain if look.confirms(earlier[look.row.id]) else again).append(look)
        return certain, again

    async def mend(self, told: Sequence[_Look]) -> tuple[list[Finding], list[Refusal]]:
        """Put what Stripe says into the tables; the findings, saying which of them are mended, and what was refused."""
        mendable, refused = [look for look in told if look.read.body and look.finding], list[Refusal]()
        if mendable:
            async with self.pool.acquire(timeout=10) as db:
                line = await inbox.audit(db, "audit repair", {"account": self.account}, 0)
            for start in range(0, len(mendable), _CHUNK):
                refused += await self._apply(mendable[start : start + _CHUNK], line)
        async with self.pool.acquire(timeout=10) as db:
            return await self._as_they_stand(db, told), refused

    async def _as_they_stand(self, db: Connection, told: Sequence[_Look]) -> list[Finding]:
        """What was found, and which of it is mended by now; nothing of a row that somebody has erased."""
        rows: dict[tuple[str, str], Row] = {}
        for table, ids in _by_table(told):
            rows |= {(table, name): row for name, row in (await self._rows(db, table, ids)).items()}
        return [
            replace(look.finding, mended=_look(row, look.read, False).finding is None)
            for look in told
            if look.finding and (row := rows.get((look.row.table, look.row.id)))
        ]

    async def _ask(self, table: str, object_id: str) -> Read:
        object_type = _TYPES[table]
        read = Read(object_type, object_id, self.account, self.api.livemode, b"", 0, "audit")
        try:
            path = f"{PATHS[object_type]}/{object_id}"
            reply = await self.api.read(path, account=self.account, patience=_PATIENCE_SECONDS)
        except StripeGone:
            return read
        return replace(read, body=reply.body, second=reply.second)

    async def _rows(self, db: Connection, table: str, ids: Sequence[str]) -> dict[str, Row]:
        found = await db.fetch(_SQL[f"rows_{table}"], self.account, self.api.livemode, list(ids))
        rows = (Row(table, i, self.account, self.api.livemode, tuple(v), *told) for i, *v, told in map(_split, found))
        return {row.id: row for row in rows}

    async def _there(self, db: Connection, looks: Sequence[_Look]) -> list[_Look]:
        """Those of the looks whose row is still there."""
        there = set[tuple[str, str]]()
        for table, ids in _by_table(looks):
            there |= {(table, object_id) for object_id in await self._rows(db, table, ids)}
        return [look for look in looks if (look.row.table, look.row.id) in there]

    async def _apply(self, told: Sequence[_Look], line: int) -> list[Refusal]:
        waiting, refused = told, list[Refusal]()
        for _ in range(_MOST_LANE_TRIES):
            async with self.pool.acquire(timeout=10) as db, db.transaction():
                # A row that somebody has deleted meanwhile is not to come back. To hold those that are there would be a
                # lock out of turn, and a ring with who deletes.
                waiting = await self._there(db, waiting)
                result = await reads.apply(db, [look.read for look in waiting])
                applied = [look for look in waiting if look.read not in result.held_up]
                if applied:
                    findings = await self._as_they_stand(db, applied)
                    await inbox.audit_part(db, line, sum(one.mended for one in findings))
                waiting = [look for look in waiting if look.read in result.held_up]
            for refusal in result.refused:
                refusal.tell()
            refused += result.refused
            if not waiting:
                break
            await asyncio.sleep(_LANE_SECONDS)  # a worker holds their lanes
        return refused


def _split(record: Iterable[Any]) -> tuple[Any, ...]:
    *values, event_id, received, rank, evidence = record
    return *values, (event_id, received, rank, evidence)


def _by_table(looks: Sequence[_Look]) -> list[tuple[str, list[str]]]:
    found = [(table, [look.row.id for look in looks if look.row.table == table]) for table in TABLES]
    return [(table, ids[start : start + _CHUNK]) for table, ids in found if ids for start in range(0, len(ids), _CHUNK)]


def _look(row: Row, read: Read, in_line: bool) -> _Look:
    verdict, differences = _compared(row, read)
    finding = None
    if verdict is not None:
        finding = Finding(row.table, *row.key, verdict, differences, row.event_id, row.evidence)
    known = projections.second_of(row.rank)
    return _Look(row, read, finding, not in_line and (verdict is not Verdict.differs or known < read.second))


def _compared(row: Row, read: Read) -> tuple[Verdict | None, tuple[Difference, ...]]:
    over = COLUMNS[row.table][-1]  # deleted_at or detached_at; a subscription shows by itself that it is over
    ended = row.values[-1] if row.table != "subscriptions" else None
    if not read.body:
        return (None if ended is not None else Verdict.gone), ()
    try:
        # When it ended only an event tells; what our row says of it is no difference.
        told = projections.row_of_read(replace(read, ended=ended))
        gone = read.gone
    except ProjectionError:
        told = None
    if told is None:
        return Verdict.unreadable, ()
    if gone:
        return (None, ()) if ended is not None else (Verdict.differs, (Difference(over, None, told.values[-1]),))
    differences = tuple(
        Difference(column, ours, stripes)
        for column, ours, stripes in zip(COLUMNS[row.table], row.values, told.values, strict=True)
        if _plain(column, ours) != _plain(column, stripes)
    )
    return (Verdict.differs if differences else None), differences


def _plain(column: str, value: Any) -> Any:
    return json.loads(value) if column in ("metadata", "items") and value is not None else value
