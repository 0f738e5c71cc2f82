"""What goes on behind the pages: replays that a person began, and a look at the backlog every minute."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from kamiyo import inbox
from kamiyo.database import DATABASE_ERRORS
from kamiyo.inbox import Filters, Status
from kamiyo.telemetry import happened
from kamiyo.web.dashboard import queries
from kamiyo.web.system import System

# Often enough that no minute is missed; the database keeps one look a minute, whoever takes it.
_LOOK_EVERY_SECONDS = 20.0
_TELL_EVERY_SECONDS = 0.5

#: A replay that nobody has heard of for so long has lost its process.
SILENT_SECONDS = 15.0


@dataclass
class Background:
    """The tasks of one running system; `running` starts and ends them."""

    system: System
    _replays: set[asyncio.Task[None]] = field(default_factory=set)

    async def replay(self, fingerprint: str) -> int:
        """Begin to put every failed event with this fingerprint back in line; return the replay's number.

        It goes on when the caller has gone. How far it is stands in the database, for whichever process is asked.
        """
        async with self.system.pool.acquire(timeout=5) as db:
            total = await inbox.count_matching(db, Filters(status=Status.failed), fingerprint)
            number = await queries.begin_replay(db, fingerprint, total)
        task = asyncio.create_task(self._replay(number, fingerprint), name=f"replay {number}")
        self._replays.add(task)
        task.add_done_callback(self._replays.discard)
        return number

    async def _replay(self, number: int, fingerprint: str) -> None:
        done, stopped_by = 0, None

        def hear(so_far: int) -> None:
            nonlocal done
            done = so_far

        async def tell() -> None:
            while True:
                await asyncio.sleep(_TELL_EVERY_SECONDS)
                with contextlib.suppress(*DATABASE_ERRORS):
                    async with self.system.pool.acquire(timeout=5) as db:
                        await queries.tell_replay(db, number, done)

        telling = asyncio.create_task(tell())
        try:
            async with self.system.pool.acquire(timeout=5) as db:
                done = await inbox.replay(db, Filters(status=Status.failed), fingerprint, progress=hear)
        except DATABASE_ERRORS as error:
            stopped_by = type(error).__name__
        finally:
            telling.cancel()
        happened("events_retried", count=done, fingerprint=fingerprint)
        # If that cannot be written down either, its silence says so.
        with contextlib.suppress(*DATABASE_ERRORS):
            async with self.system.pool.acquire(timeout=5) as db:
                await queries.end_replay(db, number, done, stopped_by)

    async def _look(self) -> None:
        while True:
            # The worker's own maintenance would be nearer, but the watcher should not be the watched: while no worker
            # is up the backlog grows, and that is when somebody wants to see it.
            with contextlib.suppress(*DATABASE_ERRORS):
                async with self.system.pool.acquire(timeout=5) as db:
                    await queries.sample_backlog(db)
            await asyncio.sleep(random.uniform(0.8, 1.2) * _LOOK_EVERY_SECONDS)  # noqa: S311 - spreads load

    async def end(self) -> None:
        """Stop the replays where they are: what is back in line stays there, the rest stays failed."""
        for task in self._replays:
            task.cancel()
        await asyncio.gather(*self._replays, return_exceptions=True)


@contextlib.asynccontextmanager
async def running(system: System) -> AsyncIterator[Background]:
    """Run what belongs behind the pages of `system`, while the block runs."""
    background = Background(system)
    looking = asyncio.create_task(background._look(), name="backlog")
    try:
        yield background
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await background.end()
