"""The second door in: events that Stripe has and we do not, though they were never delivered.

An endpoint that was disabled, a delivery that gave up after three days, an outage of the network: Stripe's list of
events (`GET /v1/events`, 30 days) still has them. What is missing goes through the same `inbox.put` as a delivery, with
the same dedupe; so a comparison may run at any time, twice, or be killed anywhere.

Each account and mode is compared by itself: one's own, those with a key, and the connected accounts that events have
come from. How far it is stands in one row, written in the transaction that stores what a page lacked. After a kill the
next comparison goes on behind the last page. Each goes back over an hour that was compared already, because an event
can appear in the list a little late.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import asyncpg
import msgspec

from kamiyo import handlers, inbox, mirror, projections
from kamiyo.database import Connection, Pool, load_queries
from kamiyo.errors import KamiyoError, PayloadError
from kamiyo.event import Event, filed, parse
from kamiyo.handlers import Registry
from kamiyo.stripe_api import StripeApi, StripeGone, StripeRefused
from kamiyo.telemetry import happened

_SQL = load_queries("reconcile.sql")

EVERY_SECONDS = 900.0

#: What is compared again each time.
OVERLAP_SECONDS = 3600
#: Younger events may still be on their way.
ON_THE_WAY_SECONDS = 300
#: How far the first comparison goes back: as long as Stripe itself tries to deliver in live mode.
FIRST_SECONDS = 72 * 3600

# A comparison that takes longer says now and then how far it is.
_TELL_EVERY_SECONDS = 30.0
# Between two connected accounts, so that thousands of them leave most of the requests' budget to others.
_PACE_SECONDS = 0.2

_encode = msgspec.json.Encoder().encode


class TurnLost(KamiyoError):
    """Another process has taken this comparison over, and goes on where it was."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What comparisons came to: events looked at, put in because they were missing, and of those, how many are of a
    type that endpoints are told to deliver (the rest Stripe may have had no order to send). `refused` are connected
    accounts that Stripe does not let us read."""

    looked_at: int
    added: int
    missed: int
    refused: tuple[str, ...] = ()


@dataclass
class _Tally:
    """What all the comparisons of one call have come to so far."""

    progress: Callable[[int], None]
    looked_at: int = 0
    added: int = 0
    missed: int = 0
    refused: list[str] = field(default_factory=list)

    def add(self, looked_at: int, added: int, missed: int) -> None:
        self.looked_at += looked_at
        self.added += added
        self.missed += missed
        self.progress(self.looked_at)


@dataclass(frozen=True, slots=True)
class _Window:
    """Events created from one unix second to another, both inclusive, from the newest down; behind `after` if set."""

    begin: int
    end: int
    after: str = ""


async def reconcile(
    pool: Pool,
    api: StripeApi,
    *,
    since: int | None = None,
    registry: Registry = handlers.registry,
    own_account: str = "",
    mirrored: frozenset[str] = frozenset(),
    at_least_every: float = 0.0,
    progress: Callable[[int], None] = lambda looked_at: None,
) -> Compared | None:
    """Compare every account that can be read, from `since` (unix seconds; from where the last comparison ended when
    None) until five minutes ago. `own_account` is the id of one's own account, where it is known.

    None when it is no account's turn: each was begun less than `at_least_every` seconds ago, or is in another process's
    hands. Raises StripeError once all have been tried, with everything that was found until then stored; at once where
    Stripe is away.
    """
    tally, turns, error = _Tally(progress), 0, None
    async for account, livemode in _due(pool, api, at_least_every):
        comparison = _Comparison(pool, api, account, livemode, registry, mirrored, own_account, tally)
        try:
            turns += await comparison.run(since, at_least_every)
        except StripeRefused as refused:
            if (account, livemode) in api.keyed:
                error = error or refused
            else:
                happened("reconcile_refused", account=account, livemode=livemode)
                tally.refused.append(account)
        except TurnLost:
            continue
    if error is not None:
        raise error
    return (
        Compared(tally.looked_at, tally.added, tally.missed, tuple(tally.refused)) if turns or tally.refused else None
    )


async def keep_reconciling(
    pool: Pool,
    api: StripeApi,
    rng: random.Random,
    *,
    own_account: str = "",
    mirrored: frozenset[str] = frozenset(),
) -> None:
    """Compare each account every fifteen minutes, one process of many, until cancelled."""
    while True:
        try:
            await reconcile(pool, api, own_account=own_account, mirrored=mirrored, at_least_every=EVERY_SECONDS)
        except Exception as error:
            # One that nobody thought of as well: it must not end what fetches all that was never delivered.
            happened("reconcile_failed", error=type(error).__name__)
        # Shorter than the interval: the process whose turn it was may have gone.
        await asyncio.sleep(rng.uniform(0.9, 1.1) * EVERY_SECONDS / 5)


async def _due(pool: Pool, api: StripeApi, at_least_every: float) -> AsyncIterator[tuple[str, bool]]:
    for account in await _whose_turn(pool, api.keyed, at_least_every):
        yield account
    async with pool.acquire(timeout=10) as db:
        seen = [(row["account"], row["livemode"]) for row in await db.fetch(_SQL["seen"])]
    connected = [one for one in seen if one not in api.keyed and api.reaches(*one)]
    for number, account in enumerate(await _whose_turn(pool, connected, at_least_every)):
        if number:
            await asyncio.sleep(_PACE_SECONDS)
        yield account


async def _whose_turn(
    pool: Pool, accounts: Sequence[tuple[str, bool]], at_least_every: float
) -> list[tuple[str, bool]]:
    ids, modes = [account for account, _ in accounts], [livemode for _, livemode in accounts]
    async with pool.acquire(timeout=10) as db:
        return [(row["account"], row["livemode"]) for row in await db.fetch(_SQL["due"], ids, modes, at_least_every)]


@dataclass
class _Comparison:
    """One account, in one mode, compared once."""

    pool: Pool
    api: StripeApi
    account: str
    livemode: bool
    registry: Registry
    mirrored: frozenset[str]
    own_account: str
    tally: _Tally
    _run: int = 0
    _cursor: int | None = None
    _told: float = field(default_factory=time.monotonic)

    async def run(self, since: int | None, at_least_every: float) -> bool:
        """Whether it was this account's turn. Raises TurnLost when another process takes it over, and StripeError."""
        async with self.pool.acquire(timeout=10) as db:
            turn = await db.fetchrow(_SQL["begin"], self.account, self.livemode, at_least_every)
        if turn is None:
            return False
        self._run, self._cursor = turn["run"], turn["compared_to"]
        try:
            broken = self._broken_off(turn, since)
            if broken is not None:
                await self._resume(broken)
                since = None if since is None else max(since, broken.end - OVERLAP_SECONDS)
            await self._compare(self._window(since))
        except StripeRefused:
            if (self.account, self.livemode) not in self.api.keyed:
                await self._write("refused")
            raise
        return True

    def _broken_off(self, turn: asyncpg.Record, since: int | None) -> _Window | None:
        """The window that the last comparison left unfinished, where it serves this one as well."""
        if turn["after_event"] is None or (since is not None and turn["window_from"] > since):
            return None
        return _Window(turn["window_from"], turn["window_to"], turn["after_event"])

    async def _resume(self, broken: _Window) -> None:
        try:
            await self._compare(broken)
        except (StripeRefused, StripeGone):
            # Most likely Stripe has forgotten the event that it stood at. If it is the key, the next try says so.
            await self._write("restart")

    def _window(self, since: int | None) -> _Window:
        until = int(time.time()) - ON_THE_WAY_SECONDS
        if since is None:
            since = (self._cursor or until - FIRST_SECONDS) - OVERLAP_SECONDS
        return _Window(since, until)

    async def _compare(self, window: _Window) -> None:
        """Page through the window; each page, with how far it is, is one transaction."""
        looked_at = added = missed = 0
        pages = self.api.events(
            created_from=window.begin,
            created_to=window.end,
            account=self.account,
            livemode=self.livemode,
            after_event=window.after,
        )
        async for page, last in pages:
            found = [event for event in map(self._event, page) if event is not None]
            wanted = [event for event in found if _wanted(event, self.registry, self.mirrored)]
            async with self.pool.acquire(timeout=10) as db, db.transaction():
                missing, never_told = await _missing(db, wanted, self.mirrored)
                if missing:
                    await inbox.put(db, missing, source="reconcile")
                late = sum(event.type in handlers.supported_types() for event in never_told)
                await self._note(db, window, page, late, last=last)
            looked_at, added, missed = looked_at + len(page), added + len(missing), missed + late
            self.tally.add(len(page), len(missing), late)
            if page and time.monotonic() - self._told >= _TELL_EVERY_SECONDS:
                self._told = time.monotonic()
                back_to = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(page[-1]["created"]))
                happened("reconciling", account=self.account, looked_at=looked_at, added=added, back_to=back_to)
        happened(
            "reconciled",
            account=self.account,
            livemode=self.livemode,
            looked_at=looked_at,
            added=added,
            missed=missed,
        )

    async def _note(
        self, db: Connection, window: _Window, page: Sequence[dict[str, object]], late: int, *, last: bool
    ) -> None:
        mine = (self.account, self.livemode, self._run)
        if last:
            # Killed before this commit, the comparison goes on behind the page before.
            compared_to = window.end if self._joins(window) else None
            row = await db.fetchrow(_SQL["finish"], *mine, late, compared_to, bool(window.after))
            if row is not None:
                [self._cursor] = row
        else:
            row = await db.fetchrow(_SQL["advance"], *mine, window.begin, window.end, page[-1]["id"], late)
        if row is None:
            raise TurnLost(f"the comparison of {self.account or 'the own account'} was taken over")

    def _joins(self, window: _Window) -> bool:
        """Whether everything before the window has been compared: otherwise the cursor would jump over a gap."""
        return window.begin <= (window.end - FIRST_SECONDS if self._cursor is None else self._cursor)

    async def _write(self, query: str) -> None:
        async with self.pool.acquire(timeout=10) as db:
            await db.execute(_SQL[query], self.account, self.livemode, self._run)

    def _event(self, said: dict[str, object]) -> Event | None:
        # Asked for in an account's name, Stripe's list leaves out whose it is; a delivery says so.
        whole = said if said.get("account") or not self.account else {**said, "account": self.account}
        try:
            event = parse(_written(whole), received=time.time())
        except PayloadError:
            return None
        return filed(event, own=self.own_account)


def _written(said: dict[str, object]) -> bytes:
    try:
        return msgspec.json.format(_encode(said), indent=2)
    except (ValueError, OverflowError, RecursionError):
        # Half a surrogate pair, say: JSON has a way to write it, UTF-8 has none.
        return json.dumps(said, ensure_ascii=True, indent=2).encode()


def _wanted(event: Event, registry: Registry, mirrored: frozenset[str]) -> bool:
    return bool(projections.table_of(event) or registry.of(event.type)) or mirror.wants(event, mirrored)


async def _missing(
    db: Connection, events: Sequence[Event], mirrored: frozenset[str]
) -> tuple[list[Event], list[Event]]:
    """Those of `events` to be put in; and of these, what nobody has told yet.

    A thin event tells what the snapshot does that it names; but only the snapshot shows the object as it is mirrored.
    """
    known = {event_id for (event_id,) in await db.fetch(_SQL["known"], [event.id for event in events])}
    unknown = list({event.id: event for event in events if event.id not in known}.values())
    told = {event_id for (event_id,) in await db.fetch(_SQL["told"], [event.id for event in unknown])}
    never_told = [event for event in unknown if event.id not in told]
    return [event for event in unknown if event.id not in told or mirror.wants(event, mirrored)], never_told
