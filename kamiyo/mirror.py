"""The latest state of every object that events show, as Stripe words it: the table `stripe_objects`.

Off unless `KAMIYO_MIRROR` says what to keep: `all`, or names of objects and event types. What the four tables of
`billing` are for a few objects, this is for the rest: not columns in one wording, but the JSON of the latest event, to
be joined in SQL. `invoice.upcoming` is a preview of an invoice that does not exist yet, and is left out.

**Order.** The same rule, with what can be said of any object: an event's rank says, from the most telling down,

    terminal   a deletion is final, except of what can be made again under the same id (a coupon, a plan, a product)
    created    Stripe's second
    stage      `*.created` comes first within its second, `*.deleted` last

and where an event has a row in `billing`, the rank is that row's, which knows more. Only a higher rank overwrites.
Equal ranks that show different things are a tie: `previous_attributes` tell what the object was before each change,
and where they form a trail with one end, that is the latest. Otherwise the row is marked `undecided`, and shows the
same one of them whatever came first.

A deletion may tell nothing but the id. It is noted, and the object stays as it was last shown. Nothing is read from
Stripe's API: what a thin event names is kept when a snapshot shows it.
"""

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import asyncpg
import msgspec

from kamiyo import inbox, projections
from kamiyo.database import Connection, load_queries
from kamiyo.event import Event, decode
from kamiyo.projections import ProjectionError, Row

_SQL = load_queries("mirror.sql")

#: Every object: the word in `KAMIYO_MIRROR`.
ALL = "all"

_Key = tuple[str, str, str, bool]


@dataclass(frozen=True, slots=True)
class State:
    """One object as one event shows it. `data` is JSON text; `created` unix seconds, None where Stripe says none."""

    id: str
    object: str
    account: str
    livemode: bool
    data: str
    api_version: str | None
    created: int | None
    event_id: str
    received: datetime
    rank: int
    deletion_rank: int | None = None
    evidence: str = "decided"

    @property
    def key(self) -> _Key:
        """What identifies the object."""
        return self.id, self.object, self.account, self.livemode


@dataclass(frozen=True, slots=True)
class _Standing:
    rank: int
    event_id: str
    evidence: str


def wants(event: Event, names: frozenset[str]) -> bool:
    """Whether `event` shows an object that is to be kept; `names` are those of `KAMIYO_MIRROR`."""
    if not names or event.thin or event.object_type is None or event.type == "invoice.upcoming":
        return False
    return ALL in names or event.object_type in names or event.type in names


async def project(db: Connection, states: Sequence[State], names: frozenset[str]) -> None:
    """Bring `stripe_objects` up to date with what `states` show. The caller owns the transaction."""
    groups: dict[_Key, list[State]] = defaultdict(list)
    for state in states:
        groups[state.key].append(state)
    if not groups:
        return
    written = await _write(
        db, [max(group, key=lambda state: (state.rank, state.event_id)) for group in groups.values()]
    )
    await _note_deletions(db, groups)
    for key, standing in (await _standing(db, groups)).items():
        if _is_contested(groups[key], standing, written=key in written):
            await _settle(db, groups[key], standing, names)


async def hold(db: Connection) -> None:
    """Hold other writers off until the transaction ends."""
    await db.execute(_SQL["lock"])


async def forget(db: Connection, names: frozenset[str]) -> None:
    """Clear the rows that the events of `names` make again."""
    await db.execute(_SQL["forget"], ALL in names, list(names))
    await db.execute(_SQL["reopen"], ALL in names, list(names))


