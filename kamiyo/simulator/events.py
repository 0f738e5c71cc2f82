"""One event, and how it goes over the wire: a snapshot of the object, in an API version."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import msgspec

from kamiyo.simulator.facts import Fact
from kamiyo.simulator.shapes import API_VERSIONS, CURRENT_API_VERSION, shape

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedEvent:
    """Something that happened, as the world knows it: not yet in any API version.

    `created` is unix seconds. `object` is the kind of thing it is about (`customer`, `subscription`, …),
    `object_id` which one (None where Stripe gives no id, as for `invoice.upcoming`), `customer` whose it is,
    if Stripe says. `account` is empty for one's own account. `request` is the API request that caused it,
    None when Stripe did it by itself. `after` is the object as the event shows it, `before` as it was, where
    Stripe tells that. With `stub` only the fact of the deletion is told, not the object.
    """

    id: str
    type: str
    created: int
    object: str
    object_id: str | None
    customer: str | None
    account: str
    livemode: bool
    request: str | None
    after: Fact
    before: Fact | None = None
    stub: bool = False

    def __hash__(self) -> int:
        # What it shows holds mappings, which have no hash; its id is enough.
        return hash(self.id)

    def render(self, api_version: str = CURRENT_API_VERSION) -> dict[str, Any]:
        """The snapshot event as an endpoint of `api_version` gets it; ValueError for an unknown one."""
        if api_version not in API_VERSIONS:
            raise ValueError(f"Unknown API version {api_version!r}; known are {', '.join(API_VERSIONS)}")
        data: dict[str, Any] = {"object": self._object(api_version)}
        if self.before is not None:
            before = shape(self.before, api_version, livemode=self.livemode)
            data["previous_attributes"] = previous_attributes(before, data["object"])
        return {
            "id": self.id,
            "object": "event",
            **({"account": self.account} if self.account else {}),
            "api_version": api_version,
            "created": self.created,
            "data": data,
            "livemode": self.livemode,
            "pending_webhooks": 1,
            "request": request_of(self),
            "type": self.type,
        }

    def body(self, api_version: str = CURRENT_API_VERSION) -> bytes:
        """The bytes of that event: JSON indented by two spaces, as Stripe posts it."""
        return encode(self.render(api_version))

    def _object(self, api_version: str) -> dict[str, Any]:
        if self.stub:
            return {"id": self.object_id, "object": self.object, "deleted": True}
        return shape(self.after, api_version, livemode=self.livemode)


def encode(payload: dict[str, Any]) -> bytes:
    """JSON as Stripe posts it: indented by two spaces, text in UTF-8."""
    return msgspec.json.format(_encode(payload), indent=2)


def previous_attributes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What Stripe sends as `previous_attributes` for a change from `before` to `after`.

    The changed keys only, with their old values; of a hash that stays a hash, again only the changed keys; a
    list whole. A key that was not there before is given as null. Source: Stripe's API reference, "The Event
    object".
    """
    changed: dict[str, Any] = {}
    for key in {**before, **after}:
        old: Any = before.get(key)
        new: Any = after.get(key)
        if old != new:
            hashes = isinstance(old, dict) and isinstance(new, dict)
            changed[key] = previous_attributes(old, new) if hashes else old
    return changed


def request_of(event: SimulatedEvent) -> dict[str, str | None]:
    """The API request that caused an event, as Stripe names it."""
    if event.request is None:
        return {"id": None, "idempotency_key": None}
    digest = sha256(event.request.encode()).hexdigest()
    key = f"{digest[:8]}-{digest[8:12]}-4{digest[13:16]}-8{digest[17:20]}-{digest[20:32]}"
    return {"id": event.request, "idempotency_key": key}
