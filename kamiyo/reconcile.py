"""The second door in: events that Stripe has and we do not, though they were never delivered.

An endpoint that was disabled, a delivery that gave up after three days, an outage of the network: Stripe's list of
events (`GET /v1/events`, 30 days) still has them. Each comparison goes back over an hour that was compared already,
because an event can appear in the list a little late. What is missing goes through the same `inbox.put` as a delivery,
with the same dedupe; so it may run at any time, twice, or be killed in the middle.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from kamiyo import handlers, inbox, mirror, projections
from kamiyo.database import DATABASE_ERRORS, Connection, Pool, load_queries
from kamiyo.errors import PayloadError
from kamiyo.event import Event, parse
from kamiyo.handlers import Registry
from kamiyo.stripe_api import StripeApi, StripeError
from kamiyo.telemetry import happened

_SQL = load_queries("reconcile.sql")

EVERY_SECONDS = 900.0

#: What is compared again each time.
OVERLAP_SECONDS = 3600
#: Younger events may still be on their way.
ON_THE_WAY_SECONDS = 300
#: How far the first comparison goes back: as long as Stripe itself tries to deliver in live mode.
FIRST_SECONDS = 72 * 3600

_NOT_NOW: tuple[type[BaseException], ...] = (*DATABASE_ERRORS, StripeError)

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison came to: events looked at, put in because they were missing, and of those, how many are of a
    type that endpoints are told to deliver (the rest Stripe may have had no order to send)."""

    looked_at: int
    added: int
    missed: int


async def reconcile(
    pool: Pool,
    api: StripeApi,
    *,
    since: int | None = None,
    registry: Registry = handlers.registry,
    mirrored: frozenset[str] = frozenset(),
    at_least_every: float = 0.0,
    progress: Callable[[int], None] = lambda looked_at: None,
) -> Compared | None:
    """Compare from `since` (unix seconds; from where the last one ended when None) until five minutes ago.

    None when another process began less than `at_least_every` seconds ago. Raises StripeError, with everything that
    was found until then stored.
    """
    async with pool.acquire(timeout=10) as db:
        turn = await db.fetchrow(_SQL["begin"], at_least_every)
        if turn is None:
            return None
    until = int(time.time()) - ON_THE_WAY_SECONDS
    begin = since if since is not None else (turn[0] or until - FIRST_SECONDS) - OVERLAP_SECONDS
    looked_at = added = missed = 0
    async for page, last in api.events(created_from=begin, created_to=until):
        wanted = [event for event in map(_event, page) if event is not None and _wanted(event, registry, mirrored)]
        async with pool.acquire(timeout=10) as db, db.transaction():
            missing, never_told = await _missing(db, wanted, mirrored)
            if missing:
                await inbox.put(db, missing, source="reconcile")
            looked_at, added = looked_at + len(page), added + len(missing)
            missed += sum(event.type in handlers.supported_types() for event in never_told)
            if last:
                # In the transaction of the last page: killed before, everything is compared again.
                await db.execute(_SQL["finish"], until, missed)
        progress(looked_at)
    happened("reconciled", looked_at=looked_at, added=added, missed=missed)
    return Compared(looked_at, added, missed)


async def keep_reconciling(
    pool: Pool, api: StripeApi, rng: random.Random, mirrored: frozenset[str] = frozenset()
) -> None:
    """Compare every fifteen minutes, one process of many, until cancelled."""
    while True:
        try:
            await reconcile(pool, api, mirrored=mirrored, at_least_every=EVERY_SECONDS)
        except _NOT_NOW as error:
            happened("reconcile_failed", error=type(error).__name__)
        # Shorter than the interval: the process whose turn it was may have gone.
        await asyncio.sleep(rng.uniform(0.9, 1.1) * EVERY_SECONDS / 5)


def _event(said: dict[str, object]) -> Event | None:
    try:
        return parse(msgspec.json.format(_encode(said), indent=2), received=time.time())
    except PayloadError:
        return None


def _wanted(event: Event, registry: Registry, mirrored: frozenset[str]) -> bool:
    return bool(projections.table_of(event) or registry.of(event.type)) or mirror.wants(event, mirrored)


async def _missing(db: Connection, events: list[Event], mirrored: frozenset[str]) -> tuple[list[Event], list[Event]]:
    """Those of `events` to be put in; and of these, what nobody has told yet.

    A thin event tells what the snapshot does that it names; but only the snapshot shows the object as it is mirrored.
    """
    known = {event_id for (event_id,) in await db.fetch(_SQL["known"], [event.id for event in events])}
    unknown = list({event.id: event for event in events if event.id not in known}.values())
    told = {event_id for (event_id,) in await db.fetch(_SQL["told"], [event.id for event in unknown])}
    never_told = [event for event in unknown if event.id not in told]
    return [event for event in unknown if event.id not in told or mirror.wants(event, mirrored)], never_told
