"""The billing tables from Stripe's own lists: for tables that begin empty, and for what no event will ever tell.

Each page goes in by one transaction, together with how far the list has been gone through: killed at any moment, the
next run goes on from there. Every object takes its place among the events as any read does, so it never overwrites
anything newer, and events may stream in meanwhile.

Stripe lists an account's objects newest first. Where a run goes on is a second of `created`, not an object: an object
may be deleted before anybody can go on behind it. The objects of that one second are read twice, which does no harm.

Payment methods have no list of their own; they are listed customer by customer (Stripe's API reference, "List a
Customer's PaymentMethods": the list at `/v1/payment_methods` is for other purposes).
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kamiyo import reads
from kamiyo.database import Pool, load_queries
from kamiyo.errors import KamiyoError
from kamiyo.projections import Read
from kamiyo.shapes import TABLES
from kamiyo.stripe_api import Reply, StripeApi, StripeGone, StripeRefused, together
from kamiyo.telemetry import happened

_SQL = load_queries("backfill.sql")

#: What can be filled, in the order in which all of it is.
COLLECTIONS = TABLES

# A long run outlives a longer absence of Stripe's than an event's read does.
_PATIENCE_SECONDS = 600.0

# Objects that go in by one transaction. Each takes two lanes, and PostgreSQL's table of locks is everybody's: the cards
# of a hundred customers are not bounded by a page.
_AT_ONCE = 500

# How often the list of a customer's cards is begun: each time one more of them must have gone between two pages.
_MOST_STARTS = 5

# How soon a page that met a held lane is tried again: a handler may take its time.
_LANE_SECONDS = (0.02, 1.0)


class BackfillTakenOver(KamiyoError):
    """Another run of the same backfill has begun; it goes on from where this one was."""


@dataclass(frozen=True, slots=True)
class Filled:
    """What a run did to one collection: objects read in all its runs together, those that could not be read, and those
    that PostgreSQL refused."""

    collection: str
    objects: int
    unreadable: int
    refused: int


Progress = Callable[[str, int], None]


def _silent(collection: str, objects: int) -> None:
    pass


async def backfill(
    pool: Pool,
    api: StripeApi,
    collections: Sequence[str] = COLLECTIONS,
    *,
    account: str = "",
    restart: bool = False,
    progress: Progress = _silent,
) -> list[Filled]:
    """Fill `collections` (of COLLECTIONS) of an account, '' being the key's own; return what was done to each.

    Goes on with what an earlier run left unfinished; where nothing is unfinished, or with `restart`, begins with the
    newest. `progress` hears a collection and how many of its objects are in. Raises StripeError, with everything that
    was filled until then kept, and BackfillTakenOver.
    """
    run = uuid.uuid4()
    async with pool.acquire(timeout=10) as db:
        begun = await db.fetch(_SQL["begin"], account, api.livemode, list(collections), run, restart)
    done = []
    for row in sorted(begun, key=lambda row: COLLECTIONS.index(row["collection"])):
        one = _Run(pool, api, account, row["collection"], run, progress)
        done.append(await one.fill(row["filled_from"], row["objects"]))
        happened("backfilled", collection=row["collection"], count=done[-1].objects, account=account)
    return done


@dataclass
class _Run:
    """One list on its way into its table."""

    pool: Pool
    api: StripeApi
    account: str
    collection: str
    run: uuid.UUID
    progress: Progress
    unreadable: int = 0
    refused: int = 0

    async def fill(self, filled_from: int | None, objects: int) -> Filled:
        self.progress(self.collection, objects)
        whose = self.collection == "payment_methods"
        path = "/v1/customers" if whose else f"/v1/{self.collection}"
        # Without it Stripe leaves the canceled ones out.
        params = {"status": "all"} if self.collection == "subscriptions" else {}
        async for page, last in self._pages(path, params, filled_from):
            listed = page.value["data"]
            found = await self._payment_methods(listed) if whose else [self._read(one, page) for one in listed]
            objects = await self._take_in(found, _oldest(listed), last)
            self.progress(self.collection, objects)
            if last:
                break
        return Filled(self.collection, objects, self.unreadable, self.refused)

    async def _pages(self, path: str, params: dict[str, Any], since: int | None) -> AsyncIterator[tuple[Reply, bool]]:
        while True:
            within = params if since is None else params | {"created": {"lte": since}}
            begun_at, pages = since, 0
            try:
                async for page, last in self.api.pages(path, within, account=self.account, patience=_PATIENCE_SECONDS):
                    pages += 1
                    since = _oldest(page.value["data"]) or since
                    yield page, last
                return
            except (StripeGone, StripeRefused):
                # The object behind which the next page begins may be deleted by now: then go on from its second. If
                # that is where this began, it is something else.
                if not pages or since == begun_at:
                    raise

    async def _payment_methods(self, customers: Iterable[dict[str, Any]]) -> list[Read]:
        asked = await together(self._payment_methods_of(one["id"]) for one in customers)
        return [read for found in asked for read in found]

    async def _payment_methods_of(self, customer: str) -> list[Read]:
        path, found = f"/v1/customers/{customer}/payment_methods", list[Read]()
        for start in range(1, _MOST_STARTS + 1):
            found.clear()
            try:
                async for page, _ in self.api.pages(path, account=self.account, patience=_PATIENCE_SECONDS):
                    found += [self._read(one, page) for one in page.value["data"]]
                break
            except StripeGone:
                break  # deleted since it was listed; an event tells
            except StripeRefused:
                # The card behind which the next page begins may be detached by now, and this list cannot go on from a
                # second. Where not even a first page was given, it is something else.
                if not found or start == _MOST_STARTS:
                    raise
        return found

    async def _take_in(self, found: Sequence[Read], oldest: int | None, last: bool) -> int:
        # In pieces: what is in is in, and the page counts when all of it is. What meets a lane in a worker's hands
        # comes again, behind the others.
        waiting, wait = list(found), _LANE_SECONDS[0]
        while True:
            async with self.pool.acquire(timeout=10) as db, db.transaction():
                applied = await reads.apply(db, waiting[:_AT_ONCE])
                waiting = waiting[_AT_ONCE:] + applied.held_up
                objects: int | None = None
                if not waiting:
                    objects = await db.fetchval(
                        *(_SQL["turn"], self.account, self.api.livemode, self.collection, self.run),
                        *(oldest, len(found), last),
                    )
                    if objects is None:
                        raise BackfillTakenOver(
                            f"another run is filling {self.collection} now; this one has stopped, and nothing is lost"
                        )
            for read in applied.unreadable:
                self.unreadable += 1
                happened("object_unreadable", object_type=read.object_type, object_id=read.object_id)
            for refusal in applied.refused:
                self.refused += 1
                refusal.tell()
            if objects is not None:
                return objects
            if applied.held_up:
                await asyncio.sleep(wait)
                wait = min(wait * 2, _LANE_SECONDS[1])

    def _read(self, one: dict[str, Any], page: Reply) -> Read:
        # `ensure_ascii` also for half a surrogate pair, which JSON allows and UTF-8 does not.
        body = json.dumps(one, ensure_ascii=True, separators=(",", ":")).encode()
        livemode = one.get("livemode", self.api.livemode) is True
        return Read(one["object"], one["id"], self.account, livemode, body, page.second, "backfill")


def _oldest(listed: Sequence[dict[str, Any]]) -> int | None:
    """Stripe's second of the last object on a page; None for an empty one."""
    return listed[-1].get("created") if listed else None
