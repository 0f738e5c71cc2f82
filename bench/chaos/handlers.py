"""The user's handlers in a storm: KAMIYO_HANDLERS=bench.chaos.handlers.

Each run writes a line of credits in the transaction that settles its event, and marks its start and its end through a
connection of its own. Then it does what the event's fate asks for, after its effects: whatever ends badly must take
them back.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import asyncpg

from bench.chaos import broken
from bench.chaos.crew import die_with_parent
from bench.chaos.traffic import HANDLED, Fate, owner_of
from bench.chaos.variables import FATES_FILE, MARKS_URL, TELL_TASKS
from kamiyo import Bury, Event, Retry, on
from kamiyo.database import DATABASE_ERRORS, Connection, Pool

_BEGIN = """
INSERT INTO chaos.runs (event_id, owner, attempt, backend, backend_since, transaction, beside)
SELECT $1, $2, $3, $4, mine.backend_start, mine.xact_start, (
    SELECT array_agg(r.id) FROM chaos.runs AS r
    JOIN pg_stat_activity AS a ON (a.pid, a.backend_start, a.xact_start) = (r.backend, r.backend_since, r.transaction)
    WHERE r.owner = $2 AND r.ended_at IS NULL AND r.backend <> $4
)
FROM (VALUES (0)) AS one LEFT JOIN pg_stat_activity AS mine ON mine.pid = $4
RETURNING id
"""
_END = "UPDATE chaos.runs SET ended_at = clock_timestamp() WHERE id = $1"
_GRANT = """
WITH line AS (
    INSERT INTO chaos.ledger (event_id, owner, run, claim, superseded)
    SELECT $1, $2, $3, claim, $4 FROM webhook_events WHERE event_id = $1
)
INSERT INTO chaos.accounts AS a (owner, credits) VALUES ($2, 1)
ON CONFLICT (owner) DO UPDATE SET credits = a.credits + 1
"""

# How often a mark is tried again while PostgreSQL is away; then the run has failed, as it must without its mark.
_MARK_TRIES = 20
_MARK_WAIT_SECONDS = 0.05


class Poisoned(Exception):
    """What an event with a bad fate raises."""


class _Marks:
    """Writes marks, through whatever happens to PostgreSQL."""

    def __init__(self) -> None:
        self._pool: Pool | None = None

    async def _ask(self, query: str, *values: object) -> object:
        for attempt in range(_MARK_TRIES):
            try:
                if self._pool is None:
                    self._pool = await asyncpg.create_pool(
                        os.environ[MARKS_URL],
                        min_size=0,
                        max_size=4,
                        timeout=2,
                        # A mark comes before the effect it speaks of, so it is on disk when that is.
                        server_settings={"application_name": "chaos marks", "synchronous_commit": "off"},
                    )
                return await self._pool.fetchval(query, *values)
            except DATABASE_ERRORS:
                if attempt == _MARK_TRIES - 1:
                    raise
                await asyncio.sleep(_MARK_WAIT_SECONDS)
        raise AssertionError

    @contextlib.asynccontextmanager
    async def around(self, event: Event, db: Connection) -> AsyncIterator[int]:
        """Mark the start and the end of the run that the block is; yields its number."""
        values = (event.id, owner_of(event), event.attempt, db.get_server_pid())
        run = await self._ask(_BEGIN, *values)
        assert isinstance(run, int)
        try:
            yield run
        finally:
            await self._ask(_END, run)


def _fates() -> dict[str, Fate]:
    told: dict[str, str] = json.loads(Path(os.environ[FATES_FILE]).read_text())
    return {event_id: Fate(fate) for event_id, fate in told.items()}


def _tell_tasks(*_: object) -> None:
    for task in asyncio.all_tasks():
        task.print_stack(file=sys.stderr)


die_with_parent()
signal.signal(TELL_TASKS, _tell_tasks)
broken.apply()
_marks = _Marks()
_fate_of = _fates()


@on(*HANDLED)
async def grant_credits(event: Event, db: Connection) -> None:
    """A credit for each event, and then whatever its fate is."""
    async with _marks.around(event, db) as run:
        await db.execute(_GRANT, event.id, owner_of(event), run, event.superseded)
        # Most are quick; now and then one takes long enough for others to run into it.
        rng = random.Random(event.id)
        await asyncio.sleep(rng.choice((0, 0, 0, 0, 0, 0.001, 0.005, 0.03)))
        await _suffer(_fate_of.get(event.id, Fate.plain), event.attempt)


async def _suffer(fate: Fate, attempt: int) -> None:
    match fate:
        case Fate.plain:
            pass
        case Fate.flaky:
            if attempt <= 2:
                raise Poisoned("not yet")
        case Fate.later:
            if attempt == 1:
                raise Retry(after=timedelta(milliseconds=300))
        case Fate.raises:
            raise Poisoned("never")
        case Fate.gives_up:
            raise Bury("never")
        case Fate.hangs:
            await asyncio.Event().wait()
        case Fate.cancels:
            raise asyncio.CancelledError
        case Fate.leaves:
            sys.exit("an old script's habit")
        case Fate.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        case Fate.blocks:
            time.sleep(3600)  # noqa: ASYNC251 - that it blocks is the point
