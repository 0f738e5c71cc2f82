"""What a switch to another API version would change: each event compared with its twin, field by field.

The twins are what the shadow endpoint delivered (`kamiyo/shadow.py`). Both are projected in memory, by the same code
that writes the billing tables; nothing is written. Two things are compared:

    columns   what the billing tables would say: where one differs, a switch changes the tables
    shape     the fields of the object itself, which handlers read: gone, new, of another kind, of another value

**Pairs.** Two endpoints of different versions get events of different ids. Twins are of one type, object, account,
mode and second, and name the same API request where there is one. Where several of both fit, those are paired that
differ least. An id that both have would settle it at once.

No value is ever told: only the names of fields, counts, and ids of events to look at.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import asyncpg

from kamiyo import projections
from kamiyo.database import Connection, load_queries
from kamiyo.errors import PayloadError
from kamiyo.event import Event
from kamiyo.projections import ProjectionError, Row
from kamiyo.shapes import COLUMNS

_SQL = load_queries("shadow.sql")

#: Twins that are compared at a time.
_CHUNK = 500
#: More events than this of one object, type, second and request are left uncompared: which is whose nobody can tell.
_MOST_TO_CHOOSE_FROM = 8
_EXAMPLES = 3
_DAWN = datetime(1, 1, 1, tzinfo=UTC)

# A key that is no field of Stripe's may be the user's own text.
_FIELD = re.compile(r"[a-z][a-z0-9_]{0,59}")


@dataclass
class Counted:
    """How often, and some of the events for example."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, *events: str, count: int = 1) -> None:
        """Once more, in this event, or in these twins."""
        self.count += count
        if len(self.examples) < _EXAMPLES:
            self.examples.append(" ".join(events))


@dataclass
class TypeReport:
    """What the comparison of one event type came to.

    `pairs` are those compared, of which `alike` agree in every column. `columns` says of each column in how many pairs
    it was compared, `differing` where they do not agree; `shape` names the object's own fields that changed, by what
    became of them (`gone`, `new`, `kind`, `value`) and path. `unreadable` are objects that the projection refuses, by
    side and reason.
    """

    pairs: int = 0
    alike: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    differing: dict[str, Counted] = field(default_factory=lambda: defaultdict(Counted))
    shape: dict[tuple[str, str], Counted] = field(default_factory=lambda: defaultdict(Counted))
    unreadable: dict[tuple[str, str], Counted] = field(default_factory=lambda: defaultdict(Counted))
    without_twin: Counted = field(default_factory=Counted)
    without_real: Counted = field(default_factory=Counted)
    not_compared: Counted = field(default_factory=Counted)

    @property
    def only(self) -> str | None:
        """`real` or `shadow` where only that side receives this type."""
        if self.pairs or self.not_compared.count:
            return None
        return "shadow" if not self.without_twin.count else "real" if not self.without_real.count else None

    @property
    def changes(self) -> bool:
        """Whether a switch would change what Kamiyo makes of this type, or something is missing to say so."""
        refused = any(side == "shadow" for side, _ in self.unreadable)
        missing = self.without_twin.count or (self.without_real.count and self.only is None)
        untold = self.not_compared.count and not self.pairs
        return bool(self.differing or refused or missing or untold)


@dataclass
class Report:
    """The whole comparison. `since` is when the twin endpoint first delivered, None where it never has.

    `versions` counts the API versions seen, by side. `real` and `shadow` are the two sides' names throughout.
    """

    since: datetime | None
    until: datetime
    versions: dict[str, Counter[str]] = field(default_factory=lambda: {"real": Counter(), "shadow": Counter()})
    types: dict[str, TypeReport] = field(default_factory=lambda: defaultdict(TypeReport))

    @property
    def pairs(self) -> int:
        """How many pairs were compared."""
        return sum(one.pairs for one in self.types.values())

    @property
    def changes(self) -> bool:
        """Whether a switch would change anything that Kamiyo makes of events, or something is missing to say so."""
        return any(one.changes for one in self.types.values())


@dataclass(frozen=True, slots=True)
class _Told:
    """One event of either side. `kept` is false where retention took its body."""

    event: Event
    received: datetime
    request_id: str | None
    kept: bool

    @property
    def group(self) -> tuple[Any, ...]:
        e = self.event
        return e.account, e.livemode, e.type, e.object_id, e.created, self.request_id


