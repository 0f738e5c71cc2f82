"""The billing tables again, from what is stored alone: the events, and what Stripe's API said.

What the tables say is a function of the two, so they can be thrown away and made anew: after a fault in a
projection was mended, or to prove that they are true. Rows whose last event is past its retention are kept as they
are, for nothing else remembers them.

A row that PostgreSQL refuses (a constraint of the tables' owner) ends nothing: all others are made again, and it is
told. In the ledger its event has failed for the same. But where that row stands now, and would be gone or older after
it, nothing is changed.
"""

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

import asyncpg

from kamiyo import inbox, mirror, projections, refused, ties
from kamiyo.database import Connection, load_queries
from kamiyo.errors import KamiyoError
from kamiyo.mirror import State
from kamiyo.projections import ProjectionError, Row
from kamiyo.refused import ROW_REFUSED, Refusal
from kamiyo.shapes import TABLES

_SQL = load_queries("projections.sql")
# Each time it must meet another transaction that does the same.
_MOST_TRIES = 10

_DAWN = datetime.fromisoformat("2000-01-01T00:00:00+00:00")

# Who holds the lock of `hold_tables`, and since when it is in its transaction; of another role's session PostgreSQL may
# not tell. Deliveries share that lock for a moment: not them.
_HOLDER = """
SELECT l.pid, a.application_name AS application, coalesce(a.xact_start, a.backend_start) AS since
FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.mode = 'ExclusiveLock' AND l.pid <> pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.classid = (118038671810930 >> 32)::oid AND l.objid = (118038671810930 & 4294967295)::oid AND l.objsubid = 1
"""

_T = TypeVar("_T", Row, State)


@dataclass(frozen=True, slots=True)
class Holder:
    """The session that keeps a rebuild waiting: another rebuild, or statements that erase a customer."""

    pid: int
    application: str | None
    since: datetime | None


class RowsWouldGoBack(KamiyoError):
    """PostgreSQL refuses rows that stand as they are: made again, they would be lost, or older."""

    def __init__(self, lost: Sequence[Refusal]) -> None:
        super().__init__(
            f"Nothing was changed: PostgreSQL refuses {refused.named(lost)}. It took that once, and what stands would "
            "be lost, or older. Mend the constraint or the trigger that refuses, and run `kamiyo rebuild` again."
        )


async def rebuild(
    db: Connection,
    *,
    mirrored: frozenset[str] = frozenset(),
    progress: Callable[[int], None] = lambda done: None,
    heard: Callable[[Refusal], None] = lambda refusal: None,
    waits: Callable[[Holder], None] = lambda holder: None,
) -> int:
    """Make the four tables again in one transaction, and `stripe_objects` of what is `mirrored`; return how many events
    were read.

    Readers see the old rows until it commits. Meanwhile deliveries are stored and acknowledged as ever, and their
    processing waits. `progress` hears how many events are done so far. A handler that locks rows of several tables may
    be waited for in a ring: then it begins anew, but not within a transaction of the caller's. Within one nobody may
    clean up events meanwhile, either.

    `waits` is told who makes the tables again already. It waits for that one and does it anew, for whoever began that
    may have done so with an older version, or before something was mended.

    `heard` is told each object whose latest state PostgreSQL refuses. Raises RowsWouldGoBack where that stands now.
    """
    holder = await db.fetchrow(_HOLDER)
    if holder is not None:
        waits(Holder(*holder))
    await db.execute(_SQL["hold_tables"])
    tries, apart = 1, False
    try:
        while True:
            try:
                done, refusals = await _make_again(db, mirrored, progress, apart)
            except asyncpg.DeadlockDetectedError:
                # It comes while the tables are locked, and somebody locks them in another order: nothing is lost yet.
                if tries == _MOST_TRIES or db.is_in_transaction():
                    raise
                tries += 1
            except ROW_REFUSED:
                # Once more, in savepoints. Not from the start: where a transaction has more than PostgreSQL keeps in
                # memory, every other session's look at a row gets dearer, and next to no rebuild needs any.
                if apart:
                    raise
                apart = True
            else:
                for refusal in refusals:
                    heard(refusal)
                return done
    finally:
        if not db.is_closed():
            await db.execute(_SQL["let_go_of_tables"])


async def _make_again(
    db: Connection, mirrored: frozenset[str], progress: Callable[[int], None], apart: bool
) -> tuple[int, list[Refusal]]:
    done, at, seq = 0, _DAWN, 0
    refusals = list[Refusal]()

    async def write(items: Sequence[_T], project: Callable[[Sequence[_T]], Awaitable[object]]) -> None:
        if apart:
            refusals.extend(_refusal(*one) for one in await refused.write_apart(db, items, project))
        elif items:
            await project(items)

    # One view of all that is stored, from the first look to the last: a row whose event somebody cleans up meanwhile
    # would be forgotten here, and made by nothing. It begins with the first look, so the locks come before that.
    async with db.transaction(isolation=None if db.is_in_transaction() else "repeatable_read"):
        await db.execute(_SQL["lock_tables"])
        if mirrored:
            await mirror.hold(db)
        if apart:
            await refused.keep_standing(db)
        for table in TABLES:
            await db.execute(_SQL[f"forget_{table}"])
        if mirrored:
            await mirror.forget(db, mirrored)
        while chunk := await inbox.after(db, at, seq, inbox.CHUNK):
            told, shown = list[Row](), list[State]()
            for event, received, _ in chunk:
                try:
                    row = projections.row_of(event, received)
                    state = mirror.state_of(event, received, row) if mirror.wants(event, mirrored) else None
                except ProjectionError:
                    continue  # it could not be applied the first time either
                if row is not None:
                    told.append(row)
                if state is not None:
                    shown.append(state)
            await write(told, lambda rows: ties.project_rows(db, rows))
            await write(shown, lambda states: mirror.project(db, states, mirrored))
            _, at, seq = chunk[-1]
            done += len(chunk)
            progress(done)
        await _read_again(db, lambda rows: write(rows, lambda some: ties.project_rows(db, some)))
        left, lost = await refused.latest(db, refusals)
        for refusal in left:
            refusal.tell()
        if lost:
            raise RowsWouldGoBack(lost)
        return done, left


async def _read_again(db: Connection, write: Callable[[Sequence[Row]], Awaitable[None]]) -> None:
    last: tuple[str, str, bool, bool] | None = None
    while chunk := await projections.reads_after(db, last, inbox.CHUNK):
        rows = []
        for read in chunk:
            with contextlib.suppress(ProjectionError):  # it could not be applied the first time either
                row = projections.row_of_read(read)
                if row is not None:
                    rows.append(row)
        await write(rows)
        last = (*chunk[-1].key, chunk[-1].gone)


def _refusal(item: Row | State, why: str) -> Refusal:
    place = item.table if isinstance(item, Row) else f"stripe_objects {item.object}"
    return Refusal(place, item.id, item.account, item.livemode, item.event_id, item.rank, why)
