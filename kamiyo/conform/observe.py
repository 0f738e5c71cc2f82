"""Looking behind the answers, where a receiver offers a view: what became of an event, what an object is now.

A 2xx says that an event was taken, not that it was stored once, processed, or put in order. A receiver shows
that to whoever may look: Kamiyo by its admin key and its tables, any other by two addresses of its own
(`docs/conformance.md`).
"""

import json
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urljoin

import httpx

from kamiyo.conform.wire import ConformError
from kamiyo.database import Connection

# An id that no receiver knows: its views must say so with 404.
_UNKNOWN = "evt_conform_never_sent"


class ViewFailed(Exception):
    """A view that had worked does not any more; the text says how."""


@dataclass(frozen=True, slots=True)
class EventSeen:
    """An event as the receiver has it.

    `status` is `processed`, `failed`, or another word while it is neither; `times` how often it was stored or
    processed, whichever is more. Each is None where the view does not say.
    """

    status: str | None
    times: int | None


class EventView(Protocol):
    """Shows what became of an event."""

    async def event(self, event_id: str) -> EventSeen | None:
        """The event, or None when the receiver does not have it. Raises ViewFailed."""


class ObjectView(Protocol):
    """Shows what the receiver holds of an object."""

    async def object(self, object_type: str, object_id: str) -> Mapping[str, Any] | None:
        """Its fields under Stripe's names, or None when the receiver does not have it. Raises ViewFailed."""


@dataclass(frozen=True, slots=True)
class AdminView:
    """Kamiyo's own calls for operators, beside the address that receives."""

    client: httpx.AsyncClient
    url: str
    key: str

    async def event(self, event_id: str) -> EventSeen | None:
        """By `GET events/{event_id}` and, to count, `GET events?object_id=…`."""
        found = await self._get(f"events/{quote(event_id, safe='')}")
        if found is None:
            return None
        # A try that failed had no effect.
        times: int = found["attempts"] - len(found["failures"])
        if found["object_id"]:
            listed = await self._get(f"events?limit=500&object_id={quote(found['object_id'], safe='')}") or {}
            stored = [one for one in listed.get("events", []) if one["event_id"] == event_id]
            times = max(times, len(stored))
        return EventSeen(found["status"], times)

    async def _get(self, path: str) -> dict[str, Any] | None:
        return await _get_json(self.client, urljoin(self.url, path), {"X-Admin-Key": self.key})


@dataclass(frozen=True, slots=True)
class EventAddress:
    """Any receiver's view of events: a URL with `{event_id}` in it."""

    client: httpx.AsyncClient
    template: str

    async def event(self, event_id: str) -> EventSeen | None:
        """404 is None; otherwise a JSON object whose `status` and `times` are read."""
        found = await _get_json(self.client, self.template.replace("{event_id}", quote(event_id, safe="")))
        if found is None:
            return None
        status, times = found.get("status"), found.get("times")
        return EventSeen(status if isinstance(status, str) else None, times if isinstance(times, int) else None)


@dataclass(frozen=True, slots=True)
class ObjectAddress:
    """Any receiver's view of objects: a URL with `{object_id}` in it, and `{object_type}` if it likes."""

    client: httpx.AsyncClient
    template: str

    async def object(self, object_type: str, object_id: str) -> Mapping[str, Any] | None:
        """404 is None; otherwise the JSON object."""
        url = self.template.replace("{object_id}", quote(object_id, safe=""))
        return await _get_json(self.client, url.replace("{object_type}", quote(object_type, safe="")))


@dataclass(frozen=True, slots=True)
class BillingTables:
    """Kamiyo's `billing.*`, read in the database."""

    db: Connection

    async def object(self, object_type: str, object_id: str) -> Mapping[str, Any] | None:
        """The row."""
        row = await self.db.fetchrow(_ROWS[object_type], object_id)
        return dict(row) if row is not None else None


_ROWS = {
    "customer": "SELECT * FROM billing.customers WHERE id = $1",
    "subscription": "SELECT * FROM billing.subscriptions WHERE id = $1",
    "invoice": "SELECT * FROM billing.invoices WHERE id = $1",
    "payment_method": "SELECT * FROM billing.payment_methods WHERE id = $1",
}


async def require_views(events: EventView | None, objects: ObjectView | None) -> None:
    """Raises ConformError unless the views work, which is to say: know that they do not know."""
    if events is not None:
        await _require_ignorance("events", events.event(_UNKNOWN))
    if objects is not None:
        await _require_ignorance("objects", objects.object("customer", _UNKNOWN))


async def _require_ignorance(name: str, asked: Awaitable[object]) -> None:
    try:
        known = await asked
    except ViewFailed as error:
        raise ConformError(f"the view of {name} cannot be used: {error}") from error
    if known is not None:
        raise ConformError(f"the view of {name} must answer 404 for an id that was never sent")


async def _get_json(
    client: httpx.AsyncClient, url: str, headers: dict[str, str] | None = None
) -> dict[str, Any] | None:
    try:
        reply = await client.get(url, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ViewFailed(f"it gave no answer ({type(error).__name__})") from error
    if reply.status_code == 404:
        return None
    if reply.status_code != 200:
        raise ViewFailed(f"it answered {reply.status_code}")
    try:
        found = reply.json()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ViewFailed("its answer is not JSON") from error
    if not isinstance(found, dict):
        raise ViewFailed("its answer is no JSON object")
    return found
