"""The worker: claim, handle, settle. One turn is a function; the loop only decides when to take the next.

A turn claims a batch of due events (`inbox.claim` holds their lanes on this session), brings the billing tables up to
date for all of them at once, runs the user's handlers one by one, each inside a savepoint, and settles every event,
well or badly ended, in that same transaction.

A thin event only names its object. It is put aside until a reader has read that (`kamiyo/reader.py`), and comes back
with it. A snapshot and its thin twin tell one occurrence: of the two, one runs the handlers.

What happens when the process dies at any instruction: the session ends, its transaction is undone, its lanes are
free, and the next claim by anyone finds the events in `processing` with nobody holding them. From then on each of
them runs alone, its try counted before it starts, so that the one that kills is told from its neighbours and is
dead after five tries.
"""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import asyncpg

from kamiyo import handlers, inbox, mirror, projections, reads, retry, shadow, telemetry, ties, tracing
from kamiyo.database import DATABASE_ERRORS, Connection, Pool, listening, reason_of, to_the_end
from kamiyo.errors import DatabaseUnavailable, KamiyoError
from kamiyo.event import Event, lane_of
from kamiyo.handlers import Bury, PayloadGone, Registry, Retry, WorkerDied
from kamiyo.inbox import Claimed, ClaimLost, Outcome, Settled, Status, Twin
from kamiyo.projections import ProjectionError, Row
from kamiyo.reader import Reader
from kamiyo.settings import Settings
from kamiyo.telemetry import happened, happened_to_each

#: Events of one transaction when handlers run in it. Each takes a savepoint, and PostgreSQL keeps the first 64 of a
#: transaction in memory (PGPROC_MAX_CACHED_SUBXIDS); beyond that every other session's look at a row gets dearer.
MOST_HANDLED_TOGETHER = 50

# A turn that takes longer gives back what it has not begun, and the next ones claim less: while handlers are slow, the
# other customers of a batch are for other hands to take.
_TURN_SECONDS = 0.25

# How long an event whose twin is being handled elsewhere is left alone.
_TWIN_SECONDS = 1.0

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

_AWAY: tuple[type[BaseException], ...] = (*DATABASE_ERRORS, DatabaseUnavailable)

# After an error that nobody thought of: the first pause, and the longest. Each is twice the one before, until a part
# of the worker has gone well for as long as the longest.
_PAUSE_SECONDS = (0.5, 60.0)

_FOLD_EVERY_SECONDS = 5.0
_PARTITIONS_EVERY_SECONDS = 3600.0


class TransactionEnded(KamiyoError):
    """A handler said COMMIT or ROLLBACK on the connection it was lent: nothing can be settled with its effects."""


@dataclass(slots=True)
class _Trial:
    """One event on its way through a chunk."""

    claimed: Claimed
    attempt: int
    row: Row | None = None
    error: BaseException | None = None
    outcome: Outcome = Outcome.ignored
    seconds: float = 0.0
    superseded: bool = False
    untried: bool = False
    # Its twin's handlers are running elsewhere: what comes of that decides.
    waits_for_twin: bool = False
    # Its twin's handlers have run.
    paired: bool = False
    trace: tracing.Try | None = None

    @property
    def event(self) -> Event:
        return self.claimed.event


