"""What Stripe's API said of an object goes into the billing tables here, whoever asked; and to the events it is about.

A read is stored and projected in one transaction, so that the events and the reads together are always all that the
tables are made of. The lanes of its object are held meanwhile, as a worker holds them, and never while Stripe is asked.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kamiyo import projections, shapes, ties
from kamiyo.database import Connection, load_queries
from kamiyo.errors import PayloadError
from kamiyo.event import Event, decode, lane_of
from kamiyo.projections import ProjectionError, Read, Row, Stored
from kamiyo.refused import Refusal, write_apart
from kamiyo.shapes import PATHS

_SQL = load_queries("reads.sql")

#: Stripe could not make an event for a while, and names one it could not make: its object is read. Source: Stripe's
#: Python library, `V2CoreHealthEventGenerationFailureResolvedEvent`.
GENERATION_FAILED = "v2.core.health.event_generation_failure.resolved"

_PATH = re.compile(r"/v[12](/[A-Za-z0-9_.-]+)+")


# ── What an event is about ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a thin event's object: the read that ranks highest, and the object as it was read last."""

    read: Read
    body: bytes


def key_of(event: Event) -> tuple[str, str, bool]:
    """Under which key the reads of what a thin event is about are kept: id, account, livemode."""
    return event.object_id or event.id, event.account, event.livemode


def wanted(event: Event, *, handled: bool) -> bool:
    """Whether what a thin event is about is to be read: it has a billing table, or the event has `handled`rs."""
    if event.type == GENERATION_FAILED or projections.table_of_type(event.object_type):
        return path_of(event) is not None
    return handled and path_of(event) is not None


def path_of(event: Event) -> str | None:
    """Where Stripe's API has what a thin event is about; None where it is about nothing that could be read."""
    if event.type == GENERATION_FAILED:
        # The delivery only says that something failed; what it was is in the event as the API has it.
        return f"/v2/core/events/{event.id}"
    if event.object_id is None:
        return None
    known = PATHS.get(event.object_type or "")
    return f"{known}/{event.object_id}" if known else path_in(event.payload.get("related_object"))


def path_in(related: Any) -> str | None:
    """The `url` of a `related_object`, if it is a path below Stripe's API."""
    url = related.get("url") if isinstance(related, dict) else None
    return url if isinstance(url, str) and _PATH.fullmatch(url) else None


def for_event(event: Event, second: int, stored: Sequence[Stored]) -> Found | None:
    """What is kept of a thin event's object, if it was asked for after `second` was over; None: it must be read.

    An event that ends a life must be known to have done so, since the object may not show when.
    """
    if not stored or max(one.asked_to for one in stored) <= second:
        return None
    if projections.ends(event) and all(one.read.ended is None for one in stored):
        return None
    best = max(stored, key=lambda one: projections.rank_of_read(one.read))
    # What is gone does not come back: of one second, that is the later.
    latest = max(stored, key=lambda one: (one.asked_to, one.read.gone))
    return Found(best.read, latest.read.body)


# ── Into the tables ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Applied:
    """What became of some reads: the rows they tell, those whose lane was held, those that cannot be read at all, and
    what only PostgreSQL refuses.

    A row is what the read says; where something newer is known already, the table says that.
    """

    rows: list[Row] = field(default_factory=list)
    held_up: list[Read] = field(default_factory=list)
    unreadable: list[Read] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


async def apply(db: Connection, reads: Sequence[Read]) -> Applied:
    """Store `reads` and bring the billing tables up to date with them, in the caller's transaction.

    Never waits for a lane: what is `held_up` is to be applied again a moment later. An object may come twice. What is
    `refused` is not stored either: a rebuild makes its tables of all reads there are.
    """
    result = Applied()
    free = await _hold(db, reads)
    fit = []
    for read in reads:
        if not _lanes(read, free.whose) <= free.lanes:
            result.held_up.append(read)
        elif _unreadable(read):
            result.unreadable.append(read)
        else:
            fit.append(read)

    async def take_in(some: Sequence[Read]) -> None:
        kept = await projections.keep_reads(db, some)
        rows = [row for row in map(projections.row_of_read, kept) if row is not None]
        if rows:
            await ties.project_rows(db, rows)
        result.rows += rows

    result.refused = [_refusal(*one) for one in await write_apart(db, fit, take_in)]
    return result


def _refusal(read: Read, why: str) -> Refusal:
    place = projections.table_of_type(read.object_type) or read.object_type
    return Refusal(place, *read.key, read.source, projections.rank_of_read(read), why)


@dataclass(frozen=True, slots=True)
class _Free:
    """The lanes that this transaction got, and whose the objects are: customers by (object id, account)."""

    lanes: set[int]
    whose: dict[tuple[str, str], set[str]]


async def _hold(db: Connection, reads: Sequence[Read]) -> _Free:
    whose = await _whose(db, reads)
    for read in reads:
        customer = customer_of(read)
        if customer is not None:
            whose.setdefault((read.object_id, read.account), set()).add(customer)
    wanted = sorted({lane for read in reads for lane in _lanes(read, whose)})
    return _Free({lane for (lane,) in await db.fetch(_SQL["try_lanes"], wanted)}, whose)


async def _whose(db: Connection, reads: Sequence[Read]) -> dict[tuple[str, str], set[str]]:
    whose: dict[tuple[str, str], set[str]] = {}
    objects = [read.object_id for read in reads], [read.account for read in reads]
    for object_id, account, customer in await db.fetch(_SQL["whose"], *objects):
        whose.setdefault((object_id, account), set()).add(customer)
    return whose


async def whose(db: Connection, read: Read) -> str | None:
    """The customer in whose lane the events of an object belong: as the read says, or else as the tables knew it."""
    known = await _whose(db, [read])
    return customer_of(read) or min(known.get((read.object_id, read.account), ()), default=None)


def _lanes(read: Read, whose: dict[tuple[str, str], set[str]]) -> set[int]:
    # Its events go through its customer's lane, and through its own where Stripe named no customer.
    owners = {read.object_id, *whose.get((read.object_id, read.account), ())}
    return {lane_of(read.account, owner) for owner in owners}


def customer_of(read: Read) -> str | None:
    """Whose the object is, as the read says; None where it does not."""
    if read.object_type == "customer":
        return read.object_id
    try:
        value = decode(read.body) if read.body else {}
    except PayloadError:
        return None
    return shapes.reference(value.get("customer")) or shapes.reference(value.get("customer_account"))


def _unreadable(read: Read) -> bool:
    try:
        projections.row_of_read(read)
    except ProjectionError:
        return True
    return False
