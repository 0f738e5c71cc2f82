"""The worker: when to take a turn. What is done in one: `kamiyo/turn.py`.

A turn claims a batch of due events (`inbox.claim_since` holds their lanes on this session), and works it off. A worker
takes several at a time, each a hand's, on a connection of its own.

What happens when the process dies at any instruction: the session ends, its transaction is undone, its lanes are
free, and the next claim by anyone finds the events in `processing` with nobody holding them.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import InitVar, dataclass, field
from datetime import datetime, timedelta

import asyncpg

from kamiyo import handlers, inbox, shadow, telemetry, tracing
from kamiyo.database import AWAY, DATABASE_ERRORS, Connection, Pool, listening, reason_of, to_the_end
from kamiyo.handlers import Registry
from kamiyo.reader import Reader
from kamiyo.settings import Settings
from kamiyo.telemetry import happened
from kamiyo.turn import Turns, is_being_cancelled

# A worker is woken by notices; looking by itself is for notices that were lost, and for the dead.
_LOOK_EVERY_SECONDS = 2.0

# What is finished leaves entries in the queue that a look from its beginning has to pass, until a vacuum takes them. So
# looks begin where the last look at everything found the oldest that is due, less what a transaction may take that
# stores an event. Everything is looked at this often, for those that took longer; less often where that takes long, as
# beside a snapshot that somebody holds for an hour, which no vacuum may take anything from.
_LOOK_AT_ALL_EVERY_SECONDS = (1.0, 30.0)
_LOOK_AT_ALL_SHARE = 0.05
_STORING_TAKES = timedelta(seconds=2)

# Other workers are called this often at most while this one has more than it can carry.
_HELP_EVERY_SECONDS = 0.2

# A hand with nothing to do keeps its connection this long: longer than the worker waits to look by itself.
_REST_SECONDS = 3.0

# After an error that nobody thought of: the first pause, and the longest. Each is twice the one before, until a part
# of the worker has gone well for as long as the longest.
_PAUSE_SECONDS = (0.5, 60.0)

_FOLD_EVERY_SECONDS = 5.0
_PARTITIONS_EVERY_SECONDS = 3600.0


@dataclass
class Worker:
    """One worker: any number of them, in any number of processes, share one database."""

    pool: Pool
    url: str
    settings: Settings
    registry: InitVar[Registry | None] = None
    rng: random.Random = field(default_factory=random.Random)
    #: Reads what thin events are about; None: another process does.
    reader: Reader | None = None
    traces: tracing.Traces | None = None

    def __post_init__(self, registry: Registry | None) -> None:
        self._wake = asyncio.Event()
        self._stopping = False
        self._stopped = asyncio.Event()
        # By part: when it went on after an error that nobody thought of, and after what pause.
        self._pauses: dict[str, tuple[float, float]] = {}
        self._hands: set[asyncio.Task[None]] = set()
        self._resting: asyncio.Future[None] | None = None
        self._help = asyncio.Event()
        # How often something may have become due while every hand was busy.
        self._missed = 0
        self._look_at_all_at = 0.0
        # Nothing older is due, unless it was noted since.
        self._queue_begins: datetime | None = None
        self.turns = Turns(
            *(self.settings, handlers.registry if registry is None else registry, self.rng),
            wake=self.wake,
            wake_reader=self._wake_reader,
            traces=self.traces,
        )

    def wake(self) -> None:
        """Something is due: look now."""
        self._wake.set()

    def _wake_reader(self) -> None:
        # Where another process reads, that looks by itself.
        if self.reader is not None:
            self.reader.wake()

    async def run(self) -> None:
        """Work until `stop`, through whatever the database does."""
        async with asyncio.TaskGroup() as tasks:
            parts = {"listening": self._listen, "maintenance": self._maintain}
            if self.reader is not None:
                parts["reader"] = self.reader.run
            watching = [tasks.create_task(self._keep_at(part, work)) for part, work in parts.items()]
            while not self._stopping:
                self._wake.clear()
                if self._resting is not None and not self._resting.done():
                    self._resting.set_result(None)
                elif len(self._hands) < self.settings.worker_concurrency:
                    hand = asyncio.create_task(self._lend_a_hand())
                    self._hands.add(hand)
                    hand.add_done_callback(self._hands.discard)
                else:
                    # Something may be due, and every hand is busy: another process may have one free. Here, a hand that
                    # is just looking may have looked too early.
                    self._missed += 1
                    self._help.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_EVERY_SECONDS):
                        await self._wake.wait()
            for task in watching:
                task.cancel()
        if self._hands:
            await asyncio.wait(self._hands)

    def stop(self) -> None:
        """Finish the events being handled, give the rest back, and let `run` return."""
        self._stopping = self.turns.stopping = True
        self._stopped.set()
        self._wake.set()
        if self._resting is not None and not self._resting.done():
            self._resting.set_result(None)

    def abandon(self) -> None:
        """The grace is over: give up what is still being handled; its effects are undone, and it runs again."""
        for hand in self._hands:
            hand.cancel()

    async def run_once(self, db: Connection) -> int:
        """Claim a batch, handle it, settle it; return how many events it had. `db` must not be in a transaction."""
        number, batch = await inbox.claim(db, self.turns.fitting(), self.turns.registry.types())
        try:
            if batch:
                await self.turns.work(db, number, batch)
        finally:
            if not db.is_closed():
                await to_the_end(inbox.unlock(db))
        return len(batch)

    async def _keep_at(self, part: str, work: Callable[[], Awaitable[None]]) -> None:
        while not self._stopping:
            async with self._unharmed(part):
                await work()

    @contextlib.asynccontextmanager
    async def _unharmed(self, part: str) -> AsyncIterator[None]:
        # An error that nobody thought of must not end the other parts, nor be passed over: it is told each time, and
        # what does not get done for it shows as events or maintenance that are overdue.
        try:
            yield
        except (Exception, asyncio.CancelledError) as error:
            # Nobody cancels a part but to stop it; what comes from within would end it unseen.
            if isinstance(error, asyncio.CancelledError) and is_being_cancelled():
                raise
            telemetry.WORKER_ERRORS.labels(part).inc()
            happened("worker_failed", part=part, error=type(error).__name__, place=telemetry.place_of(error))
            await self._pause_after_error(part)

    async def _pause_after_error(self, part: str) -> None:
        first, longest = _PAUSE_SECONDS
        went_on, last = self._pauses.get(part, (0.0, 0.0))
        pause = min(2 * last, longest) if last and time.monotonic() - went_on < longest else first
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause * self.rng.uniform(0.8, 1.2)):
                await self._stopped.wait()
        self._pauses[part] = (time.monotonic(), pause)

    async def _lend_a_hand(self) -> None:
        async with self._unharmed("turn"):
            await self._take_turns()

    async def _take_turns(self) -> None:
        try:
            async with self.pool.acquire(timeout=10) as db:
                await db.execute(_NOTICE_MY_DEATH)
                while True:
                    due_in = await self._until_idle(db)
                    if due_in is not None and 0 < due_in < _LOOK_EVERY_SECONDS:
                        asyncio.get_running_loop().call_later(due_in, self._wake.set)
                    if not await self._rest() or db.is_closed():
                        break
        except DATABASE_ERRORS as error:
            # What was claimed is undone, and found again by whoever looks next.
            happened("worker_turn_failed", error=type(error).__name__)
            if isinstance(error, asyncpg.OutOfMemoryError):
                # PostgreSQL's table of locks is full (max_locks_per_transaction): the next turns hold fewer lanes.
                self.turns.fewer()
                asyncio.get_running_loop().call_later(0.1, self._wake.set)
            await asyncio.sleep(self.rng.uniform(0.1, 0.5))

    async def _rest(self) -> bool:
        """Wait for more, with the connection at the ready; False where another hand does, or nothing comes."""
        if self._stopping or (self._resting is not None and not self._resting.done()):
            return False
        self._resting = asyncio.get_running_loop().create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REST_SECONDS):
                await self._resting
        self._resting.cancel()
        return not self._stopping

    async def _until_idle(self, db: Connection) -> float | None:
        """Turn after turn until nothing can be taken; return in how many seconds something is due."""
        holding = True
        try:
            while not self._stopping:
                most, missed = self.turns.fitting(), self._missed
                taken = await self._claim(db, most)
                if not taken.events and self._missed != missed:
                    continue
                if not taken.events:
                    holding = False
                    return taken.due_in
                if len(taken.events) == most:
                    # More may be due than one hand can carry.
                    self._wake.set()
                await self.turns.work(db, taken.number, taken.events)
            return None
        finally:
            if holding and not db.is_closed():
                await to_the_end(inbox.unlock(db))

    async def _claim(self, db: Connection, most: int) -> inbox.Taken:
        began, (often, seldom) = time.monotonic(), _LOOK_AT_ALL_EVERY_SECONDS
        if began < self._look_at_all_at:
            return await inbox.claim_since(db, self._queue_begins, most, self.turns.registry.types())
        # Meanwhile the other hands look from where the queue began before.
        self._look_at_all_at = next_time = began + often
        taken = await inbox.claim_since(db, None, most, self.turns.registry.types())
        if self._look_at_all_at == next_time:  # no other hand has looked at everything since
            seconds = (time.monotonic() - began) / _LOOK_AT_ALL_SHARE
            self._look_at_all_at = began + min(max(seconds, often), seldom)
            self._queue_begins = taken.first_due - _STORING_TAKES
        return taken

    async def _listen(self) -> None:
        away = False
        # Not for ever: a stop may come while a connection is closed, which hears nothing of it.
        while not self._stopping:
            try:
                async with listening(self.url, self.wake) as db:
                    if away:
                        happened("database_back")
                    away = False
                    self.wake()
                    while not self._stopping and not db.is_closed():
                        # Notices come by themselves; asking now and then finds out that nobody is there to send them.
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(5):
                                await self._help.wait()
                        if self._help.is_set():
                            # Before it is sent: what is asked for meanwhile is sent for as well.
                            self._help.clear()
                            await inbox.notify(db)
                            await asyncio.sleep(_HELP_EVERY_SECONDS)
                        else:
                            await db.execute("SELECT 1", timeout=5)
            except AWAY as error:
                if not away:
                    happened("database_away", error=type(error).__name__, reason=reason_of(error))
                away = True
                telemetry.QUEUE.numbers["database_up"] = 0
                await asyncio.sleep(self.rng.uniform(0.2, 1.0))

    async def _maintain(self) -> None:
        partitions_at = 0.0
        while not self._stopping:
            try:
                async with self.pool.acquire(timeout=10) as db:
                    # As long as PostgreSQL waits between two questions: see `database.open_pool`.
                    silent = await inbox.end_silent(db, self.settings.handler_timeout + self.settings.idle_limit)
                    if silent:
                        happened("silent_sessions_ended", count=silent)
                        self.wake()
                    await inbox.fold_counts(db)
                    await shadow.prune(db)
                    queue = await inbox.queue(db)
                    telemetry.QUEUE.numbers = {**{name: float(n) for name, n in queue.items()}, "database_up": 1.0}
                    if time.monotonic() >= partitions_at:
                        await inbox.ensure_partitions(db)
                        await inbox.prune_tombstones(db)
                        partitions_at = time.monotonic() + _PARTITIONS_EVERY_SECONDS
            except DATABASE_ERRORS as error:
                happened("maintenance_failed", error=type(error).__name__)
            await asyncio.sleep(self.rng.uniform(0.8, 1.2) * _FOLD_EVERY_SECONDS)


# A worker that dies while a handler's query runs would hold its lanes until that query ends, which may be never: only
# when asked does PostgreSQL look, in between, whether anybody still waits for the answer. Where its platform cannot
# (PostgreSQL 14 outside Linux, Windows), it refuses the setting, and the query's end has to do.
_NOTICE_MY_DEATH = """
DO $$ BEGIN
    PERFORM set_config('client_connection_check_interval', '1s', false);
EXCEPTION WHEN others THEN NULL;
END $$
"""