@dataclass
class Worker:
    """One worker: any number of them, in any number of processes, share one database."""

    pool: Pool
    url: str
    settings: Settings
    registry: Registry = field(default_factory=lambda: handlers.registry)
    rng: random.Random = field(default_factory=random.Random)
    #: Reads what thin events are about; None: another process does.
    reader: Reader | None = None
    traces: tracing.Traces | None = None

    def __post_init__(self) -> None:
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
        self._slow: set[str] = set()
        self._mirrored = self.settings.mirrored
        # Seconds an event takes, lately. Begins as if a whole batch fitted into a turn.
        self._pace = _TURN_SECONDS / self.settings.worker_batch

    # ── When ────────────────────────────────────────────────────────────────────────────────────────────────────

    def wake(self) -> None:
        """Something is due: look now."""
        self._wake.set()

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
        self._stopping = True
        self._stopped.set()
        self._wake.set()
        if self._resting is not None and not self._resting.done():
            self._resting.set_result(None)

    def abandon(self) -> None:
        """The grace is over: give up what is still being handled; its effects are undone, and it runs again."""
        for hand in self._hands:
            hand.cancel()

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
            if isinstance(error, asyncio.CancelledError) and _is_being_cancelled():
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
                    due_in = await self._turns(db)
                    if due_in is not None and 0 < due_in < _LOOK_EVERY_SECONDS:
                        asyncio.get_running_loop().call_later(due_in, self._wake.set)
                    if not await self._rest() or db.is_closed():
                        break
        except DATABASE_ERRORS as error:
            # What was claimed is undone, and found again by whoever looks next.
            happened("worker_turn_failed", error=type(error).__name__)
            if isinstance(error, asyncpg.OutOfMemoryError):
                # PostgreSQL's table of locks is full (max_locks_per_transaction): the next turns hold fewer lanes.
                self._pace = min(2 * self._pace, _TURN_SECONDS)
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

    async def _turns(self, db: Connection) -> float | None:
        """Turn after turn until nothing can be taken; return in how many seconds something is due."""
        holding = True
        try:
            while not self._stopping:
                most, missed = self._fitting(), self._missed
                taken = await self._claim(db, most)
                if not taken.events and self._missed != missed:
                    continue
                if not taken.events:
                    holding = False
                    return taken.due_in
                if len(taken.events) == most:
                    # More may be due than one hand can carry.
                    self._wake.set()
                await self._work(db, taken.number, taken.events)
            return None
        finally:
            if holding and not db.is_closed():
                await to_the_end(inbox.unlock(db))

    async def _claim(self, db: Connection, most: int) -> inbox.Taken:
        began, (often, seldom) = time.monotonic(), _LOOK_AT_ALL_EVERY_SECONDS
        if began < self._look_at_all_at:
            return await inbox.claim_since(db, self._queue_begins, most, self.registry.types())
        # Meanwhile the other hands look from where the queue began before.
        self._look_at_all_at = next_time = began + often
        taken = await inbox.claim_since(db, None, most, self.registry.types())
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
            except _AWAY as error:
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

    # ── One turn ────────────────────────────────────────────────────────────────────────────────────────────────

    async def run_once(self, db: Connection) -> int:
        """Claim a batch, handle it, settle it; return how many events it had. `db` must not be in a transaction."""
        number, batch = await inbox.claim(db, self._fitting(), self.registry.types())
        try:
            if batch:
                await self._work(db, number, batch)
        finally:
            if not db.is_closed():
                await to_the_end(inbox.unlock(db))
        return len(batch)

    def _fitting(self) -> int:
        """Events that fit into a turn, at the pace of late."""
        fitting = int(_TURN_SECONDS / self._pace) if self._pace else self.settings.worker_batch
        return max(1, min(fitting, self.settings.worker_batch))

    async def _work(self, db: Connection, number: int, batch: Sequence[Claimed]) -> None:
        fit = []
        for claimed in batch:
            if claimed.abandoned and claimed.was_running:
                await self._record_death(db, number, claimed)
            elif not claimed.body_kept:
                await self._fail_alone(db, number, claimed, PayloadGone("its body was removed by retention"))
            else:
                fit.append(claimed)
        fit = await self._ready_or_alone(db, number, fit)
        began = time.perf_counter()
        tried = 0
        for chunk in self._chunks(fit):
            if self._stopping or (tried and time.perf_counter() - began > _TURN_SECONDS):
                await _give_back(db, number, [claimed.event.id for claimed in chunk])
                continue
            try:
                tried += await self._run_chunk(db, number, chunk)
                self._pace = (self._pace + (time.perf_counter() - began) / max(tried, 1)) / 2
            except ClaimLost as error:
                happened("claim_lost", reason=str(error))
            except asyncio.CancelledError:
                # Where nobody asked this worker to stop, a handler has cancelled the worker's own task. That is left
                # behind as a death is: the next claim takes them one by one, and the one that did it is found.
                if self._stopping and not db.is_closed():
                    await to_the_end(inbox.release(db, number, [claimed.event.id for claimed in fit]))
                raise

    async def _ready_or_alone(self, db: Connection, number: int, batch: Sequence[Claimed]) -> list[Claimed]:
        """`_ready`, past an error that nobody thought of: the one event that is not to be made ready has failed."""
        try:
            return await self._ready(db, number, batch)
        except ClaimLost:
            raise
        except Exception as error:
            if isinstance(error, _AWAY):
                raise
            if len(batch) == 1:
                await self._fail_alone(db, number, batch[0], error)
                return []
        return [one for claimed in batch for one in await self._ready_or_alone(db, number, [claimed])]

    async def _ready(self, db: Connection, number: int, batch: Sequence[Claimed]) -> list[Claimed]:
        """The batch without the thin events that are told by their twins, or must be read first; the others with what
        was read."""
        thin = [claimed for claimed in batch if claimed.event.thin]
        if not thin:
            return list(batch)
        told = await inbox.twins(db, {c.event.occurrence for c in thin if c.event.snapshot_event})
        paired = [c for c in thin if self._is_told(c.event, told.get(c.event.occurrence, ()))]
        if paired:
            await self._settle_paired(db, number, paired)
        done = {c.event.id for c in paired}
        to_read = [c for c in thin if c.event.id not in done and self._is_to_be_read(c.event)]
        known = await _known(db, to_read)
        waiting = [event_id for event_id, read in known.items() if read is None]
        if waiting:
            await inbox.await_read(db, number, waiting)
            if self.reader is not None:
                self.reader.wake()
        moved = await self._move(db, number, [(c, found) for c in to_read if (found := known[c.event.id])])
        done |= moved.keys()
        left = [c for c in batch if c.event.id not in done and known.get(c.event.id, c) is not None]
        return [_with_read(c, known.get(c.event.id)) for c in left]

    async def _move(
        self, db: Connection, number: int, batch: Sequence[tuple[Claimed, reads.Found]]
    ) -> dict[str, tuple[str, int]]:
        """Give back, into their customer's lane, those that turned out to be of a customer whose lane is another."""
        moved = {}
        for claimed, found in batch:
            event = claimed.event
            customer = None if event.customer else reads.customer_of(found.read)
            if customer is not None and lane_of(event.account, customer) != claimed.lane:
                moved[event.id] = customer, lane_of(event.account, customer)
        if moved:
            await inbox.move(db, number, moved)
            self._wake.set()
        return moved

    async def _settle_paired(self, db: Connection, number: int, batch: Sequence[Claimed]) -> None:
        trials = [_Trial(c, min(c.attempts + 1, retry.MAX_ATTEMPTS), outcome=Outcome.paired) for c in batch]
        with contextlib.suppress(ClaimLost):
            await inbox.succeed(db, number, [Settled(t.event.id, t.outcome, t.attempt, 0) for t in trials])
            self._tell(trials)

    def _is_told(self, event: Event, twins: Sequence[Twin]) -> bool:
        """Whether the snapshot of this thin event has done already whatever this one could do."""
        return any(
            twin.event_id == event.snapshot_event
            and twin.status is Status.processed
            and (twin.outcome is Outcome.handled or not self.registry.of(event.type))
            for twin in twins
        )

    def _is_to_be_read(self, event: Event) -> bool:
        handled = bool(self.registry.of(event.type))
        return self.settings.may_read(event.account, livemode=event.livemode) and reads.wanted(event, handled=handled)

    def _handlers_of(self, event: Event) -> tuple[handlers.Handler, ...]:
        # A thin event whose object cannot be read, or is not there, shows nothing: only who asked for exactly that gets
        # it. A handler that was written for snapshots would take nothing for something.
        if event.thin and not event.read:
            return self.registry.exactly(event.type)
        return self.registry.of(event.type)

    def _chunks(self, batch: Sequence[Claimed]) -> Iterator[list[Claimed]]:
        # Suspects and slow ones run alone. Their customer's other events keep their place in line, so the lane goes
        # through alone as a whole; the other lanes go together, first.
        apart = {claimed.lane for claimed in batch if claimed.suspect or claimed.event.type in self._slow}
        together = [claimed for claimed in batch if claimed.lane not in apart]
        handled = any(self._handlers_of(claimed.event) for claimed in together)
        size = MOST_HANDLED_TOGETHER if handled else max(len(together), 1)
        for start in range(0, len(together), size):
            yield together[start : start + size]
        for claimed in batch:
            if claimed.lane in apart:
                yield [claimed]

    async def _run_chunk(self, db: Connection, number: int, chunk: Sequence[Claimed]) -> int:
        """Handle and settle a chunk in one transaction; return how many of it were tried, the rest being given back."""
        trials = [_Trial(claimed, claimed.attempts + 1) for claimed in chunk]
        if self.traces is not None:
            self._trace(trials, number)
        alone = len(trials) == 1 and (chunk[0].suspect or bool(self._handlers_of(trials[0].event)))
        if alone and not chunk[0].started:
            await inbox.start(db, number, trials[0].event.id, trials[0].attempt)
        try:
            async with db.transaction():
                await self._apply(db, number, trials)
        except ClaimLost:
            raise
        except Exception as error:
            # The database refused something in the batch that looked right from here, or an event holds what nobody
            # thought of. Together they cannot pass, so each goes alone, and only the one that cannot has failed.
            if db.is_closed():
                raise
            if isinstance(error, TimeoutError) and await projections.are_held(db):
                # The tables are being made again, and that takes longer than an answer may: nobody's fault.
                await _give_back(db, number, [trial.event.id for trial in trials])
            elif len(trials) == 1:
                await self._settle_refused(db, number, trials[0], error)
            else:
                happened("batch_taken_apart", count=len(trials))
                for claimed in chunk:
                    await self._run_chunk(db, number, [claimed])
            return len(trials)
        tried = [trial for trial in trials if not trial.untried and not trial.waits_for_twin]
        self._tell(tried)
        return len(tried)

    async def _apply(self, db: Connection, number: int, trials: Sequence[_Trial]) -> None:
        began = time.perf_counter()
        # Before anything is written: where twins are in two lanes, the other's worker holds the row.
        await self._pair(db, [trial for trial in trials if self._handlers_of(trial.event)])
        await _project(db, [trial for trial in trials if not trial.waits_for_twin], self._mirrored)
        share = (time.perf_counter() - began) / len(trials)
        if self.traces is not None:
            for trial in trials:
                if trial.trace and trial.row is not None:
                    trial.trace.projected()
        savepoint = False
        handled: set[str] = set()
        for at, trial in enumerate(trials):
            trial.seconds = share
            # Their billing rows are written, which is true anyway; their handlers are for another turn.
            trial.untried = at > 0 and time.perf_counter() - began > _TURN_SECONDS
            if trial.untried or trial.waits_for_twin:
                continue
            wanted = self._handlers_of(trial.event)
            if trial.paired or (wanted and trial.event.occurrence in handled):
                trial.outcome = Outcome.paired
            elif wanted and trial.error is None:
                # One round trip keeps the last handler's effects and opens the way back for this one.
                await db.execute(_NEXT_SAVEPOINT if savepoint else _FIRST_SAVEPOINT)
                savepoint = True
                await self._handle(db, trial, wanted)
                if trial.error is None:
                    handled.add(trial.event.occurrence)
        waiting = [trial.event.id for trial in trials if trial.waits_for_twin]
        if waiting:
            await inbox.release(db, number, waiting, due_in=_TWIN_SECONDS)
        untried = [trial.event.id for trial in trials if trial.untried]
        if untried:
            await _give_back(db, number, untried)
        trials = [trial for trial in trials if not trial.untried and not trial.waits_for_twin]
        well = [trial for trial in trials if trial.error is None]
        if self.traces is not None:
            for trial in trials:
                if trial.trace:
                    trial.trace.settling()
        if well:
            settled = [Settled(t.event.id, t.outcome, t.attempt, int(t.seconds * 1e6)) for t in well]
            await inbox.succeed(db, number, settled)
        for trial in trials:
            if trial.error is not None:
                await self._record(db, number, trial)

    async def _pair(self, db: Connection, trials: Sequence[_Trial]) -> None:
        """Find out which of these events, all with handlers, leave the handlers to their twin.

        Both kinds take the occurrence's lock before they look, so that of two workers one sees the other. A snapshot
        that knows of no twin needs none: a twin that is stored later sees the snapshot in work.
        """
        told = await inbox.twins(db, [trial.event.occurrence for trial in trials]) if trials else {}
        pairs = [
            trial
            for trial in trials
            if any(twin.event_id != trial.event.id for twin in told.get(trial.event.occurrence, ()))
            or trial.event.snapshot_event
        ]
        if not pairs:
            return
        ours = await inbox.try_occurrences(db, [trial.event.occurrence for trial in pairs])
        # Looked up again: what the holder of a lock left behind is seen only by whoever looks after it.
        told = await inbox.twins(db, ours)
        here = {trial.event.id for trial in trials}
        for trial in pairs:
            others = [twin for twin in told.get(trial.event.occurrence, ()) if twin.event_id != trial.event.id]
            if trial.event.occurrence not in ours:
                trial.waits_for_twin = True
            elif any(twin.outcome is Outcome.handled for twin in others):
                trial.paired = True
            elif trial.event.thin:
                trial.waits_for_twin = any(
                    not twin.thin and twin.status is Status.processing and twin.event_id not in here for twin in others
                )

    async def _handle(self, db: Connection, trial: _Trial, wanted: Sequence[handlers.Handler]) -> None:
        began = time.perf_counter()
        event = replace(trial.event, superseded=trial.superseded, attempt=trial.attempt)
        try:
            for at, handler in enumerate(wanted):
                if at:
                    # PostgreSQL ends a session that is silent for longer than one handler may be.
                    await db.execute("SELECT 1")
                with trial.trace.handling(_name_of(handler)) if trial.trace else _UNTRACED:
                    await handlers.run(db, event, [handler], timeout=self.settings.handler_timeout)
            trial.outcome = Outcome.handled
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            # Raised by the handler, it is an error like any other; sent to this task, it means to stop.
            if isinstance(error, asyncio.CancelledError) and _is_being_cancelled():
                raise
            await db.execute(_BACK_TO_SAVEPOINT)
            trial.error = error
        if not db.is_in_transaction():
            raise TransactionEnded("a handler ended the transaction that its event is settled in")
        took = time.perf_counter() - began
        trial.seconds += took
        # A slow handler must not make the other customers of its batch wait, the next time.
        (self._slow.add if took > 0.02 else self._slow.discard)(trial.event.type)

    # ── Badly ended ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _record(self, db: Connection, number: int, trial: _Trial) -> None:
        error = trial.error
        assert error is not None  # noqa: S101 - the callers ask only for failed trials
        await inbox.fail(
            *(db, number, trial.event.id, handlers.failure_of(error)),
            attempt=trial.attempt,
            retry_in=self._retry_in(error, trial.attempt),
            microseconds=int(trial.seconds * 1e6),
        )

    def _retry_in(self, error: BaseException, attempt: int) -> float | None:
        if isinstance(error, Bury | PayloadGone):
            return None
        wait = retry.delay_after(attempt, self.rng, first=self.settings.first_retry_delay)
        return error.after if isinstance(error, Retry) and wait is not None else wait

    async def _settle_refused(self, db: Connection, number: int, trial: _Trial, error: Exception) -> None:
        # The refusal undid the billing row as well. It is true whatever the handler came to, so it is written again;
        # unless it is what was refused.
        trial.error = trial.error or error
        try:
            async with db.transaction():
                await _project(db, [trial], self._mirrored)
                await self._record(db, number, trial)
        except ClaimLost:
            raise
        except Exception:
            if db.is_closed():
                raise
            await self._record(db, number, trial)
        self._tell([trial])

    async def _fail_alone(self, db: Connection, number: int, claimed: Claimed, error: BaseException) -> None:
        trial = _Trial(claimed, min(claimed.attempts + 1, retry.MAX_ATTEMPTS), error=error)
        self._trace([trial], number)
        with contextlib.suppress(ClaimLost):
            await self._record(db, number, trial)
            self._tell([trial])

    async def _record_death(self, db: Connection, number: int, claimed: Claimed) -> None:
        # The try was counted when it began.
        trial = _Trial(claimed, max(claimed.attempts, 1), error=WorkerDied("the worker process died while handling it"))
        self._trace([trial], number)
        happened("worker_death_found", event_id=claimed.event.id, attempt=trial.attempt)
        with contextlib.suppress(ClaimLost):
            await self._record(db, number, trial)
            self._tell([trial])
            await self._project_after(db, trial)

    async def _project_after(self, db: Connection, trial: _Trial) -> None:
        # The death undid the billing row as well, and the row is true whatever becomes of the handler. After the
        # record and apart from it: if it is this that kills, that has been counted.
        try:
            async with db.transaction():
                if trial.event.thin and self._is_to_be_read(trial.event):
                    known = await _known(db, [trial.claimed])
                    trial.claimed = _with_read(trial.claimed, known[trial.event.id])
                await _project(db, [trial], self._mirrored)
        except Exception:
            if db.is_closed():
                raise

    def _trace(self, trials: Sequence[_Trial], number: int) -> None:
        if self.traces is not None:
            for trial in trials:
                trial.trace = self.traces.trying(trial.event.id, trial.event.type, number, trial.attempt)

    # ── Told after the commit, so that nothing is counted that was undone ────────────────────────────────────────

    def _tell(self, trials: Sequence[_Trial]) -> None:
        well = [trial for trial in trials if trial.error is None]
        if well:
            happened_to_each("event_processed", (_said_of(trial) for trial in well))
        for trial in trials:
            label = telemetry.label(trial.event.type)
            telemetry.DURATION.labels(label).observe(trial.seconds)
            if trial.error is None:
                telemetry.EVENTS.labels(label, "processed").inc()
                if trial.trace:
                    trial.trace.ended(trial.outcome.value)
                continue
            failure = handlers.failure_of(trial.error)
            if trial.trace:
                trial.trace.ended("failed", failure.error_type, failure.fingerprint)
            facts = _said_of(trial) | {"error": failure.error_type, "fingerprint": failure.fingerprint}
            if self._retry_in(trial.error, trial.attempt) is None:
                telemetry.EVENTS.labels(label, "failed").inc()
                telemetry.DEAD.labels(label).inc()
                happened("event_died", **facts)
            else:
                telemetry.RETRIES.labels(label).inc()
                happened("try_failed", **facts)


