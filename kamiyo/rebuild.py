"""The billing tables again, from what is stored alone: the events, and what Stripe's API said.

What the tables say is a function of the two, so they can be thrown away and made anew: after a fault in a
projection was mended, or to prove that they are true. Rows whose last event is past its retention are kept as they
are, for nothing else remembers them.
"""

import contextlib
from collections.abc import Callable
from datetime import datetime

import asyncpg

from kamiyo import inbox, mirror, projections, ties
from kamiyo.database import Connection, load_queries
from kamiyo.projections import ProjectionError
from kamiyo.shapes import TABLES

_SQL = load_queries("projections.sql")
# Each time it must meet another transaction that does the same.
_MOST_TRIES = 10

_DAWN = datetime.fromisoformat("2000-01-01T00:00:00+00:00")


async def rebuild(
    db: Connection, *, mirrored: frozenset[str] = frozenset(), progress: Callable[[int], None] = lambda done: None
) -> int:
    """Make the four tables again in one transaction, and `stripe_objects` of what is `mirrored`; return how many events
    were read.

    Readers see the old rows until it commits. Meanwhile deliveries are stored and acknowledged as ever, and their
    processing waits. `progress` hears how many events are done so far. A handler that locks rows of several tables may
    be waited for in a ring: then it begins anew, but not within a transaction of the caller's. Within one nobody may
    clean up events meanwhile, either.
    """
    await db.execute(_SQL["hold_tables"])
    tries = 1
    try:
        while True:
            try:
                return await _make_again(db, mirrored, progress)
            except asyncpg.DeadlockDetectedError:
                # It comes while the tables are locked, and somebody locks them in another order: nothing is lost yet.
                if tries == _MOST_TRIES or db.is_in_transaction():
                    raise
            tries += 1
    finally:
        if not db.is_closed():
            await db.execute(_SQL["let_go_of_tables"])


async def _make_again(db: Connection, mirrored: frozenset[str], progress: Callable[[int], None]) -> int:
    done, at, seq = 0, _DAWN, 0
    # One view of all that is stored, from the first look to the last: a row whose event somebody cleans up meanwhile
    # would be forgotten here, and made by nothing. It begins with the first look, so the locks come before that.
    async with db.transaction(isolation=None if db.is_in_transaction() else "repeatable_read"):
        await db.execute(_SQL["lock_tables"])
        if mirrored:
            await mirror.hold(db)
        for table in TABLES:
            await db.execute(_SQL[f"forget_{table}"])
        if mirrored:
            await mirror.forget(db, mirrored)
        while chunk := await inbox.after(db, at, seq, inbox.CHUNK):
            told, shown = [], []
            for event, received, _ in chunk:
                try:
                    row = projections.row_of(event, received)
                    state = mirror.state_of(event, received, row) if mirror.wants(event, mirrored) else None
                except ProjectionError:
                    continue  # it could not be applied the first time either
                if row is not None:
                    told.append((event, row))
                if state is not None:
                    shown.append(state)
            if told:
                await ties.project(db, told)
            await mirror.project(db, shown, mirrored)
            _, at, seq = chunk[-1]
            done += len(chunk)
            progress(done)
        await _read_again(db)
    return done


async def _read_again(db: Connection) -> None:
    last: tuple[str, str, bool, bool] | None = None
    while chunk := await projections.reads_after(db, last, inbox.CHUNK):
        rows = []
        for read in chunk:
            with contextlib.suppress(ProjectionError):  # it could not be applied the first time either
                row = projections.row_of_read(read)
                if row is not None:
                    rows.append(row)
        await ties.project_rows(db, rows)
        last = (*chunk[-1].key, chunk[-1].gone)
