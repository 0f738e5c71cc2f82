"""What an event changed: its billing row before and after, column by column, in words."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import asyncpg

from kamiyo import projections
from kamiyo.errors import PayloadError
from kamiyo.event import Event, parse
from kamiyo.projections import ProjectionError, Row
from kamiyo.shapes import COLUMNS
from kamiyo.web.dashboard import wording

_MOMENTS = frozenset(
    {
        *("created", "deleted_at", "current_period_start", "current_period_end", "cancel_at", "canceled_at"),
        *("ended_at", "trial_start", "trial_end", "due_date", "period_start", "period_end", "paid_at"),
        "detached_at",
    }
)
_AMOUNTS = frozenset({"balance", "amount_due", "amount_paid", "amount_remaining", "subtotal", "total"})
#: Columns that hold other objects' ids, to lead to them.
REFERENCES = frozenset({"customer", "subscription", "latest_invoice", "default_payment_method"})


@dataclass(frozen=True, slots=True)
class Change:
    """One column. `before` is None where nothing is known of it; `now` where the row stands as the event left it."""

    name: str
    before: str | None
    after: str
    now: str | None
    changed: bool


@dataclass(frozen=True, slots=True)
class Effect:
    """What an event says of its billing row.

    `source` says where the row before comes from: `previous` (Stripe's own previous_attributes), `earlier` (the event
    `earlier_event` before it), `first` (nothing was there), or `unknown`. `made` says that the row stands as this event
    left it; otherwise `last_event` did. `missing` says that there is no row.
    """

    table: str
    changes: Sequence[Change]
    source: str
    earlier_event: str | None
    made: bool
    missing: bool
    last_event: str | None
    undecided: bool

    @property
    def changed(self) -> list[Change]:
        """The columns that are different afterwards."""
        return [change for change in self.changes if change.changed]

    @property
    def same(self) -> list[Change]:
        """The columns with a value that stayed."""
        return [change for change in self.changes if not change.changed and change.after != "–"]

    @property
    def moved_on(self) -> bool:
        """Whether a later event has changed the row since."""
        return not self.made and not self.missing


def event_of(body: bytes, received: datetime, account: str, livemode: bool) -> Event | None:
    """The event in a stored body, as it is filed; None when it cannot be read any more."""
    try:
        return replace(parse(body, received=received.timestamp()), account=account, livemode=livemode)
    except PayloadError:
        return None


def row_of(event: Event | None, received: datetime) -> Row | None:
    """The billing row as `event` tells it; None where it has none to tell, or cannot be read."""
    with contextlib.suppress(ProjectionError):
        return projections.row_of(event, received) if event else None
    return None


def effect_of(event: Event, received: datetime, earlier: Sequence[Event], now: asyncpg.Record | None) -> Effect | None:
    """What `event` did to its row; None for an event without one.

    `earlier` are the object's events up to then, `now` is the row as it stands.
    """
    row = row_of(event, received)
    if row is None:
        return None
    before, source, told_by = _before(event, row, received, earlier)
    made = now is not None and now["last_webhook_event_id"] == event.id
    return Effect(
        table=row.table,
        changes=_compared(before, row, None if made or now is None else _columns(row.table, now)),
        source=source,
        earlier_event=told_by,
        made=made,
        missing=now is None,
        last_event=now["last_webhook_event_id"] if now is not None else None,
        undecided=now is not None and now["order_evidence"] == "undecided",
    )


def summary(event: Event | None, received: datetime, most: int = 3) -> list[Change]:
    """The few changes of an event that say the most, from what it tells itself; empty where it does not."""
    if event is None:
        return []
    row = row_of(event, received)
    if row is None:
        return []
    with contextlib.suppress(ProjectionError):
        before = projections.row_before(event, received)
        if before is not None:
            changes = [change for change in _compared(before, row, None) if change.changed]
            telling = sorted((c for c in changes if c.name in _TELLING), key=lambda c: _TELLING.index(c.name))
            return (telling or changes)[:most]
    return []


# A status says more than a period, a period more than a bookkeeping detail.
_TELLING = (
    *("status", "email", "name", "cancel_at_period_end", "price", "quantity", "amount_paid", "amount_due"),
    *("default_payment_method", "delinquent", "balance", "current_period_end", "trial_end", "attempt_count"),
)


def _before(
    event: Event, row: Row, received: datetime, earlier: Sequence[Event]
) -> tuple[dict[str, Any] | None, str, str | None]:
    with contextlib.suppress(ProjectionError):
        told = projections.row_before(event, received)
        if told is not None:
            return _values(told), "previous", None
    if projections.begins(event):
        return None, "first", None
    rows = [one for other in earlier if (one := row_of(other, received)) is not None]
    rows = [one for one in rows if one.table == row.table and one.rank < row.rank]
    if not rows:
        return None, "unknown", None
    latest = max(rows, key=lambda one: (one.rank, one.event_id))
    return _values(latest), "earlier", latest.event_id


def _compared(before: Row | dict[str, Any] | None, after: Row, now: dict[str, Any] | None) -> list[Change]:
    was = _values(before) if isinstance(before, Row) else before
    is_ = _values(after)
    currency = is_.get("currency")
    names = dict.fromkeys([*is_, *(was or {})])  # in the order of the columns, metadata that went away last
    changes = []
    for name in names:
        old, new = (was or {}).get(name), is_.get(name)
        changed = old != new if was is not None else new not in (None, "[]")
        later = now.get(name) if now is not None else None
        changes.append(
            Change(
                name=name,
                before=None if was is None else _said(name, old, was.get("currency")),
                after=_said(name, new, currency),
                now=_said(name, later, currency) if now is not None and later != new else None,
                changed=changed,
            )
        )
    return changes


def _values(row: Row) -> dict[str, Any]:
    return _spread(dict(zip(COLUMNS[row.table], row.values, strict=True)))


def _columns(table: str, record: asyncpg.Record) -> dict[str, Any]:
    return _spread({name: _plain(record[name]) for name in COLUMNS[table]})


def _plain(value: Any) -> Any:
    return int(value.timestamp()) if isinstance(value, datetime) else value


def _spread(columns: dict[str, Any]) -> dict[str, Any]:
    # One line for each key of metadata, and JSON in one wording, whoever wrote it.
    metadata = json.loads(columns.pop("metadata") or "{}")
    if columns.get("items"):
        columns["items"] = json.dumps(json.loads(columns["items"]), sort_keys=True)
    return columns | {f"metadata.{name}": value for name, value in metadata.items()}


def _said(name: str, value: Any, currency: str | None) -> str:
    if value is None or value == "":
        return "–"
    if name in _MOMENTS and isinstance(value, int):
        with contextlib.suppress(ValueError, OverflowError, OSError):
            return wording.exact(datetime.fromtimestamp(value, UTC))
    if name in _AMOUNTS and isinstance(value, int):
        return wording.money(value, currency)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "items":
        return _items(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _items(text: str) -> str:
    items: list[Mapping[str, Any]] = json.loads(text)
    return ", ".join(f"{item.get('price') or item.get('id')} × {item.get('quantity')}" for item in items) or "–"
