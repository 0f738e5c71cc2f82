"""The door of a twin endpoint: Stripe's events in an API version that is to be tried.

In Stripe's dashboard it is a second endpoint for the same events, on the new version, whose address ends in
`?shadow=1` and whose signing secret is its own. What it delivers is verified like anything else and kept apart for
seven days, for `kamiyo upgrade-report` to compare. It is never an event: it is not in the ledger, not counted, not
processed, and nobody is alerted of it.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import parse_qsl

import asyncpg

from kamiyo import signature
from kamiyo.database import DATABASE_ERRORS, Connection, Pool, load_queries
from kamiyo.errors import DatabaseUnavailable, Overloaded, PayloadError, SecretMissing
from kamiyo.event import Event, filed, parse
from kamiyo.settings import Settings
from kamiyo.telemetry import happened

_SQL = load_queries("shadow.sql")

#: How long what a twin endpoint delivered is kept: a weekend, a month's end and a few days to look.
KEPT_DAYS = 7

#: What one maintenance turn (every five seconds) forgets at most: more than comes in.
_PRUNED_AT_ONCE = 5000


def is_shadow(query: bytes) -> bool:
    """Whether a query string names the twin endpoint: `shadow=` with anything but 0.

    Nobody who says `shadow=true` may come in by the real door, where his events would be counted twice.
    """
    named = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    return named.get("shadow", "0") != "0"


@dataclass(frozen=True, slots=True)
class ShadowReceipt:
    """The acknowledgement of one delivery: it is committed, apart from the events."""

    event_id: str
    event_type: str
    message: str


@dataclass(frozen=True, slots=True)
class _Waiting:
    event: Event
    stored: "asyncio.Future[bool]"


class ShadowReceiver:
    """The twin endpoint's door in one process."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self._pool = pool
        self._secrets = settings.shadow_secrets
        self._own_account = settings.stripe_account_id
        self._tolerance = settings.signature_tolerance
        self._most_waiting = settings.max_waiting
        self._commit_timeout = settings.commit_timeout
        self._waiting: list[_Waiting] = []
        # One at a time, whatever comes: the real door and the workers need the connections more.
        self._turn = asyncio.Lock()

    def ready(self) -> None:
        """Raise SecretMissing while nothing can be verified: before a byte of the body is read."""
        if not self._secrets:
            raise SecretMissing("STRIPE_SHADOW_WEBHOOK_SECRET is not set")

    async def receive(self, body: bytes, header: bytes | str | None) -> ShadowReceipt:
        """Verify `body` and keep it; return once it is committed.

        Raises SignatureError, PayloadError or Unavailable, as the real door does.
        """
        now = time.time()
        signature.verify(body, header, self._secrets, now, self._tolerance)
        # As the real event is filed, or nothing would be its twin.
        event = filed(parse(body, received=now), own=self._own_account)
        is_new = await self._store(event)
        message = "Shadow event received" if is_new else "Shadow event already received"
        return ShadowReceipt(event.id, event.type, message)

    async def _store(self, event: Event) -> bool:
        if len(self._waiting) >= self._most_waiting:
            raise Overloaded
        waiting = _Waiting(event, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        try:
            async with asyncio.timeout(self._commit_timeout), self._turn:
                if not waiting.stored.done():
                    # Whoever's turn it is commits for all who wait.
                    await self._commit()
        except DATABASE_ERRORS:
            raise DatabaseUnavailable from None
        return waiting.stored.result()

    async def _commit(self) -> None:
        group, self._waiting = self._waiting, []
        try:
            async with self._pool.acquire() as db:
                new = await put(db, {one.event.id: one.event for one in group}.values())
        except BaseException:
            for one in group:
                one.stored.set_exception(DatabaseUnavailable())
                # Nobody may be listening any more; asyncio would call that an error of ours.
                one.stored.exception()
            raise
        for event_id in sorted(new):
            happened("shadow_received", event_id=event_id)
        for one in group:
            one.stored.set_result(one.event.id in new)


async def put(db: Connection, events: Iterable[Event]) -> set[str]:
    """Keep what is new of `events`, none of which may come twice; return the ids of that."""
    rows = (
        (
            *(e.id, e.type, e.created, e.livemode, e.account, e.context, e.api_version),
            *(e.object_type, e.object_id, e.customer, _request_of(e), e.body),
        )
        for e in events
    )
    new: list[asyncpg.Record] = await db.fetch(_SQL["put"], *map(list, zip(*rows, strict=True)))
    return {event_id for (event_id,) in new}


async def prune(db: Connection) -> None:
    """Forget what is older than KEPT_DAYS; a bounded part of it at a time."""
    await db.execute(_SQL["prune"], KEPT_DAYS, _PRUNED_AT_ONCE)


def _request_of(event: Event) -> str | None:
    try:
        return event.request_id
    except (PayloadError, RecursionError):
        return None  # what is wrong with it, the report says
