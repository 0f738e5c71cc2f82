"""From bytes and a header to a receipt: verify, read, store; acknowledged only after the commit.

The group commit lives here. Deliveries that wait share one INSERT and one commit; while that is on its way the next
group gathers. So an idle system commits one event at once, and a busy one hundreds for the price of one.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial

import asyncpg

from kamiyo import handlers, inbox, mirror, projections, signature, telemetry, tracing
from kamiyo.database import DATABASE_ERRORS, Connection, Pool, reason_of
from kamiyo.errors import DatabaseUnavailable, Overloaded, SecretMissing, Unavailable
from kamiyo.event import Event, filed, parse
from kamiyo.handlers import Registry
from kamiyo.inbox import Arrival, Outcome, Status, Stored
from kamiyo.projections import Place, Row
from kamiyo.settings import WEBHOOK, Settings
from kamiyo.telemetry import happened, happened_to_each

#: Events in one commit, at most: enough to spread its cost thin, few enough to keep a commit short.
MOST_PER_COMMIT = 500

#: Fewer are not worth sharing out over two commits.
FEW = 8

#: Bytes of bodies that may wait for their commit in one process; beyond it deliveries are answered 503.
MOST_BYTES_WAITING = 64 * 1024 * 1024


# What leaves no connection to go on with.
_BROKEN_OFF: tuple[type[BaseException], ...] = (asyncio.CancelledError, *DATABASE_ERRORS)


class Message(StrEnum):
    """What a sender is told."""

    received = "Event received"
    already_received = "Event already received"
    already_processed = "Event already processed"


@dataclass(frozen=True, slots=True)
class Receipt:
    """The acknowledgement of one delivery: the event is committed."""

    event_id: str
    event_type: str
    message: Message


#: Hears what became of a delivery: what to tell the sender, or why it is not committed.
Answered = Callable[[Message | Unavailable], None]


@dataclass(slots=True)
class _Waiting:
    event: Event
    source: str
    # Made when it comes in, while another group's commit is on its way, and not when its own is waited for.
    prepared: "_Prepared"
    answered: Answered | None
    deadline: float

    def tell(self, answer: Message | Unavailable) -> None:
        answered, self.answered = self.answered, None
        if answered is not None:
            answered(answer)


class Receiver:
    """The door of one process. `run` must be running for `receive` to return."""

    def __init__(
        self,
        pool: Pool,
        settings: Settings,
        registry: Registry = handlers.registry,
        traces: tracing.Traces | None = None,
        wake: Callable[[], None] | None = None,
    ) -> None:
        self._pool = pool
        self._traces = traces
        # Wakes the worker of this process, if it has one; it calls the others when it needs them.
        self._wake_worker = wake
        self._registry = registry
        self._mirrored = settings.mirrored
        self._secrets = settings.webhook_secrets
        self._signers = settings.signing_secrets
        self._own_account = settings.stripe_account_id
        self._tolerance = settings.signature_tolerance
        self._most_waiting = settings.max_waiting
        self._commit_timeout = settings.commit_timeout
        # Shorter than PostgreSQL's patience with a session that says nothing.
        self._patience = min(20.0, (settings.handler_timeout + settings.idle_limit) / 2)
        self._waiting: list[_Waiting] = []
        self._committing: Sequence[_Waiting] = ()
        # How many the last group was.
        self._answering = 0
        self._bytes_waiting = 0
        self._overdue: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()
        self._closing = False
        self._cost = 0.0

    def ready(self) -> None:
        """Raise SecretMissing while nothing can be verified: before a byte of the body is read."""
        if not self._secrets:
            raise SecretMissing

    async def receive(self, body: bytes, header: bytes | str | None, caller: bytes | None = None) -> Receipt:
        """Verify `body`, store the event, and return once it is committed.

        `caller` is the request's `traceparent` header, if it has one. Raises SignatureError, PayloadError, or
        Unavailable; after any of them nothing is promised, and after the first two nothing was written.
        """
        began = time.time()
        event, source = self._admit(body, header, began)
        return await self._accept(event, source, began, caller)

    def submit(
        self, body: bytes, header: bytes | str | None, answered: Callable[[Event, Message | Unavailable], None]
    ) -> None:
        """The same without waiting: `answered` is called once, with the event, when it is committed or cannot be.

        Raises what `receive` raises, except for what is known only later; then `answered` is never called. Leaves no
        trace: where `traced`, receive.
        """
        event, source = self._admit(body, header, time.time())
        self._join(event, source, partial(answered, event))

    async def receive_vouched(self, body: bytes, *, source: str, caller: bytes | None = None) -> Receipt:
        """Store an event that another road vouches for, and return once it is committed.

        Raises PayloadError or Unavailable, as `receive` does.
        """
        now = time.time()
        return await self._accept(filed(parse(body, received=now), own=self._own_account), source, now, caller)

    @property
    def traced(self) -> bool:
        """Whether deliveries leave traces."""
        return self._traces is not None

    async def _accept(self, event: Event, source: str, began: float, caller: bytes | None) -> Receipt:
        if self._traces is not None:
            message = await self._store_traced(self._traces, event, source, began, caller)
        else:
            message = await self.store(event, source=source)
        return Receipt(event.id, event.type, message)

    async def _store_traced(
        self, traces: tracing.Traces, event: Event, source: str, began: float, caller: bytes | None
    ) -> Message:
        message: Message | None = None
        error = "cancelled"
        try:
            message = await self.store(event, source=source)
            return message
        except Unavailable as refusal:
            error = type(refusal).__name__
            raise
        finally:
            traces.received(
                event.id,
                event.type,
                began=int(began * 1e9),
                said=message.value if message else error,
                copy=message not in (None, Message.received),
                error=message is None,
                caller=caller.decode("latin-1") if caller else None,
            )

    async def store(self, event: Event, *, source: str = WEBHOOK) -> Message:
        """Join the next group commit. Raises Overloaded, or DatabaseUnavailable when the commit cannot be had."""
        told: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        def answered(answer: Message | Unavailable) -> None:
            # A client that gave up does not take its event back out of the group.
            if told.done():
                return
            if isinstance(answer, Unavailable):
                told.set_exception(answer)
            else:
                told.set_result(answer)

        self._join(event, source, answered)
        return await told

    def _admit(self, body: bytes, header: bytes | str | None, now: float) -> tuple[Event, str]:
        signer = self._signers[signature.verify(body, header, self._secrets, now, self._tolerance)]
        event = filed(parse(body, received=now), own=self._own_account, otherwise=signer.account)
        return event, signer.source

    def _join(self, event: Event, source: str, answered: Answered) -> None:
        size = len(event.body)
        if self._closing or len(self._waiting) >= self._most_waiting or self._bytes_waiting + size > MOST_BYTES_WAITING:
            raise Overloaded
        deadline = time.monotonic() + self._commit_timeout
        prepared = _prepared(event, self._registry, self._mirrored)
        self._waiting.append(_Waiting(event, source, prepared, answered, deadline))
        self._bytes_waiting += size
        self._wake.set()
        if self._overdue is None:
            self._overdue = asyncio.get_running_loop().call_later(self._commit_timeout, self._give_up)

    def _give_up(self) -> None:
        """Tell those whose time is over. One timer for all, set for the first: they wait in order."""
        self._overdue = None
        for waiting in (*self._committing, *self._waiting):
            if waiting.answered is None:
                continue
            left = waiting.deadline - time.monotonic()
            if left > 0:
                self._overdue = asyncio.get_running_loop().call_later(left, self._give_up)
                break
            # It may still be committed. Then the sender's next copy is a duplicate, which does no harm.
            waiting.tell(DatabaseUnavailable())

    async def run(self) -> None:
        """Commit group after group until `close`, reconnecting as often as it takes."""
        while not (self._closing and not self._waiting):
            reached = False
            try:
                async with self._pool.acquire(timeout=self._commit_timeout) as db:
                    reached = True
                    if self._wake_worker is not None:
                        await inbox.wake_own(db)
                    await self._commit_groups(db)
            except DATABASE_ERRORS as error:
                happened("database_away", error=type(error).__name__, reason=reason_of(error))
                if not reached:
                    # Where only a connection broke, whoever waits gets another one.
                    self._refuse(self._take(), error)
                await self._until_waiting(1.0)
            except Exception as error:
                self._failed(error)
                if not reached:
                    self._refuse(self._take(), error)
                await asyncio.sleep(0.1)
            except asyncio.CancelledError as error:
                # A stop that could not wait for the commit.
                self._refuse(self._waiting, error)
                raise

    def close(self) -> None:
        """Accept nothing more; `run` returns when what waits is committed."""
        self._closing = True
        self._wake.set()

    async def _commit_groups(self, db: Connection) -> None:
        # The connection is kept while events come, and given back when none came for a while, so that the pool can
        # close it when it is idle for long.
        while True:
            if not self._waiting and (self._closing or not await self._until_waiting(self._patience)):
                return
            group = self._committing = self._take(self._half())
            if not group:
                continue
            try:
                await self._commit(db, group)
            except asyncio.CancelledError as error:
                self._refuse(group, error)
                raise
            except DATABASE_ERRORS as error:
                self._refuse(group, error)
                if isinstance(error, TimeoutError):
                    # There may be nobody at the other end any more: a lost route ends no connection. The next group
                    # gets another one.
                    db.terminate()
                    raise
                if db.is_closed():
                    raise
            except Exception as error:
                self._failed(error)
                await self._commit_apart(db, group)
            finally:
                self._committing = ()

    async def _commit_apart(self, db: Connection, group: Sequence[_Waiting]) -> None:
        # Nobody thought of what went wrong. It must cost neither the neighbours their answers nor the door its life.
        for number, waiting in enumerate(group):
            try:
                await self._commit(db, [waiting])
            except _BROKEN_OFF as error:
                self._refuse(group[number:], error)
                db.terminate()
                raise
            except Exception as error:
                self._failed(error)
                self._refuse([waiting], error)

    def _failed(self, error: Exception) -> None:
        happened("receiver_failed", error=type(error).__name__, place=telemetry.place_of(error))

    async def _until_waiting(self, seconds: float) -> bool:
        self._wake.clear()
        if self._waiting or self._closing:
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        return bool(self._waiting) or self._closing

    def _half(self) -> int:
        # The last group's senders are answered now, and come again while the next one is on its way. Where one of the
        # two is large and the other small, PostgreSQL waits for this process, and then this process for PostgreSQL;
        # half of both together keeps both at work.
        return min(MOST_PER_COMMIT, max(FEW, -(-(len(self._waiting) + self._answering) // 2)))

    def _take(self, most: int = MOST_PER_COMMIT) -> list[_Waiting]:
        group, self._waiting = self._waiting[:most], self._waiting[most:]
        if group and any(waiting.source != group[0].source for waiting in group):
            # One commit for each source that is busy at the moment: its name is a parameter of the whole statement.
            others = [waiting for waiting in group if waiting.source != group[0].source]
            group = [waiting for waiting in group if waiting.source == group[0].source]
            self._waiting = others + self._waiting
        self._bytes_waiting -= sum(len(waiting.event.body) for waiting in group)
        self._answering = len(group)
        return group

    async def _commit(self, db: Connection, group: Sequence[_Waiting]) -> None:
        # The same id may wait twice: Stripe does deliver one event over two connections at once.
        first: dict[str, _Waiting] = {}
        for waiting in group:
            first.setdefault(waiting.event.id, waiting)
        began = time.perf_counter()
        stored = await self._put(db, [*first.values()])
        took = time.perf_counter() - began
        self._cost = took / len(first)
        if stored.left and self._wake_worker is not None:
            self._wake_worker()
        # Not at once: PostgreSQL has nothing to do until it has the next group, so that goes first.
        asyncio.get_running_loop().call_soon(self._tell, group, first, stored, took)

    def _tell(self, group: Sequence[_Waiting], first: dict[str, _Waiting], stored: Stored, took: float) -> None:
        known = stored.known
        ended = tracing.now()
        for waiting in group:
            event_id = waiting.event.id
            if event_id in known:
                waiting.tell(_MESSAGES[known[event_id]])
            else:
                waiting.tell(Message.received if waiting is first[event_id] else Message.already_received)
        _count(group, first, stored, took)
        if self._traces is not None:
            for event_id, waiting in first.items():
                if event_id not in known:
                    self._traces.committed(
                        event_id,
                        waiting.event.type,
                        began=ended - int(took * 1e9),
                        ended=ended,
                        group=len(group),
                        processed=event_id not in stored.left,
                    )

    async def _put(self, db: Connection, group: Sequence[_Waiting]) -> Stored:
        async with asyncio.timeout(self._commit_timeout):
            try:
                return await self._project(db, group)
            except asyncpg.CheckViolationError:
                # No table for today's bodies yet: this server slept through the maintenance that makes them.
                await inbox.ensure_partitions(db)
                return await self._project(db, group)

    async def _project(self, db: Connection, group: Sequence[_Waiting]) -> Stored:
        source = group[0].source
        arrivals, rows = _together(waiting.prepared for waiting in group)
        try:
            # Of an event projected on arrival, its share of the last commit is the best that can be known in this one.
            cost = int(self._cost * 1e6)
            return await inbox.put_projected(db, arrivals, rows, microseconds=cost, source=source)
        except asyncpg.DataError:
            # A value that PostgreSQL's types do not take. Stored first; the workers find out whose it is.
            pending = [Arrival(waiting.event, None) for waiting in group]
            return await inbox.put_projected(db, pending, [], microseconds=0, source=source)

    def _refuse(self, group: Sequence[_Waiting], error: BaseException) -> None:
        if group:
            reason = type(error).__name__
            happened_to_each(
                "delivery_unavailable", ({"event_id": waiting.event.id, "error": reason} for waiting in group)
            )
        for waiting in group:
            waiting.tell(DatabaseUnavailable())


_MESSAGES: dict[Status, Message] = {
    Status.pending: Message.already_received,
    Status.processing: Message.already_received,
    Status.failed: Message.already_received,
    Status.processed: Message.already_processed,
}


@dataclass(slots=True)
class _Prepared:
    """An event as it will be stored, and its billing row if that may be all it needs."""

    arrival: Arrival
    row: Row | None


def _prepared(event: Event, registry: Registry, mirrored: frozenset[str]) -> _Prepared:
    if (
        event.thin
        or registry.of(event.type)
        or projections.is_stub(event)
        or (mirrored and mirror.wants(event, mirrored))
    ):
        return _Prepared(Arrival(event, None), None)
    try:
        row = projections.row_of(event, datetime.now(UTC))
    except projections.ProjectionError:
        return _Prepared(Arrival(event, None), None)
    return _Prepared(Arrival(event, Outcome.ignored if row is None else Outcome.projected), row)


def _together(group: Iterable[_Prepared]) -> tuple[list[Arrival], list[Row]]:
    """What the group stores, and the one row of each object in it. Of a tie the workers find out."""
    arrivals: list[Arrival] = []
    best: dict[Place, _Prepared] = {}
    tied: set[Place] = set()
    for one in group:
        arrivals.append(one.arrival)
        row = one.row
        if row is None:
            continue
        other = best.setdefault(row.place, one)
        if other is one or other.row is None:
            continue
        if other.row.rank < row.rank:
            best[row.place] = one
            tied.discard(row.place)
        elif other.row.rank == row.rank:
            tied.add(row.place)
            one.arrival.outcome = None
    for place in tied:
        best.pop(place).arrival.outcome = None
    return arrivals, [one.row for one in best.values() if one.row is not None]


def ready_to_project(
    events: Iterable[Event], registry: Registry, mirrored: frozenset[str] = frozenset()
) -> tuple[list[Arrival], list[Row]]:
    """Which events their billing row is all they need, and those rows, one for each object.

    The workers get what has a handler, what must be read from Stripe, what ties with another, what is malformed, and
    what is `mirrored`.
    """
    return _together(_prepared(event, registry, mirrored) for event in events)


def _count(group: Sequence[_Waiting], first: dict[str, _Waiting], stored: Stored, took: float) -> None:
    telemetry.COMMIT.observe(took)
    telemetry.BATCH.observe(len(group))
    received: Counter[str] = Counter()
    processed: Counter[str] = Counter()
    for event_id, waiting in first.items():
        if event_id not in stored.known:
            label = telemetry.label(waiting.event.type)
            received[label] += 1
            if event_id not in stored.left:
                processed[label] += 1
    for label, count in received.items():
        telemetry.RECEIVED.labels(label).inc(count)
    for label, count in processed.items():
        telemetry.EVENTS.labels(label, "processed").inc(count)
        duration = telemetry.DURATION.labels(label)
        for _ in range(count):
            duration.observe(took / len(group))
    new = [waiting.event for event_id, waiting in first.items() if event_id not in stored.known]
    happened_to_each("event_received", (_said_of(event) for event in new))
    if len(new) > len(stored.left):
        done = (event for event in new if event.id not in stored.left)
        happened_to_each("event_processed", (_said_of(event) for event in done))
    if len(group) > len(new):
        telemetry.DUPLICATES.inc(len(group) - len(new))
        copies = (w.event for w in group if w is not first[w.event.id] or w.event.id in stored.known)
        happened_to_each("duplicate_received", (_said_of(event) for event in copies))


def _said_of(event: Event) -> dict[str, str]:
    return {"event_id": event.id, "event_type": event.type}


__all__ = ["Message", "Receipt", "Receiver", "Unavailable"]
