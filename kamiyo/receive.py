"""From bytes and a header to a receipt: verify, read, store; acknowledged only after the commit.

The group commit lives here. All deliveries that wait share one INSERT and one commit; while that is on its way the
next group gathers. So an idle system commits one event at once, and a busy one hundreds for the price of one.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import asyncpg

from kamiyo import inbox, signature, telemetry
from kamiyo.database import DATABASE_ERRORS, Connection, Pool
from kamiyo.errors import DatabaseUnavailable, Overloaded, SecretMissing, Unavailable
from kamiyo.event import Event, parse
from kamiyo.inbox import Status
from kamiyo.settings import Settings
from kamiyo.telemetry import happened

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
    answer: "asyncio.Future[Message]"


class Receiver:
    """The door of one process. `run` must be running for `receive` to return."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self._pool = pool
        self._secrets = settings.webhook_secrets
        self._tolerance = settings.signature_tolerance
        self._most_waiting = settings.max_waiting
        self._commit_timeout = settings.commit_timeout
        self._waiting: list[_Waiting] = []
        self._bytes_waiting = 0
        self._wake = asyncio.Event()
        self._closing = False

    def ready(self) -> None:
        """Raise SecretMissing while nothing can be verified: before a byte of the body is read."""
        if not self._secrets:
            raise SecretMissing

    async def receive(self, body: bytes, header: bytes | str | None) -> Receipt:
        """Verify `body`, store the event, and return once it is committed.

        Raises SignatureError, PayloadError, or Unavailable; after any of them nothing is promised, and after the
        first two nothing was written.
        """
        now = time.time()
        signature.verify(body, header, self._secrets, now, self._tolerance)
        event = parse(body, received=now)
        return Receipt(event.id, event.type, await self.store(event))

    async def store(self, event: Event) -> Message:
        """Join the next group commit. Raises Overloaded, or DatabaseUnavailable when the commit cannot be had."""
        size = len(event.body)
        if (
            self._closing
            or len(self._waiting) >= self._most_waiting
            or self._bytes_waiting + size > MOST_BYTES_WAITING
        ):
            raise Overloaded
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(event, answer))
        self._bytes_waiting += size
        self._wake.set()
        # A client that gives up does not take its event back out of the group.
        return await asyncio.shield(answer)

    async def run(self) -> None:
        """Commit group after group until `close`, reconnecting as often as it takes."""
        while not (self._closing and not self._waiting):
            try:
                async with self._pool.acquire(timeout=self._commit_timeout) as db:
                    await self._commit_groups(db)
            except DATABASE_ERRORS as error:
                happened("database_away", error=type(error).__name__)
                self._refuse(self._take())
                await self._until_waiting(1.0)

    def close(self) -> None:
        """Accept nothing more; `run` returns when what waits is committed."""
        self._closing = True
        self._wake.set()

    async def _commit_groups(self, db: Connection) -> None:
        # The connection is kept while events come, and given back when none came for a while, so that the pool can
        # close it when it is idle for long.
        while True:
            if not self._waiting and (self._closing or not await self._until_waiting(20.0)):
                return
            group = self._take()
            if not group:
                continue
            try:
                await self._commit(db, group)
            except DATABASE_ERRORS:
                self._refuse(group)
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
        self._bytes_waiting -= sum(len(waiting.event.body) for waiting in group)
        return group

    async def _commit(self, db: Connection, group: Sequence[_Waiting]) -> None:
        # The same id may wait twice: Stripe does deliver one event over two connections at once.
        first: dict[str, _Waiting] = {}
        for waiting in group:
            first.setdefault(waiting.event.id, waiting)
        began = time.perf_counter()
        known = await self._put(db, [waiting.event for waiting in first.values()])
        telemetry.COMMIT.observe(time.perf_counter() - began)
        telemetry.BATCH.observe(len(group))
        for waiting in group:
            event_id = waiting.event.id
            status = (
                known.get(event_id) if waiting is first[event_id] else known.get(event_id, Status.pending)
            )
            _tell(waiting, _MESSAGES[status])
        _count(group, known, len(group) - len(first))

    async def _put(self, db: Connection, events: Sequence[Event]) -> dict[str, Status]:
        async with asyncio.timeout(self._commit_timeout):
            try:
                return await inbox.put(db, events)
            except asyncpg.CheckViolationError:
                # No table for today's bodies yet: this server slept through the maintenance that makes them.
                await inbox.ensure_partitions(db)
                return await inbox.put(db, events)

    def _refuse(self, group: Sequence[_Waiting]) -> None:
        if group:
            happened(
                "delivery_unavailable", count=len(group), event_ids=[waiting.event.id for waiting in group]
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


def _count(group: Sequence[_Waiting], known: dict[str, Status], twins: int) -> None:
    by_type: dict[str, int] = {}
    new: list[str] = []
    for event in {waiting.event.id: waiting.event for waiting in group}.values():
        if event.id not in known:
            new.append(event.id)
            label = telemetry.label(event.type)
            by_type[label] = by_type.get(label, 0) + 1
    for label, count in by_type.items():
        telemetry.RECEIVED.labels(label).inc(count)
    if new:
        happened("event_received", count=len(new), event_ids=new)
    if known or twins:
        telemetry.DUPLICATES.inc(len(known) + twins)
        happened("duplicate_received", count=len(known) + twins, event_ids=list(known))


__all__ = ["Message", "Receipt", "Receiver", "Unavailable"]