_Pair = tuple[_Told, _Told]


async def report(
    db: Connection, *, grace: float = 600.0, progress: Callable[[int], None] = lambda done: None
) -> Report:
    """Compare everything that the twin endpoint delivered in the days it is kept.

    What came less than `grace` seconds ago does not count as missing: its twin may still be on its way. `progress`
    hears how many twins are done so far.
    """
    span = await db.fetchrow(_SQL["span"], grace)
    assert span is not None  # noqa: S101 - a SELECT without FROM has exactly one row
    result = Report(span["shadow_since"], span["until"])
    if result.since is None:
        return result
    done, after = 0, _DAWN
    while rows := await db.fetch(_SQL["seconds"], after, _CHUNK):
        twins = [_told(row, row["request_id"]) for row in rows]
        _compare_all(result, await _candidates(db, twins, result.since), twins, ledger_since=span["ledger_since"])
        after = datetime.fromtimestamp(twins[-1].event.created, UTC)
        done += len(twins)
        progress(done)
    for event_type, count, example in await db.fetch(_SQL["without_twin"], result.since, result.until):
        result.types[event_type].without_twin.add(example, count=count)
    return result


async def _candidates(db: Connection, twins: Sequence[_Told], since: datetime) -> list[_Told]:
    events = (one.event for one in twins)
    keys = list(dict.fromkeys((e.object_id, e.created, e.type, e.account, e.livemode) for e in events))
    rows = await db.fetch(_SQL["candidates"], *map(list, zip(*keys, strict=True)), since)
    rows += await db.fetch(_SQL["same_id"], [one.event.id for one in twins])
    return [_told(row) for row in {row["event_id"]: row for row in rows}.values()]


def _told(row: asyncpg.Record, request_id: str | None = None) -> _Told:
    event = Event(
        id=row["event_id"],
        type=row["event_type"],
        created=row["stripe_created"],
        thin=False,
        livemode=row["livemode"],
        account=row["account"],
        context=row["context"],
        api_version=row["api_version"],
        object_type=row["object_type"],
        object_id=row["object_id"],
        customer=row["customer"],
        snapshot_event=None,
        body=row["body"] or b"",
    )
    if request_id is None and event.body:
        try:
            request_id = event.request_id
        except (PayloadError, RecursionError):
            request_id = None  # then it is unreadable, which is told
    return _Told(event, row["created_at"], request_id, row["body"] is not None)


# ── Which is whose twin ─────────────────────────────────────────────────────────────────────────────────────────


def _compare_all(
    result: Report, reals: Sequence[_Told], twins: Sequence[_Told], *, ledger_since: datetime | None
) -> None:
    pairs, lonely_reals, lonely_twins = _paired(result, reals, twins)
    for real, twin in pairs:
        report = result.types[real.event.type]
        result.versions["real"][real.event.api_version or "unknown"] += 1
        result.versions["shadow"][twin.event.api_version or "unknown"] += 1
        if real.kept:
            _compare(report, real, twin)
        else:
            report.not_compared.add(real.event.id, twin.event.id)
    since = result.since
    assert since is not None  # noqa: S101 - there are twins
    for real in lonely_reals:
        in_time = since <= real.received <= result.until and real.event.created >= int(since.timestamp())
        if in_time and real.kept:
            result.types[real.event.type].without_twin.add(real.event.id)
    # Of what was before the ledger begins, nobody knows.
    first = 0 if ledger_since is None else int(ledger_since.timestamp())
    for twin in lonely_twins:
        if twin.event.created >= first and twin.received <= result.until:
            result.types[twin.event.type].without_real.add(twin.event.id)


