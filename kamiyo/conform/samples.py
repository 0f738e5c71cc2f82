"""The events that are delivered: from the simulator, fresh ids each time, nothing of any real account."""

import secrets
import time
from dataclasses import dataclass
from typing import Any

from kamiyo.simulator import CURRENT_API_VERSION, SimulatedEvent, World, encode, thin

# Far enough back that a renewal, a month later, is still in the past.
_AGE_SECONDS = 90 * 86_400

# What every receiver of subscriptions keeps: only of these an object is expected to be there afterwards.
_KEPT = ("customer", "subscription")


@dataclass(frozen=True, slots=True)
class Sample:
    """An event ready to be signed: its bytes, what they are about, the object they carry (none if thin)."""

    body: bytes
    event_id: str
    event_type: str
    object_type: str
    object_id: str | None
    object: dict[str, Any]

    @property
    def leaves_object(self) -> bool:
        """Whether it tells the state of an object that every receiver of subscriptions keeps."""
        return self.object_type in _KEPT and bool(self.object)


def new_world() -> World:
    """A simulated Stripe of its own, in test mode, some months ago."""
    return World(secrets.randbits(62), start=int(time.time()) - _AGE_SECONDS, payments=False)


def sample_of(event: SimulatedEvent, api_version: str = CURRENT_API_VERSION) -> Sample:
    """A simulated event as it is sent."""
    return sample(event.render(api_version))


def sample(payload: dict[str, Any]) -> Sample:
    """Any payload as it is sent."""
    subject = payload.get("data", {}).get("object") or {}
    related = payload.get("related_object") or {}
    return Sample(
        body=encode(payload),
        event_id=payload["id"],
        event_type=payload["type"],
        object_type=subject.get("object") or related.get("type", ""),
        object_id=subject.get("id") or related.get("id"),
        object=subject,
    )


def customer() -> Sample:
    """A customer who was just created."""
    return sample(customer_payload())


def customer_payload() -> dict[str, Any]:
    """The same, to be changed before it is sent."""
    world = new_world()
    world.create_customer()
    return world.events[0].render()


def padded(size: int) -> Sample:
    """A customer whose event is exactly `size` bytes long."""
    payload = customer_payload()
    payload["data"]["object"]["description"] = ""
    payload["data"]["object"]["description"] = "x" * (size - len(encode(payload)))
    return sample(payload)


def thin_customer() -> Sample:
    """The thin event of a customer who was just created."""
    world = new_world()
    world.create_customer()
    return sample(thin(world.events[0]))
