"""What Stripe's API said of an object goes into the billing tables here, whoever asked.

A read is stored and projected in one transaction, so that the events and the reads together are always all that the
tables are made of. The lanes of its object are held meanwhile, as a worker holds them, and never while Stripe is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kamiyo import projections, ties
from kamiyo.database import Connection, load_queries
from kamiyo.errors import PayloadError
from kamiyo.event import decode, lane_of
from kamiyo.projections import ProjectionError, Read, Row

_SQL = load_queries("reads.sql")


@dataclass(slots=True)
class Applied:
    """What became of some reads: the rows they tell, those whose lane was held, those that cannot be read at all.

    A row is what the read says; where something newer is known already, the table says that.
    """

    rows: list[Row] = field(default_factory=list)
    held_up: list[Read] = field(default_factory=list)
    unreadable: list[Read] = field(default_factory=list)


async def apply(db: Connection, reads: Sequence[Read]) -> Applied:
    """Store `reads` and bring the billing tables up to date with them, in the caller's transaction.

    Never waits for a lane: what is `held_up` is to be applied again a moment later. An object may come twice.
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
    kept = await projections.keep_reads(db, fit)
    result.rows = [row for row in map(projections.row_of_read, kept) if row is not None]
    if result.rows:
        await ties.project_rows(db, result.rows)
    return result


@dataclass(frozen=True, slots=True)
class _Free:
    """The lanes that this transaction got, and whose the objects are: customers by (object id, account)."""

    lanes: set[int]
    whose: dict[tuple[str, str], set[str]]


async def _hold(db: Connection, reads: Sequence[Read]) -> _Free:
    ids = [read.object_id for read in reads]
    whose: dict[tuple[str, str], set[str]] = {}
    for object_id, account, customer in await db.fetch(_SQL["whose"], ids, [read.account for read in reads]):
        whose.setdefault((object_id, account), set()).add(customer)
    for read in reads:
        customer = customer_of(read)
        if customer is not None:
            whose.setdefault((read.object_id, read.account), set()).add(customer)
    wanted = sorted({lane for read in reads for lane in _lanes(read, whose)})
    return _Free({lane for (lane,) in await db.fetch(_SQL["try_lanes"], wanted)}, whose)


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
    return projections.reference(value.get("customer")) or projections.reference(value.get("customer_account"))


def _unreadable(read: Read) -> bool:
    try:
        projections.row_of_read(read)
    except ProjectionError:
        return True
    return False