def state_of(event: Event, received: datetime, row: Row | None) -> State | None:
    """The object as `event` shows it; None where it shows none. `row` is the event's row in `billing`, if it has one.

    Raises ProjectionError when it cannot be read.
    """
    if event.object_type is None:
        return None
    data, glance = _shown(event)
    ends = event.type.endswith(".deleted")
    rank = row.rank if row is not None else _rank(event, ends)
    is_stub = bool(glance.deleted) and decode(data.encode()).keys() <= _STUB
    if is_stub and not ends:
        return None  # of something long gone, carried by an event about something else
    return State(
        # Some things an account or a customer has only one of, and Stripe gives them no id.
        id=event.object_id or event.customer or "",
        object=event.object_type,
        account=event.account,
        livemode=event.livemode,
        data=data,
        api_version=event.api_version,
        created=_seconds(glance.created),
        event_id=event.id,
        received=received,
        rank=0 if is_stub else rank,
        deletion_rank=(rank if event.object_type in _REUSED else _FOR_GOOD) if ends else None,
    )


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

_STUB = {"id", "object", "deleted", "livemode"}

#: Objects whose ids are the user's own, and can be given again after a deletion.
_REUSED = frozenset({"coupon", "plan", "product"})

_TERMINAL = 1 << 56
# Above every rank: a canceled subscription may still be changed, and stays deleted.
_FOR_GOOD = (1 << 63) - 1
_LAST_SECOND = 253_402_300_799

# What jsonb refuses: a NUL, and half of a surrogate pair.
_REFUSED = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")


class _Glance(msgspec.Struct):
    created: Any = None
    deleted: Any = None


class _Data(msgspec.Struct):
    object: msgspec.Raw


class _Whole(msgspec.Struct):
    data: _Data


_read = msgspec.json.Decoder(_Whole).decode
_glance = msgspec.json.Decoder(_Glance).decode
_encode = msgspec.json.Encoder(order="deterministic").encode


def _shown(event: Event) -> tuple[str, _Glance]:
    if not _REFUSED.search(event.body):
        # As it stands in the body, neither decoded nor encoded again.
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raw = bytes(_read(event.body).data.object)
            return raw.decode(), _glance(raw)
    plain = projections.plain_object(event)
    return _encode(plain).decode(), _Glance(plain.get("created"), plain.get("deleted"))


