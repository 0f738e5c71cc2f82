"""The reader: what events only name, and what no event tells, is read from Stripe's API here.

One turn looks for what is due, asks Stripe for each object once however many events wait for it, keeps what it said,
and gives the events to the workers. Stripe is asked outside any transaction, with no connection, row or lane held. A
process that dies meanwhile leaves nothing behind but a short wait: it says every few seconds what it is reading, and
what nobody says that of is taken by the next. Reading twice does no harm.

While Stripe is away the events wait, and none fails. Nor does one when Stripe refuses the key: a person is told, and
mends that. What Stripe does not have (404) is told to the events as just that. An event whose object Stripe will never
give for another reason is dead, with the reason.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import asyncpg

from kamiyo import handlers, inbox, projections, reads
from kamiyo.database import Pool, load_queries
from kamiyo.errors import PayloadError
from kamiyo.event import Event, decode, lane_of, snapshot_type
from kamiyo.handlers import Registry
from kamiyo.projections import THIN_ENDS, Read
from kamiyo.shapes import PATHS
from kamiyo.stripe_api import StripeApi, StripeGone, StripeKeyRefused, StripeRefused, StripeUnavailable
from kamiyo.telemetry import happened

_SQL = load_queries("reader.sql")

#: Objects that one process reads at the same time. One that Stripe is slow with keeps one of these places.
TOGETHER = 8

# What a reader took is its own for so long, and is said again to be so while it is at it.
_LEASE_SECONDS = 15.0
_RENEW_EVERY_SECONDS = 5.0
_PATIENCE_SECONDS = 30.0
# After Stripe refused the key, for all objects that it would be refused for as well: the one that was asked for tells
# when that is over, the others wait longer the longer they have waited. A new key comes with a restart, what it may
# read comes with none.
_REFUSED_SECONDS, _REFUSED_MOST_SECONDS = 60.0, 600.0
# After Stripe did not give an object: later the longer it has waited already, so that one that Stripe fails on is not
# in the way of the others.
_AWAY_SECONDS, _AWAY_MOST_SECONDS = 5.0, 60.0
# An answer from before the event's second was over: Stripe's clock is behind ours.
_TOO_EARLY_SECONDS = 1.0

_LOOK_EVERY_SECONDS = 2.0
_UNDECIDED_EVERY_SECONDS = 15.0
_UNDECIDED_AT_ONCE = 20
# A lane in a slow handler's hands is tried again this often, and this long.
_LANE_EVERY_SECONDS, _LANE_SECONDS = 0.2, 60.0
# An undecided row is drawn again, and others wait behind it.
_TIE_LANE_SECONDS = 5.0


# Under which the reads of an object are kept: id, account, livemode.
_Key: TypeAlias = tuple[str, str, bool]


@dataclass(frozen=True, slots=True)
class _Object:
    """An object to be read: where it is, and what its reads are kept under."""

    object_type: str
    object_id: str
    account: str
    livemode: bool
    path: str
    source: str
    ended: int | None

    def read(self, body: bytes, second: int) -> Read:
        return Read(
            *(self.object_type, self.object_id, self.account, self.livemode, body, second, self.source, self.ended)
        )


class Reader:
    """One process' reader. Any number of them share one database; each object is read by one of them at a time."""

    def __init__(
        self, pool: Pool, api: StripeApi, registry: Registry = handlers.registry, rng: random.Random | None = None
    ) -> None:
        self._pool = pool
        self._api = api
        # What these keys can read: one's own keys all accounts of their mode, the others theirs.
        named = [(account, livemode) for account, livemode in api.keyed if account]
        self._reach: tuple[list[bool], list[str], list[bool]] = (
            [livemode for account, livemode in api.keyed if not account],
            [account for account, _ in named],
            [livemode for _, livemode in named],
        )
        self._registry = registry
        self._rng = rng or random.Random()  # noqa: S311 - for jitter
        self._wake = asyncio.Event()
        self._waits = False
        self._hands: set[asyncio.Task[None]] = set()
        # The events of which each object that is being read was taken for.
        self._taken: dict[_Key, list[str]] = {}

    def wake(self) -> None:
        """Something is to be read: look when it is due."""
        self._wake.set()

    async def run(self) -> None:
        """Read until cancelled, through whatever Stripe and the database do."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_settling())
            tasks.create_task(self._keep_hold())
            while True:
                self._wake.clear()
                wait = _LOOK_EVERY_SECONDS
                with self._unharmed():
                    _, rows = await self._take(TOGETHER - len(self._hands))
                    for row in rows:
                        hand = tasks.create_task(self._lend_a_hand(row))
                        self._hands.add(hand)
                        hand.add_done_callback(self._put_down)
                    if len(self._hands) < TOGETHER:
                        wait = await self._next_in()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait * self._rng.uniform(0.9, 1.1)):
                        await self._wake.wait()

    @contextlib.contextmanager
    def _unharmed(self) -> Iterator[None]:
        # An error that nobody thought of must not end the worker that this is part of. What was taken is due again.
        try:
            yield
        except Exception as error:
            happened("reader_failed", error=type(error).__name__)

    async def _lend_a_hand(self, row: asyncpg.Record) -> None:
        with self._unharmed():
            await self._serve(row)

    def _put_down(self, hand: asyncio.Task[None]) -> None:
        self._hands.discard(hand)
        self._wake.set()

    async def _keep_settling(self) -> None:
        # Apart from the rest: it may wait for a lane that a slow handler holds.
        while True:
            with self._unharmed():
                await self.settle_undecided(every=_UNDECIDED_EVERY_SECONDS)
            await asyncio.sleep(_UNDECIDED_EVERY_SECONDS * self._rng.uniform(1.0, 1.2))

    async def _keep_hold(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_EVERY_SECONDS)
            with self._unharmed():
                await self.renew()

    async def renew(self) -> None:
        """Say again of everything that is being read that it is."""
        mine = [event_id for event_ids in self._taken.values() for event_id in event_ids]
        if mine:
            async with self._pool.acquire(timeout=10) as db:
                await db.execute(_SQL["renew"], mine, _LEASE_SECONDS)

    async def _next_in(self) -> float:
        pause = await self._api.pause()
        async with self._pool.acquire(timeout=10) as db:
            due_in = await db.fetchval(_SQL["next_in"], *self._reach)
        return min(max(due_in, pause, 0.05), _LOOK_EVERY_SECONDS) if due_in is not None else _LOOK_EVERY_SECONDS

    async def run_once(self) -> int:
        """Read what is due, TOGETHER objects at most; return how many, and how many events needed no read any more.

        While the circuit is open nothing is read.
        """
        told, rows = await self._take(TOGETHER)
        for error in await asyncio.gather(*map(self._serve, rows), return_exceptions=True):
            if isinstance(error, BaseException):
                raise error
        return told + len(rows)

    async def _take(self, most: int) -> tuple[int, list[asyncpg.Record]]:
        """Give back what needs no read any more, and take up to `most` objects to read; how many, and which."""
        if await self._api.pause() > 0:
            most = 0
        async with self._pool.acquire(timeout=10) as db, db.transaction():
            if not await db.fetchval(_SQL["alone"]):
                return 0, []
            told = await db.fetch(_SQL["told"], [f"v1.{snapshot_type(name)}" for name in self._registry.types()])
            asked = most, _LEASE_SECONDS, list(THIN_ENDS), *self._reach
            rows = await db.fetch(_SQL["take"], *asked) if most else []
        self._taken |= {_key(row): row["taken"] for row in rows}
        return len(told), rows

    async def _serve(self, row: asyncpg.Record) -> None:
        """Read one object for all events that wait for it."""
        try:
            await self._read(inbox.event_of(row), _key(row), row["ended"])
        finally:
            self._taken.pop(_key(row), None)

    async def _read(self, event: Event, key: _Key, ended: int | None) -> None:
        try:
            path = reads.path_of(event)
        except PayloadError:
            path = None
        if path is None:
            # Retention took the body that says where it is, or it never was what it seemed.
            await self._refuse(key, "PayloadGone", "what it is about cannot be told from its body any more")
            return
        wanted = _Object(event.object_type or "v2.core.event", *key, path, event.id, ended)
        try:
            read = await self._ask(wanted)
            if event.type == reads.GENERATION_FAILED:
                await self._read_named(read)
        except StripeUnavailable as error:
            self._say_waiting(str(error))
            await self._not_yet(key, _AWAY_SECONDS, most=_AWAY_MOST_SECONDS)
        except StripeKeyRefused as error:
            happened("read_refused", reason=error.what)
            await self._not_yet_alike(event, every=error.every)
            await self._not_yet(key, _REFUSED_SECONDS)
        except StripeRefused as error:
            happened("read_refused", reason="the request", object_id=wanted.object_id)
            await self._refuse(key, "StripeRefused", str(error))
        else:
            await self._deliver(key, read)

    def _say_waiting(self, reason: str) -> None:
        if not self._waits:
            happened("reads_wait", reason=reason)
        self._waits = True

    async def _ask(self, wanted: _Object, *, awaited: bool = True) -> Read:
        try:
            reply = await self._api.read(
                wanted.path,
                account=wanted.account,
                livemode=wanted.livemode,
                patience=_PATIENCE_SECONDS,
                once=True,
                keeps_refusal=awaited,
            )
        except StripeGone as gone:
            happened("object_gone", object_id=wanted.object_id)
            read = wanted.read(b"", gone.second)
        else:
            read = wanted.read(reply.body, reply.second)
        self._waits = False
        return read

    async def _deliver(self, key: _Key, read: Read) -> None:
        async with self._pool.acquire(timeout=10) as db, db.transaction():
            customer = await reads.whose(db, read)
            lane = lane_of(read.account, customer) if customer else None
            await projections.keep_reads(db, [read])
            ready = await db.fetch(_SQL["ready"], *key, float(read.second), customer, lane)
            await db.execute(_SQL["not_yet"], *key, _TOO_EARLY_SECONDS, 0.0)
        if ready:
            happened("objects_read", count=1, events=len(ready))

    async def _not_yet(self, key: _Key, seconds: float, *, most: float = 0.0) -> None:
        async with self._pool.acquire(timeout=10) as db:
            await db.execute(_SQL["not_yet"], *key, seconds * self._rng.uniform(0.8, 1.2), most)

    async def _not_yet_alike(self, event: Event, *, every: bool) -> None:
        """Put off all that is due and would be refused as well.

        That is what is of its type and account; where the key itself is refused, of all types; where that is one's own,
        of all accounts.
        """
        account = None if every and (event.account, event.livemode) not in self._api.keyed else event.account
        kind = None if every else event.object_type
        seconds = _REFUSED_SECONDS * self._rng.uniform(0.8, 1.2), _REFUSED_MOST_SECONDS
        async with self._pool.acquire(timeout=10) as db:
            await db.execute(_SQL["not_yet_alike"], account, event.livemode, kind, *seconds)

    async def _refuse(self, key: _Key, error_type: str, reason: str) -> None:
        fingerprint = handlers.failure_of(StripeRefused(reason)).fingerprint
        async with self._pool.acquire(timeout=10) as db:
            for (event_id,) in await db.fetch(_SQL["refuse"], *key, error_type, reason, fingerprint):
                happened("event_died", event_id=event_id, error=error_type, fingerprint=fingerprint)

    # ── What no event tells ─────────────────────────────────────────────────────────────────────────────────────

    async def settle_undecided(self, *, every: float = 0.0) -> int:
        """Read the objects of rows that nothing in their events decides; return how many are settled.

        A few at a time, and on as long as there are more of which some can be. Nothing if another process did it less
        than `every` seconds ago, or will not wait while Stripe is away.
        """
        async with self._pool.acquire(timeout=10) as db:
            if await db.fetchval(_SQL["take_undecided"], every) is None:
                return 0
        settled, more = 0, True
        while more:
            some, drawn = await self._settle_some()
            settled += some
            more = some > 0 and drawn == _UNDECIDED_AT_ONCE
        return settled

    async def _settle_some(self) -> tuple[int, int]:
        async with self._pool.acquire(timeout=10) as db:
            rows = await db.fetch(_SQL["undecided"], _UNDECIDED_AT_ONCE, *self._reach)
            known = await projections.reads_of(db, {(row["id"], row["account"], row["livemode"]) for row in rows})
        settled = 0
        for kind, object_id, account, livemode, event_id, rank, is_known in rows:
            second = projections.second_of(rank)
            if is_known:
                told = [one.read for one in known.get((object_id, account, livemode), ())]
                if told and await self._apply(max(told, key=projections.rank_of_read), patience=_TIE_LANE_SECONDS):
                    happened("tie_settled", object_id=object_id, event_id=event_id)
                    settled += 1
                continue
            path = f"{PATHS[kind]}/{object_id}"
            wanted = _Object(kind, object_id, account, livemode, path, event_id, second if rank >> 56 else None)
            try:
                read = await self._ask(wanted, awaited=False)
            except StripeUnavailable as error:
                self._say_waiting(str(error))
                break
            except StripeRefused as error:
                reason = error.what if isinstance(error, StripeKeyRefused) else "the request"
                happened("read_refused", reason=reason, object_id=object_id)
                continue
            if read.second > second and await self._apply(read, patience=_TIE_LANE_SECONDS):
                happened("tie_settled", object_id=object_id, event_id=event_id)
                settled += 1
        return settled, len(rows)

    async def _read_named(self, told: Read) -> None:
        """Read the object of which Stripe could not make an event."""
        named = _named(told)
        if named is not None:
            read = await self._ask(named)
            await self._apply(read)

    async def _apply(self, read: Read, *, patience: float = _LANE_SECONDS) -> bool:
        until = time.monotonic() + patience
        while True:
            async with self._pool.acquire(timeout=10) as db, db.transaction():
                result = await reads.apply(db, [read])
            for refusal in result.refused:
                refusal.tell()
            if not result.held_up:
                return bool(result.rows)
            if time.monotonic() > until:
                return False
            await asyncio.sleep(_LANE_EVERY_SECONDS)


def _named(told: Read) -> _Object | None:
    value: Any = None
    with contextlib.suppress(PayloadError):
        value = decode(told.body) if told.body else None
    for name in ("data", "impact", "related_object"):
        value = value.get(name) if isinstance(value, dict) else None
    kind, object_id = (value.get("type"), value.get("id")) if isinstance(value, dict) else (None, None)
    if not isinstance(object_id, str) or not isinstance(kind, str) or kind not in PATHS:
        return None
    return _Object(kind, object_id, told.account, told.livemode, f"{PATHS[kind]}/{object_id}", told.source, None)


def _key(row: asyncpg.Record) -> _Key:
    return row["asked_id"], row["account"], row["livemode"]
