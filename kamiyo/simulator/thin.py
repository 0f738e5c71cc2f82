"""Thin events: they name the object instead of showing it, in no API version.

Source: Stripe's documentation, "Event destinations", and the event classes of its Python library.
"""

from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from kamiyo.simulator.events import SimulatedEvent, request_of
from kamiyo.simulator.facts import Invoice, Plain

# Types that are older than thin events, and have none.
_NO_TWIN = (
    "customer.source.",
    "reporting.",
    "reserve.",
    "source.mandate_notification",
    "source.transaction.",
    "treasury.",
)

# Types whose thin event relates to nothing that could be fetched.
_UNRELATED = ("account.application.", "account.external_account.", "billing_portal.session.", "entitlements.")

# Objects of which there is only one, by where the API serves it.
_SINGLETONS = {
    "balance": "/v1/balance",
    "balance_settings": "/v1/balance_settings",
    "cash_balance": "/v1/customers/{customer}/cash_balance",
    "discount": "/v1/customers/{customer}/discount",
    "tax.settings": "/v1/tax/settings",
}


def thin(event: SimulatedEvent) -> dict[str, Any]:
    """The thin twin of a snapshot event. Its id is another one; `snapshot_event` names the snapshot.

    `invoice.upcoming` is about nothing that could be fetched, so it has `data` instead of a `related_object`.
    Raises ValueError for a type that has no thin twin.
    """
    if event.type.startswith(_NO_TWIN):
        raise ValueError(f"Stripe has no thin event for {event.type}")
    twin: dict[str, Any] = {
        "id": f"evt_{'' if event.livemode else 'test_'}65{sha256(event.id.encode()).hexdigest()[:46]}",
        "object": "v2.core.event",
        "type": f"v1.{event.type}",
        "livemode": event.livemode,
        "created": datetime.fromtimestamp(event.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        "context": event.account or None,
        "snapshot_event": event.id,
        "reason": {"type": "request", "request": request_of(event)} if event.request else None,
    }
    if isinstance(event.after, Invoice) and event.object_id is None:
        twin["data"] = {"customer": event.customer, "subscription": event.after.subscription}
    elif event.object in _SINGLETONS:
        url = _SINGLETONS[event.object].format(customer=event.customer)
        twin["related_object"] = {"type": event.object, "url": url}
    elif isinstance(event.after, Plain) and "alert" in event.after.value:
        alert = event.after.value["alert"]  # what it relates to is the alert, not that it went off
        twin["related_object"] = _related(alert["object"], alert["id"])
    elif event.object_id is not None and not event.type.startswith(_UNRELATED):
        twin["related_object"] = _related(event.object, event.object_id)
    return twin


def _related(kind: str, object_id: str) -> dict[str, str]:
    return {"id": object_id, "type": kind, "url": f"/v1/{kind.replace('.', '/')}s/{object_id}"}