_UNTRACED = contextlib.nullcontext()


def _name_of(handler: handlers.Handler) -> str:
    return getattr(handler, "__qualname__", "handler")


def _said_of(trial: _Trial) -> dict[str, str | int | float]:
    event = trial.event
    took = round(trial.seconds * 1000, 3)
    return {"event_id": event.id, "event_type": event.type, "attempt": trial.attempt, "took_ms": took}


# A worker that dies while a handler's query runs would hold its lanes until that query ends, which may be never: only
# when asked does PostgreSQL look, in between, whether anybody still waits for the answer. Where its platform cannot
# (PostgreSQL 14 outside Linux, Windows), it refuses the setting, and the query's end has to do.
_NOTICE_MY_DEATH = """
DO $$ BEGIN
    PERFORM set_config('client_connection_check_interval', '1s', false);
EXCEPTION WHEN others THEN NULL;
END $$
"""
_FIRST_SAVEPOINT = "SAVEPOINT handler"
_NEXT_SAVEPOINT = "RELEASE SAVEPOINT handler; SAVEPOINT handler"
_BACK_TO_SAVEPOINT = "ROLLBACK TO SAVEPOINT handler"


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _project(db: Connection, trials: Sequence[_Trial], mirrored: frozenset[str]) -> None:
    """Bring the billing tables up to date with all of `trials`, and note how each event stands to its row."""
    shown = []
    for trial in trials:
        try:
            read = trial.claimed.read
            trial.row = (
                projections.row_of_read(read) if read else projections.row_of(trial.event, trial.claimed.received)
            )
            if mirrored and mirror.wants(trial.event, mirrored):
                shown.append(mirror.state_of(trial.event, trial.claimed.received, trial.row))
                trial.outcome = Outcome.projected
        except ProjectionError as error:
            trial.error = trial.error or error
        if trial.row is not None:
            trial.outcome = Outcome.projected
    told = [(trial.event, trial.row) for trial in trials if trial.row is not None]
    superseded = await ties.project(db, told)
    for trial in trials:
        trial.superseded = trial.row is not None and trial.row.event_id in superseded
    await mirror.project(db, [state for state in shown if state is not None], mirrored)


async def _give_back(db: Connection, number: int, event_ids: Sequence[str]) -> None:
    await inbox.release(db, number, event_ids)
    happened_to_each("claim_given_back", ({"event_id": event_id} for event_id in event_ids))


async def _known(db: Connection, thin: Sequence[Claimed]) -> dict[str, reads.Found | None]:
    """What Stripe has said of the objects of these thin events, by the event's id; None: it must be asked."""
    stored = await projections.reads_of(db, {reads.key_of(c.event) for c in thin}) if thin else {}
    return {c.event.id: reads.for_event(c.event, c.second, stored.get(reads.key_of(c.event), ())) for c in thin}


def _with_read(claimed: Claimed, found: reads.Found | None) -> Claimed:
    if found is None:
        return claimed
    event = claimed.event
    body = found.body
    if not body and projections.ends(event):
        # Of what is gone, and was said to be, a handler sees what Stripe answers where it still answers for such.
        body = json.dumps({"id": event.object_id, "object": event.object_type, "deleted": True}).encode()
    return replace(claimed, event=replace(event, read=body), read=found.read)
