"""A turn: what becomes of a batch of claimed events.

The billing tables are brought up to date for all of them at once, the user's handlers run one by one, each inside a
savepoint, and every event is settled, well or badly ended, in that same transaction.

A thin event only names its object. It is put aside until a reader has read that (`kamiyo/reader.py`), and comes back
with it. A snapshot and its thin twin tell one occurrence: of the two, one runs the handlers.

An event that was in the hands of a worker when that died runs alone, its try counted before it starts, so that the
one that kills is told from its neighbours and is dead after five tries.
"""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from kamiyo import handlers, inbox, mirror, projections, reads, retry, telemetry, ties, tracing
from kamiyo.database import AWAY, Connection, to_the_end
from kamiyo.errors import KamiyoError
from kamiyo.event import Event, lane_of
from kamiyo.handlers import Bury, PayloadGone, Registry, Retry, WorkerDied
from kamiyo.inbox import Claimed, ClaimLost, Outcome, Settled, Status, Twin
from kamiyo.projections import ProjectionError, Row
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


class TransactionEnded(KamiyoError):
    """A handler said COMMIT or ROLLBACK on the connection it was lent: nothing can be settled with its effects."""


@dataclass(slots=True)
class _Trial:
    """One event on its way through a chunk."""

    claimed: Claimed
    attempt: int
    wanted: tuple[handlers.Handler, ...] = ()
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
class Turns:
    """The turns of one worker: each works off a batch, and what it learns of how long events take is for the next."""

    settings: Settings
    registry: Registry
    rng: random.Random
    #: Called when something was made due.
    wake: Callable[[], None]
    #: Called when thin events wait for the reader.
    wake_reader: Callable[[], None]
    traces: tracing.Traces | None = None
    #: Set once the worker stops: events that were not begun are given back.
    stopping: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._slow: set[str] = set()
        self._mirrored = self.settings.mirrored
        # Seconds an event takes, lately. Begins as if a whole batch fitted into a turn.
        self._pace = _TURN_SECONDS / self.settings.worker_batch

    def fitting(self) -> int:
        """Events that fit into a turn, at the pace of late."""
        fitting = int(_TURN_SECONDS / self._pace) if self._pace else self.settings.worker_batch
        return max(1, min(fitting, self.settings.worker_batch))

    def fewer(self) -> None:
        """Let the next turns have half as many events, as if those took twice as long."""
        self._pace = min(2 * self._pace, _TURN_SECONDS)

    async def work(self, db: Connection, number: int, batch: Sequence[Claimed]) -> None:
        """Handle and settle the events of claim `number`, which `db` holds. `db` must not be in a transaction."""
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
            if self.stopping or (tried and time.perf_counter() - began > _TURN_SECONDS):
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
                if self.stopping and not db.is_closed():
                    await to_the_end(inbox.release(db, number, [claimed.event.id for claimed in fit]))
                raise

    async def _ready_or_alone(self, db: Connection, number: int, batch: Sequence[Claimed]) -> list[Claimed]:
        """`_ready`, past an error that nobody thought of: the one event that is not to be made ready has failed."""
        try:
            return await self._ready(db, number, batch)
        except ClaimLost:
            raise
        except Exception as error:
            if isinstance(error, AWAY):
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
            self.wake_reader()
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
            self.wake()
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
        trials = [_Trial(claimed, claimed.attempts + 1, self._handlers_of(claimed.event)) for claimed in chunk]
        if self.traces is not None:
            self._trace(trials, number)
        alone = len(trials) == 1 and (chunk[0].suspect or bool(trials[0].wanted))
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
        await self._pair(db, [trial for trial in trials if trial.wanted])
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
            if trial.paired or (trial.wanted and trial.event.occurrence in handled):
                trial.outcome = Outcome.paired
            elif trial.wanted and trial.error is None:
                # One round trip keeps the last handler's effects and opens the way back for this one.
                await db.execute(_NEXT_SAVEPOINT if savepoint else _FIRST_SAVEPOINT)
                savepoint = True
                await self._handle(db, trial)
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

    async def _handle(self, db: Connection, trial: _Trial) -> None:
        began = time.perf_counter()
        event = replace(trial.event, superseded=trial.superseded, attempt=trial.attempt)
        try:
            for at, handler in enumerate(trial.wanted):
                if at:
                    # PostgreSQL ends a session that is silent for longer than one handler may be.
                    await db.execute("SELECT 1")
                with trial.trace.handling(_name_of(handler)) if trial.trace else _UNTRACED:
                    await handlers.run(db, event, [handler], timeout=self.settings.handler_timeout)
            trial.outcome = Outcome.handled
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            # Raised by the handler, it is an error like any other; sent to this task, it means to stop.
            if isinstance(error, asyncio.CancelledError) and is_being_cancelled():
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


_FIRST_SAVEPOINT = "SAVEPOINT handler"
_NEXT_SAVEPOINT = "RELEASE SAVEPOINT handler; SAVEPOINT handler"
_BACK_TO_SAVEPOINT = "ROLLBACK TO SAVEPOINT handler"


def is_being_cancelled() -> bool:
    """Whether somebody asked this task to end; else a cancellation comes from within."""
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
