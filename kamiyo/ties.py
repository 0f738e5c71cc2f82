"""Projecting a batch, and the cases that ranks alone do not decide.

When two events of one object share Stripe's second, and rank, and say different things: which is later?

The answer is computed from *all* events of that second together, so it is the same in whatever order they came.
Evidence, from the strongest down:

1. They say the same of every column that is kept: nothing to decide.
2. `previous_attributes` tell the row before each change. Seen as steps from one state to another, the events form a
   trail; where exactly one state is entered once more than it is left, the trail ends there. This holds even when
   a value changes and changes back.
3. An event that still shows the values which another says it replaced is the older one. Where that makes one event
   later than all others, and none of it contradicts itself, that one is the latest. Two that say it of each other
   have seen a value change and change back: then what either shows tells nothing.

All of it is weighed in columns, which are the same in every API version, and not in Stripe's words, which are not.

Otherwise nothing in the events tells, and nobody guesses: the row is marked `undecided`, to be read from Stripe.
"""

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from kamiyo import inbox, projections, shapes
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.projections import Kept, ProjectionError, Row, Standing, Stored
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
    return await project_rows(db, [row for _, row in told])


async def project_rows(db: Connection, rows: Sequence[Row]) -> set[str]:
    """The same for rows of whatever origin: events, or reads from Stripe's API."""
    if any(row.is_stub for row in rows):
        await projections.begin_to_write(db)  # a stub is merged when the others are written, whichever its table is
    before = await projections.write(db, projections.highest(row for row in rows if not row.is_stub))
    groups: dict[projections.Place, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.place].append(row)
    superseded: set[str] = set()
    for place, group in groups.items():
        superseded |= await _settle_object(db, group, before.get(place))
    return superseded


async def _settle_object(db: Connection, group: Sequence[Row], standing: Standing | None) -> set[str]:
    """What set-based writing could not decide for one object; returns the ids of superseded events."""
    top = max(row.rank for row in group)
    if standing is not None and standing.rank > top:
        top = standing.rank
    settled = None
    if any(row.is_stub for row in group) or (standing is not None and standing.is_stub):
        settled = await _merge_stub(db, group)
    elif _is_contested(group, standing, top):
        settled = await _settle(db, group, standing, top)
    if settled is not None and settled.evidence == "undecided":
        happened("order_undecided", object_id=settled.id, event_id=settled.event_id)
    return {row.event_id for row in group if row.rank < top or _lost(row, settled)}


def _is_contested(group: Sequence[Row], standing: Standing | None, top: int) -> bool:
    if standing is None or standing.rank < top:
        rivals = {row.event_id for row in group if row.rank == top and not row.is_read}
        return len(rivals) > 1
    if standing.is_read:
        return False  # Stripe itself has said what all events of that second came to
    rivals = {row.event_id for row in group if row.rank == top}
    # An event of lower rank that comes late decides nothing itself. But in the same second it is evidence, and
    # what the others come to must not depend on whether it came before them.
    second = projections.second_of(top)
    return bool(rivals - {standing.event_id}) or any(
        row.rank < top and projections.second_of(row.rank) == second for row in group
    )


def _lost(row: Row, settled: Row | None) -> bool:
    """Whether `row` was weighed against another of its rank, and the other is known to be the later one."""
    return (
        settled is not None
        and settled.evidence == "decided"
        and settled.rank == row.rank
        and settled.values != row.values
        and not row.is_stub
    )


async def _settle(db: Connection, group: Sequence[Row], standing: Standing | None, top: int) -> Row | None:
    """Weigh all events of the object within the second of `top`, write what they come to, and return it."""
    sample = group[0]
    told = await inbox.of_second(db, *sample.key, projections.second_of(top))
    observations = _observations(told, sample.table)
    weighed = {seen.row.event_id for seen in observations}
    all_here = standing is None or standing.rank < top or weighed.issuperset({standing.event_id, *standing.contested})
    if not all_here and (kept := await projections.kept(db, sample.place)):
        # Retention took the body of the one that stands, or of one that contests it, and what would tell with it. What
        # stands goes on to stand, in doubt.
        rivals = [row for row in group if row.rank == top and row.event_id != kept.row.event_id]
        if all(_facts(row) == _facts(kept.row) for row in rivals):
            return None
        latest = projections.marked(kept.row, "undecided")
        await projections.write(db, [latest], force=True)
        return latest
    latest = decide(observations)
    await projections.write(db, [latest], force=True)
    if latest.evidence == "undecided":
        await projections.note_contested(db, sample.place, weighed)
    return latest