def _seconds(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LAST_SECOND else None


def _rank(event: Event, ends: bool) -> int:
    terminal = ends and event.object_type not in _REUSED
    stage = 2 if ends else 0 if _begins(event) else 1
    return terminal * _TERMINAL | event.created << 14 | stage << 10 | 1


def _begins(event: Event) -> bool:
    return event.type.endswith(".created") or projections.begins(event)


# ── Ties ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_contested(group: Sequence[State], standing: _Standing, *, written: bool) -> bool:
    if not standing.rank:
        return False  # nothing was shown yet
    rivals = {state.event_id for state in group if state.rank == standing.rank}
    if written:
        return len(rivals) > 1
    # What comes late with a lower rank decides nothing itself. But in the same second it is evidence, and what the
    # others come to must not depend on whether it came before them.
    second = projections.second_of(standing.rank)
    return bool(rivals - {standing.event_id}) or any(
        0 < state.rank < standing.rank and projections.second_of(state.rank) == second for state in group
    )


async def _settle(db: Connection, group: Sequence[State], standing: _Standing, names: frozenset[str]) -> None:
    """Weigh all events of the object within its last second, and write what they come to."""
    key_id, _, account, livemode = key = group[0].key
    second = projections.second_of(standing.rank)
    told = await inbox.of_second(db, key_id, account, livemode, second)
    seen = [one for one in (_seen(event, received) for event, received in told if wants(event, names)) if one]
    weighed = [one for one in seen if one.state.key == key and one.state.rank]
    if standing.event_id in {one.state.event_id for one in weighed}:
        await _write(db, [_decide(weighed)], force=True)
        return
    # It has no id to find its events by, or retention took the body of the one that stands. Then all that can be told
    # is whether they differ. Without an id the greatest of the events' stands, whichever came first; with one, what
    # stands goes on to stand, or the next look would find the rest alone, and no doubt in it.
    shown = await db.fetchval(_SQL["shown"], *key)
    rivals = [state for state in group if state.rank == standing.rank and state.event_id != standing.event_id]
    differ = standing.evidence == "undecided" or any(_canonical(r.data) != _canonical(shown) for r in rivals)
    evidence = "undecided" if differ else "decided"
    latest = None if weighed else max(rivals, key=lambda state: state.event_id, default=None)
    if latest is not None and latest.event_id > standing.event_id:
        await _write(db, [replace(latest, evidence=evidence)], force=True)
    elif evidence != standing.evidence:
        await db.execute(_SQL["mark"], *key, evidence)


@dataclass(frozen=True, slots=True)
class _Seen:
    """One event of the contested second: what it shows, what was before it where it says, whether it is the first."""

    state: State
    after: str
    before: str | None
    begins: bool


def _seen(event: Event, received: datetime) -> _Seen | None:
    try:
        state = state_of(event, received, projections.row_of(event, received))
        before = projections.plain_object_before(event)
    except ProjectionError:
        return None  # it could not be applied either
    if state is None:
        return None
    told = None if before is None else _encode(_without_null(before)).decode()
    return _Seen(state, _canonical(state.data), told, _begins(event))


def _decide(seen: Sequence[_Seen]) -> State:
    """What the events of one second come to, marked `undecided` where they do not tell. Never empty."""
    top = max(one.state.rank for one in seen)
    candidates = [one for one in seen if one.state.rank == top]
    shown = {one.after for one in candidates}
    final = shown.pop() if len(shown) == 1 else _end_of_trail(seen)
    told_by = [one.state for one in candidates if one.after == final]
    if told_by:
        return min(told_by, key=lambda state: state.event_id)
    return replace(max((one.state for one in candidates), key=lambda state: state.event_id), evidence="undecided")


def _end_of_trail(seen: Sequence[_Seen]) -> str | None:
    # Steps from one state to another, as in `ties.py`: where exactly one is entered once more than it is left, the
    # trail ends there; unless something stands beside it that nothing leads to or from.
    balance: Counter[str] = Counter()
    loose: set[str] = set()
    for one in seen:
        if one.before is not None:
            balance[one.after] += 1
            balance[one.before] -= 1
        elif one.begins:
            balance[one.after] += 1
        else:
            loose.add(one.after)
    ends = [state for state, entered in balance.items() if entered > 0]
    return ends[0] if loose <= balance.keys() and len(ends) == 1 and balance[ends[0]] == 1 else None


def _canonical(data: str) -> str:
    """The same text for the same object. What is null may as well be absent: so `previous_attributes` say it."""
    return _encode(_without_null(decode(data.encode()))).decode()


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_null(item) for name, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


# ── Writing ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def _write(db: Connection, states: Sequence[State], *, force: bool = False) -> set[_Key]:
    columns = zip(
        *(
            (
                *(*s.key, s.data, s.api_version, s.created),
                *(s.event_id, s.received, s.rank, s.deletion_rank, s.evidence),
            )
            for s in states
        ),
        strict=True,
    )
    return {_key(row) for row in await db.fetch(_SQL["write"], *map(list, columns), force)}


async def _note_deletions(db: Connection, groups: Mapping[_Key, Sequence[State]]) -> None:
    told = {key: max(state.deletion_rank or 0 for state in group) for key, group in groups.items()}
    deleted = [(*key, rank) for key, rank in told.items() if rank]
    if deleted:
        await db.execute(_SQL["delete"], *map(list, zip(*deleted, strict=True)))


async def _standing(db: Connection, keys: Iterable[_Key]) -> dict[_Key, _Standing]:
    rows = await db.fetch(_SQL["standing"], *map(list, zip(*keys, strict=True)))
    return {_key(row): _Standing(*tuple(row)[4:]) for row in rows}


def _key(row: asyncpg.Record) -> _Key:
    return row["id"], row["object"], row["account"], row["livemode"]
