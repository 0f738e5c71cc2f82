"""Projecting a batch, and the cases that ranks alone do not decide.

When two events of one object share Stripe's second, and rank, and say different things: which is later?

The answer is computed from *all* events of that second together, so it is the same in whatever order they came.
Evidence, from the strongest down:

1. They say the same of every column that is kept: nothing to decide.
2. `previous_attributes` tell the row before each change. Seen as steps from one state to another, the events form a
   trail; where exactly one state is entered once more than it is left, the trail ends there. This holds even when
   a value changes and changes back.
3. An event whose object still has the values that another says it replaced is the older one. Where that makes one
   event later than all others, and none of it contradicts itself, that one is the latest.

Otherwise nothing in the events tells, and nobody guesses: the row is marked `undecided`, to be read from Stripe.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kamiyo import inbox, projections
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.projections import ProjectionError, Row, Standing
from kamiyo.telemetry import happened

# Pairs are compared; a second with more events of one object than this is left to Stripe to explain.
_MOST_COMPARED = 60


@dataclass(frozen=True, slots=True)
class Observation:
    """One event of the contested second: its row, the row before it where it says, and the event."""

    event: Event
    row: Row
    before: Row | None


async def project(db: Connection, told: Sequence[tuple[Event, Row]]) -> set[str]:
    """Bring the billing tables up to date with what `told` says, ties and stubs included.

    Returns the ids of the events whose object has moved on already: a newer state is applied. The caller holds the
    lanes of all these objects, and owns the transaction.
    """
    stubs = {event.id for event, _ in told if projections.is_stub(event)}
    before = await projections.write(
        db, projections.highest(row for _, row in told if row.event_id not in stubs)
    )
    groups: dict[projections.Place, list[tuple[Event, Row]]] = defaultdict(list)
    for event, row in told:
        groups[row.place].append((event, row))
    superseded: set[str] = set()
    for place, group in groups.items():
        superseded |= await _settle_object(db, group, before.get(place), stubs)
    return superseded


async def _settle_object(
    db: Connection, group: Sequence[tuple[Event, Row]], standing: Standing | None, stubs: set[str]
) -> set[str]:
    """What set-based writing could not decide for one object; returns the ids of superseded events."""
    top = max(row.rank for _, row in group)
    if standing is not None and standing.rank > top:
        top = standing.rank
    at_top = {row.event_id: (event, row) for event, row in group if row.rank == top}
    rivals = at_top.keys() | ({standing.event_id} if standing is not None and standing.rank == top else set())
    if stubs.intersection(row.event_id for _, row in group) or (standing is not None and standing.is_stub):
        await _merge_stub(db, group, top)
    elif at_top and len(rivals) > 1:
        event, row = next(iter(at_top.values()))
        settled = await _settle(db, row, event.created)
        if settled.evidence == "undecided":
            happened("order_undecided", object_id=settled.id, event_id=settled.event_id)
    return {row.event_id for _, row in group if row.rank < top}


async def _settle(db: Connection, row: Row, second: int) -> Row:
    """Weigh the events of `row`'s object within `second`, write what they come to, and return it."""
    told = await inbox.of_second(db, row.id, row.account, row.livemode, second)
    observations = [found for event, received in told if (found := _observation(event, received, row.table))]
    # Without bodies to weigh (retention took them), what tells is gone too.
    latest = decide(observations) if observations else projections.marked(row, "undecided")
    await projections.write(db, [latest], force=True)
    return latest


async def _merge_stub(db: Connection, group: Sequence[tuple[Event, Row]], top: int) -> None:
    """A deletion that only says "gone": keep what was last known of the customer, and when they were deleted."""
    sample = group[0][1]
    known = {row.event_id: (event, row) for event, row in group}
    for event, received in await inbox.of_object(db, sample.id, sample.account, sample.livemode):
        seen = _observation(event, received, sample.table)
        if seen is not None:
            known.setdefault(event.id, (event, seen.row))
    [last] = projections.highest(row for _, row in known.values())
    if last.rank < top:
        return  # the deletion itself is past its retention; the row it left stands
    whole = projections.highest(row for event, row in known.values() if not projections.is_stub(event))
    if whole and whole[0] is not last:
        last = replace(last, values=(*whole[0].values[:-1], last.values[-1]))
    await projections.write(db, [last], force=True)


def decide(observations: Sequence[Observation]) -> Row:
    """The row that the events of one second come to, marked `undecided` where they do not tell. Never empty."""
    top = max(seen.row.rank for seen in observations)
    candidates = [seen for seen in observations if seen.row.rank == top]
    states = {seen.row.values for seen in candidates}
    final = states.pop() if len(states) == 1 else _end_of_trail(observations) or _later_than_all(candidates)
    if final is not None:
        told_by = [seen.row for seen in candidates if seen.row.values == final]
        if told_by:
            return min(told_by, key=lambda row: row.event_id)
    return projections.marked(
        max((seen.row for seen in candidates), key=lambda row: row.event_id), "undecided"
    )


def _observation(event: Event, received: Any, table: str) -> Observation | None:
    try:
        row = projections.row_of(event, received)
        before = projections.row_before(event, received)
    except ProjectionError:
        return None  # it could not be applied either
    return Observation(event, row, before) if row is not None and row.table == table else None


def _end_of_trail(observations: Sequence[Observation]) -> tuple[Any, ...] | None:
    balance: Counter[tuple[Any, ...]] = Counter()
    loose: set[tuple[Any, ...]] = set()
    for seen in observations:
        if seen.before is not None:
            balance[seen.row.values] += 1
            balance[seen.before.values] -= 1
        elif seen.event.type.endswith(".created"):
            balance[seen.row.values] += 1  # entered from nothing
        else:
            loose.add(seen.row.values)
    # A state that nothing leads to or from could stand anywhere in the second, so also at its end.
    if not loose <= balance.keys():
        return None
    ends = [values for values, entered in balance.items() if entered > 0]
    return ends[0] if len(ends) == 1 and balance[ends[0]] == 1 else None


def _later_than_all(candidates: Sequence[Observation]) -> tuple[Any, ...] | None:
    if len(candidates) > _MOST_COMPARED:
        return None
    newer: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {seen.row.values: set() for seen in candidates}
    for one in candidates:
        for other in candidates:
            if one.row.values != other.row.values and _is_older(one.event, other.event):
                newer[one.row.values].add(other.row.values)
    for _ in newer:  # what is newer than the newer is newer
        for values, above in newer.items():
            newer[values] = above.union(*(newer[higher] for higher in above))
    if any(values in above for values, above in newer.items()):
        return None  # it contradicts itself
    latest = [values for values, above in newer.items() if not above]
    return (
        latest[0]
        if len(latest) == 1 and all(latest[0] in a for v, a in newer.items() if v != latest[0])
        else None
    )


def _is_older(one: Event, other: Event) -> bool:
    return _still_has(one.object, other.previous_attributes) and not _still_has(
        other.object, one.previous_attributes
    )


def _still_has(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return bool(before) and all(_same(now.get(name), value) for name, value in before.items())


def _same(now: Any, before: Any) -> bool:
    if isinstance(before, dict) and isinstance(now, dict):
        return all(_same(now.get(name), value) for name, value in before.items())
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_same, now, before))
    return bool(now == before)