async def _merge_stub(db: Connection, group: Sequence[Row]) -> Row | None:
    """A deletion that only says "gone": keep what was last known of the object, and since when it was."""
    sample = group[0]
    # The row is held before anything is looked up. Where nothing is known of it, not even the customer, what comes in
    # meanwhile comes through another lane: it waits here, and is not written over unseen.
    await projections.write(db, [replace(sample, rank=projections.NOTHING)])
    seen = _observations(await inbox.of_object(db, *sample.key), sample.table)
    stored = await projections.reads_of(db, [sample.key])
    read = [row for row in map(_row_of, stored.get(sample.key, ())) if row is not None and row.table == sample.table]
    kept = await projections.kept(db, sample.place)
    if kept is not None and kept.row.rank == projections.NOTHING:
        kept = None
    # Retention takes bodies. What a row says by itself is worth as much where it is known how old that is.
    still = [kept.row] if kept is not None and kept.row.is_stub and kept.shown is not None else []
    stubs = projections.highest(row for row in (*group, *(one.row for one in seen), *read, *still) if row.is_stub)
    if not stubs:
        return None  # the row that it made stands, and nothing comes after it
    [latest] = stubs
    whole = [one for one in seen if not one.row.is_stub]
    second = projections.second_of(max((one.row.rank for one in whole), default=0))
    weighed = [one for one in whole if projections.second_of(one.row.rank) == second]
    known = decide(weighed) if weighed else None
    contested = {one.row.event_id for one in weighed}
    for row in read:
        if not row.is_stub and (known is None or known.rank < row.rank):
            known = row
    shown: tuple[int, str] | None = (known.rank, known.event_id) if known is not None else (projections.NOTHING, "")
    told = {row.event_id for row in (*(one.row for one in whole), *read)}
    if kept is not None and (remembered := _remembered(kept, known, told)):
        known, shown, contested = remembered, kept.shown, set(kept.contested)
    if known is not None and known.rank > latest.rank:
        latest = known
    elif known is not None:
        latest = projections.completed(latest, known)
    await projections.write(db, [latest], force=True)
    await projections.note_shown(db, sample.place, shown if latest.is_stub else None)
    if latest.evidence == "undecided" and contested:
        await projections.note_contested(db, sample.place, contested)
    return latest


def _remembered(kept: Kept, known: Row | None, told: set[str]) -> Row | None:
    """The row as it stands, where it remembers something later than what is `known` from all that was `told`."""
    if known is None:
        return kept.row
    if kept.shown is None:
        return None
    rank, event_id = kept.shown
    if known.rank < rank:
        return kept.row
    if known.rank > rank or told.issuperset({event_id, *kept.contested}):
        return None
    # Of equals, the one whose event is gone goes on to stand: in doubt, where the other says something else.
    ours, theirs = (_facts(projections.completed(kept.row, one)) for one in (kept.row, known))
    return kept.row if ours == theirs else projections.marked(kept.row, "undecided")


def _row_of(stored: Stored) -> Row | None:
    with contextlib.suppress(ProjectionError):
        return projections.row_of_read(stored.read)
    return None  # it could not be applied either


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
    return projections.marked(max((seen.row for seen in candidates), key=lambda row: row.event_id), "undecided")


def _observations(told: Iterable[tuple[Event, datetime]], table: str) -> list[Observation]:
    seen = (_observation(event, received, table) for event, received in told)
    return [one for one in seen if one is not None]


def _observation(event: Event, received: datetime, table: str) -> Observation | None:
    try:
        row = projections.row_of(event, received)
    except ProjectionError:
        return None  # it could not be applied either
    if row is None or row.table != table:
        return None
    before = None
    with contextlib.suppress(ProjectionError):
        before = projections.row_before(event, received)
    return Observation(event, row, before)


def _end_of_trail(observations: Sequence[Observation]) -> tuple[Any, ...] | None:
    balance: Counter[tuple[Any, ...]] = Counter()
    loose: set[tuple[Any, ...]] = set()
    for seen in observations:
        if seen.before is not None:
            balance[seen.row.values] += 1
            balance[seen.before.values] -= 1
        elif projections.begins(seen.event):
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
    looks = [_Look(_facts(seen.row), _replaced(seen)) for seen in candidates]
    newer: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {seen.row.values: set() for seen in candidates}
    for one, look in zip(candidates, looks, strict=True):
        for other, sight in zip(candidates, looks, strict=True):
            if one.row.values != other.row.values and look.still_has(sight.replaced):
                newer[one.row.values].add(other.row.values)
    for _ in newer:  # what is newer than the newer is newer
        for values, above in newer.items():
            newer[values] = above.union(*(newer[higher] for higher in above))
    if any(values in above for values, above in newer.items()):
        return None  # it contradicts itself: a value changed and changed back, and what it is now tells nothing
    latest = [values for values, above in newer.items() if not above]
    return latest[0] if len(latest) == 1 and all(latest[0] in a for v, a in newer.items() if v != latest[0]) else None


@dataclass(frozen=True, slots=True)
class _Look:
    """What an event shows of its object, and what it says it replaced, in columns: no API version words those."""

    now: dict[str, Any]
    replaced: dict[str, Any]

    def still_has(self, replaced: dict[str, Any]) -> bool:
        return bool(replaced) and all(self.now.get(name) == value for name, value in replaced.items())


def _facts(row: Row) -> dict[str, Any]:
    facts = dict(zip(shapes.COLUMNS[row.table], row.values, strict=True))
    if "items" in facts:
        facts["items"] = json.loads(facts["items"])
    metadata = json.loads(facts.pop("metadata"))
    return facts | {f"metadata {name}": value for name, value in metadata.items()}


def _replaced(seen: Observation) -> dict[str, Any]:
    if seen.before is None:
        return {}
    now, before = _facts(seen.row), _facts(seen.before)
    return {name: before.get(name) for name in now | before if now.get(name) != before.get(name)}
