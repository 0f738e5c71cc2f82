"""From bytes and a header to a receipt: verify, read, store; acknowledged only after the commit.

The group commit lives here. All deliveries that wait share one INSERT and one commit; while that is on its way the
next group gathers. So an idle system commits one event at once, and a busy one hundreds for the price of one.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

import asyncpg

from kamiyo import handlers, inbox, mirror, projections, signature, telemetry, tracing
from kamiyo.database import DATABASE_ERRORS, Connection, Pool
from kamiyo.errors import DatabaseUnavailable, Overloaded, SecretMissing, Unavailable
from kamiyo.event import Event, filed, parse
from kamiyo.handlers import Registry
from kamiyo.inbox import Arrival, Outcome, Status, Stored
from kamiyo.projections import Place, Row
from kamiyo.settings import WEBHOOK, Settings
from kamiyo.telemetry import happened, happened_to_each

#: Events in one commit, at most: enough to spread its cost thin, few enough to keep a commit short.
MOST_PER_COMMIT = 500

#: Bytes of bodies that may wait for their commit in one process; beyond it deliveries are answered 503.
MOST_BYTES_WAITING = 64 * 1024 * 1024


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


@dataclass(frozen=True, slots=True)
class _Waiting:
    event: Event
    source: str
    answer: "asyncio.Future[Message]"


class Receiver:
    """The door of one process. `run` must be running for `receive` to return."""

    def __init__(
        self,
        pool: Pool,
        settings: Settings,
        registry: Registry = handlers.registry,
        traces: tracing.Traces | None = None,
    ) -> None:
        self._pool = pool
        self._traces = traces
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
        self._bytes_waiting = 0
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
        now = time.time()
        signer = self._signers[signature.verify(body, header, self._secrets, now, self._tolerance)]
        event = filed(parse(body, received=now), own=self._own_account, otherwise=signer.account)
        return await self._accept(event, signer.source, now, caller)

    async def receive_vouched(self, body: bytes, *, source: str, caller: bytes | None = None) -> Receipt:
        """Store an event that another road vouches for, and return once it is committed.

        Raises PayloadError or Unavailable, as `receive` does.
        """
        now = time.time()
        return await self._accept(filed(parse(body, received=now), own=self._own_account), source, now, caller)

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
        size = len(event.body)
        if self._closing or len(self._waiting) >= self._most_waiting or self._bytes_waiting + size > MOST_BYTES_WAITING:
            raise Overloaded
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(event, source, answer))
        self._bytes_waiting += size
        self._wake.set()
        try:
            async with asyncio.timeout(self._commit_timeout):
                # A client that gives up does not take its event back out of the group.
                return await asyncio.shield(answer)
        except TimeoutError:
            # It may still be committed. Then the sender's next copy is a duplicate, which does no harm.
            raise DatabaseUnavailable from None

    async def run(self) -> None:
        """Commit group after group until `close`, reconnecting as often as it takes."""
        while not (self._closing and not self._waiting):
            try:
                async with self._pool.acquire(timeout=self._commit_timeout) as db:
                    await self._commit_groups(db)
            except DATABASE_ERRORS as error:
                happened("database_away", error=type(error).__name__)
                self._refuse(self._take(), error)
                await self._until_waiting(1.0)

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
            group = self._take()
            if not group:
                continue
            try:
                await self._commit(db, group)
            except DATABASE_ERRORS as error:
                self._refuse(group, error)
                if isinstance(error, TimeoutError):
                    # There may be nobody at the other end any more: a lost route ends no connection. The next group
                    # gets another one.
                    db.terminate()
                if db.is_closed():
                    raise

    async def _until_waiting(self, seconds: float) -> bool:
        self._wake.clear()
        if self._waiting or self._closing:
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        return bool(self._waiting) or self._closing

    def _take(self) -> list[_Waiting]:
        group, self._waiting = self._waiting[:MOST_PER_COMMIT], self._waiting[MOST_PER_COMMIT:]
        if group and any(waiting.source != group[0].source for waiting in group):
            # One commit for each source that is busy at the moment: its name is a parameter of the whole statement.
            others = [waiting for waiting in group if waiting.source != group[0].source]
            group = [waiting for waiting in group if waiting.source == group[0].source]
            self._waiting = others + self._waiting
        self._bytes_waiting -= sum(len(waiting.event.body) for waiting in group)
        return group

    async def _commit(self, db: Connection, group: Sequence[_Waiting]) -> None:
        # The same id may wait twice: Stripe does deliver one event over two connections at once.
        first: dict[str, _Waiting] = {}
        for waiting in group:
            first.setdefault(waiting.event.id, waiting)
        began = time.perf_counter()
        stored = await self._put(db, [waiting.event for waiting in first.values()], group[0].source, began)
        took = time.perf_counter() - began
        self._cost = took / len(first)
        for waiting in group:
            event_id = waiting.event.id
            status = stored.known.get(event_id)
            if status is None and waiting is not first[event_id]:
                status = Status.pending
            _tell(waiting, _MESSAGES[status])
        _count(group, first, stored, took)
        if self._traces is not None:
            ended = tracing.now()
            for event_id, waiting in first.items():
                if event_id not in stored.known:
                    self._traces.committed(
                        event_id,
                        waiting.event.type,
                        began=ended - int(took * 1e9),
                        ended=ended,
                        group=len(group),
                        processed=event_id not in stored.left,
                    )

    async def _put(self, db: Connection, events: Sequence[Event], source: str, began: float) -> Stored:
        async with asyncio.timeout(self._commit_timeout):
            try:
                return await self._project(db, events, source, began)
            except asyncpg.CheckViolationError:
                # No table for today's bodies yet: this server slept through the maintenance that makes them.
                await inbox.ensure_partitions(db)
                return await self._project(db, events, source, began)

    async def _project(self, db: Connection, events: Sequence[Event], source: str, began: float) -> Stored:
        arrivals, rows = ready_to_project(events, self._registry, self._mirrored)
        # Of an event projected on arrival, its share of the last commit is the best that can be known in this one.
        cost = self._cost + (time.perf_counter() - began) / len(events)
        try:
            return await inbox.put_projected(db, arrivals, rows, microseconds=int(cost * 1e6), source=source)
        except asyncpg.DataError:
            # A value that PostgreSQL's types do not take. Stored first; the workers find out whose it is.
            known = await inbox.put(db, events, source=source)
            return Stored(known, {event.id for event in events} - known.keys())

    def _refuse(self, group: Sequence[_Waiting], error: BaseException) -> None:
        if group:
            reason = type(error).__name__
            happened_to_each(
                "delivery_unavailable", ({"event_id": waiting.event.id, "error": reason} for waiting in group)
            )
        for waiting in group:
            if not waiting.answer.done():
                waiting.answer.set_exception(DatabaseUnavailable())
                # Nobody may be listening any more; asyncio would call that an error of ours.
                waiting.answer.exception()


_MESSAGES: dict[Status | None, Message] = {
    None: Message.received,
    Status.pending: Message.already_received,
    Status.processing: Message.already_received,
    Status.failed: Message.already_received,
    Status.processed: Message.already_processed,
}


def _tell(waiting: _Waiting, message: Message) -> None:
    if not waiting.answer.done():
        waiting.answer.set_result(message)


def ready_to_project(
    events: Sequence[Event], registry: Registry, mirrored: frozenset[str] = frozenset()
) -> tuple[list[Arrival], list[Row]]:
    """Which events their billing row is all they need, and those rows, one for each object.

    The workers get what has a handler, what must be read from Stripe, what ties with another, what is malformed, and
    what is `mirrored`.
    """
    arrivals: list[Arrival] = []
    best: dict[Place, tuple[int, Row]] = {}
    tied: set[Place] = set()
    now = datetime.now(UTC)
    for at, event in enumerate(events):
        outcome: Outcome | None = None
        alone = not (mirrored and mirror.wants(event, mirrored))
        if alone and not event.thin and not registry.of(event.type) and not projections.is_stub(event):
            with contextlib.suppress(projections.ProjectionError):
                row = projections.row_of(event, now)
                outcome = Outcome.ignored
                if row is not None:
                    outcome = Outcome.projected
                    other = best.get(row.place)
                    if other is None or other[1].rank < row.rank:
                        best[row.place] = at, row
                        tied.discard(row.place)
                    elif other[1].rank == row.rank:
                        tied.add(row.place)
                        outcome = None
        arrivals.append(Arrival(event, outcome))
    for place in tied:
        at, _ = best.pop(place)
        arrivals[at] = Arrival(events[at], None)
    return arrivals, [row for _, row in best.values()]


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
        for _ in range(count):
            telemetry.DURATION.labels(label).observe(took / len(group))
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