def _paired(
    result: Report, reals: Sequence[_Told], twins: Sequence[_Told]
) -> tuple[list[_Pair], list[_Told], list[_Told]]:
    by_id = {one.event.id: one for one in reals}
    pairs = [(by_id[twin.event.id], twin) for twin in twins if twin.event.id in by_id]
    taken = {twin.event.id for _, twin in pairs}
    groups: dict[tuple[Any, ...], tuple[list[_Told], list[_Told]]] = defaultdict(lambda: ([], []))
    for side, ones in enumerate((reals, twins)):
        for one in ones:
            if one.event.id not in taken:
                groups[one.group][side].append(one)
    lonely_reals: list[_Told] = []
    lonely_twins: list[_Told] = []
    for these, those in groups.values():
        if these and those and max(len(these), len(those)) > _MOST_TO_CHOOSE_FROM:
            for twin in those:
                result.types[twin.event.type].not_compared.add(twin.event.id)
            continue
        chosen = _closest(these, those)
        pairs += chosen
        gone = {id(one) for pair in chosen for one in pair}
        lonely_reals += [one for one in these if id(one) not in gone]
        lonely_twins += [one for one in those if id(one) not in gone]
    return pairs, lonely_reals, lonely_twins


def _closest(reals: list[_Told], twins: list[_Told]) -> list[_Pair]:
    """Pairs that differ least, the closest first; the rest of the longer side stays alone."""
    if len(reals) == len(twins) == 1:
        return [(reals[0], twins[0])]
    by_distance = sorted(
        ((_distance(real, twin), real.event.id, twin.event.id, real, twin) for real in reals for twin in twins),
        key=lambda one: one[:3],
    )
    chosen: list[_Pair] = []
    taken: set[str] = set()
    for *_, real_id, twin_id, real, twin in by_distance:
        if real_id not in taken and twin_id not in taken:
            taken |= {real_id, twin_id}
            chosen.append((real, twin))
    return chosen


def _distance(real: _Told, twin: _Told) -> tuple[int, int]:
    compared = TypeReport()
    _compare(compared, real, twin)
    return len(compared.differing), sum(kind == "value" for kind, _ in compared.shape)


# ── Field by field ──────────────────────────────────────────────────────────────────────────────────────────────


def _compare(report: TypeReport, real: _Told, twin: _Told) -> None:
    ids = real.event.id, twin.event.id
    report.pairs += 1
    rows: list[Row | None] = []
    for side, one in (("real", real), ("shadow", twin)):
        try:
            rows.append(projections.row_of(one.event, real.received))
        except ProjectionError as error:
            report.unreadable[side, str(error)].add(*ids)
    if len(rows) == 2:
        verdicts = dict(_columns(real.event, twin.event, *rows))
        report.columns.update(verdicts.keys())
        differing = [name for name, agree in verdicts.items() if not agree]
        for name in differing:
            report.differing[name].add(*ids)
        report.alike += not differing
    for kind, path in _shape(real.event, twin.event):
        report.shape[kind, path].add(*ids)


def _columns(real: Event, twin: Event, row: Row | None, other: Row | None) -> Iterator[tuple[str, bool]]:
    """Each thing that Kamiyo makes of an event, and whether both make the same of it."""
    yield "event.customer", real.customer == twin.customer
    yield "event.object_id", real.object_id == twin.object_id
    if row is None or other is None or row.table != other.table:
        if row is not None or other is not None:
            yield "billing row", False
        return
    for name, value, theirs in zip(COLUMNS[row.table], row.values, other.values, strict=True):
        yield f"billing.{row.table}.{name}", value == theirs
    yield f"billing.{row.table}.last_event_rank", row.rank == other.rank


def _shape(real: Event, twin: Event) -> Iterable[tuple[str, str]]:
    try:
        found = {*_changes(real.object, twin.object, "")}
        found |= {*_changes(real.previous_attributes, twin.previous_attributes, "previous_attributes")}
    except (PayloadError, RecursionError):
        return ()
    return sorted(found)


def _changes(old: Any, new: Any, path: str) -> Iterator[tuple[str, str]]:
    if path.endswith("metadata"):
        # The keys are the user's own text.
        if old != new:
            yield "value", path
    elif isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            inner = f"{path}.{_named(name)}" if path else _named(name)
            if name not in new:
                yield "gone", inner
            elif name not in old:
                yield "new", inner
            else:
                yield from _changes(old[name], new[name], inner)
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield "value", f"{path}[]"
        for one, other in zip(old, new, strict=False):
            yield from _changes(one, other, f"{path}[]")
    elif _kind(old) != _kind(new) and None not in (old, new):
        yield "kind", path
    elif old != new:
        yield "value", path


def _named(name: str) -> str:
    return name if _FIELD.fullmatch(name) else "*"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, int | float) else type(value).__name__
