"""What Stripe said, read once and frozen.

Two kinds arrive at the same door. A *snapshot* (`object: "event"`) carries the whole object as it was; a *thin*
event (`object: "v2.core.event"`) only names it. Source: Stripe's documentation, "Event destinations".
"""

import json
import zlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import msgspec

from kamiyo.errors import PayloadError

#: Longest id, type or version that is believed to be one, in characters. Stripe documents 255 for ids.
LONGEST_NAME = 255

# 9999-12-31 23:59:59 UTC, the last second that Python's datetime holds.
_LAST_SECOND = 253_402_300_799


@dataclass(frozen=True, kw_only=True)
class Event:
    """One Stripe event.

    `created` is Stripe's time in whole unix seconds. `object_type` and `object_id` name what the event is about,
    `customer` whose it is; each is None where Stripe does not say. `account` is the account that the object lives in,
    empty for one's own; `context` is Stripe's own words for the way there, empty where it says nothing. `body` is the
    JSON exactly as received.
    """

    id: str
    type: str
    created: int
    thin: bool
    livemode: bool
    account: str
    context: str
    api_version: str | None
    object_type: str | None
    object_id: str | None
    customer: str | None
    snapshot_event: str | None
    body: bytes
    #: What a thin event is about, as Stripe's API gave it: JSON. Empty where it was not read, or is there no more.
    read: bytes = b""
    #: True while a handler runs for an event whose object has already moved on: a newer state is applied.
    superseded: bool = False
    #: Which try this is, from 1. Zero until a worker has the event.
    attempt: int = 0

    @cached_property
    def payload(self) -> dict[str, Any]:
        """The whole event as plain JSON values. Raises PayloadError when the body is no JSON object."""
        return decode(self.body)

    @property
    def object(self) -> dict[str, Any]:
        """What the event is about, as plain JSON values: a snapshot's `data.object`; for a thin event, what was read.

        Empty where a thin event's object was not read from Stripe, or is there no more.
        """
        if self.thin:
            return decode(self.read) if self.read else {}
        return _mapping(_mapping(self.payload.get("data")).get("object"))

    @property
    def previous_attributes(self) -> dict[str, Any]:
        """The values before the change, for `*.updated` events; empty when Stripe gives none."""
        return _mapping(_mapping(self.payload.get("data")).get("previous_attributes"))

    @property
    def snapshot_type(self) -> str:
        """The type under which a snapshot tells the same: `invoice.paid`, also of `v1.invoice.paid`."""
        return snapshot_type(self.type)

    @property
    def occurrence(self) -> str:
        """What both twins have in common, a snapshot and the thin event that names it: the snapshot's id."""
        return self.snapshot_event or self.id

    @property
    def request_id(self) -> str | None:
        """The API request that caused it (`req_…`); None where Stripe did it by itself, or does not say."""
        request = self.payload.get("request")
        # Until 2017-05-25 it was the id itself.
        return _name(request.get("id") if isinstance(request, dict) else request)

    @property
    def lane(self) -> int:
        """The number (31 bits) under which events that must run one at a time are serialised.

        Events of one customer share a lane; where Stripe names no customer, those of one object do.
        """
        return lane_of(self.account, self.customer or self.object_id or self.id)


def snapshot_type(event_type: str) -> str:
    """The type under which a snapshot tells what `event_type` does. Thin events of `/v1` put `v1.` before it."""
    return event_type.removeprefix("v1.")


def lane_of(account: str, owner: str) -> int:
    """The lane of everything that `owner` (a customer's or an object's id) of `account` goes through."""
    # CRC-32 is stable across versions, machines and languages, unlike hash(); 31 bits fit PostgreSQL's int.
    return zlib.crc32(f"{account}\0{owner}".encode()) & 0x7FFF_FFFF


def account_in(context: str) -> str:
    """The account that a context leads to: the last part of `acct_1/acct_1a`; empty where that is no account.

    Source: Stripe's documentation, "Stripe-Context header". Connect events say `account` as well; organisations' events
    and thin events say nothing but the context.
    """
    last = context.rpartition("/")[2]
    return last if last.startswith("acct_") else ""


def filed(event: Event, *, own: str, otherwise: str = "") -> Event:
    """`event` under the account that its rows are kept by.

    `otherwise` is the account of the road it came by, for an event that names none. `own` is one's own account, which
    is kept as '' however an event speaks of it.
    """
    account = event.account or otherwise
    if account == own:
        account = ""
    return event if account == event.account else replace(event, account=account)


class _Object(msgspec.Struct):
    id: Any = None
    object: Any = None
    customer: Any = None
    customer_account: Any = None


class _Previous(msgspec.Struct):
    customer: Any = None


class _Data(msgspec.Struct):
    object: _Object | None = None
    previous_attributes: _Previous | None = None


class _Related(msgspec.Struct):
    id: Any = None
    type: Any = None


class _Envelope(msgspec.Struct):
    id: Any = None
    object: Any = "event"
    type: Any = None
    created: Any = None
    livemode: Any = False
    account: Any = None
    context: Any = None
    api_version: Any = None
    snapshot_event: Any = None
    data: _Data | None = None
    related_object: _Related | None = None


_read_envelope = msgspec.json.Decoder(_Envelope).decode
_read_json = msgspec.json.Decoder().decode


def parse(body: bytes, *, received: float) -> Event:
    """Read the envelope of a signed body; the object inside is only glanced at (2–3 µs for 4 KB).

    `received` (unix seconds) stands in where Stripe's `created` is absent or absurd.
    Raises PayloadError unless the body is a JSON object with an id, a type, and `object` saying it is an event.
    """
    envelope = _envelope(body)
    event_id, event_type = _name(envelope.id), _name(envelope.type)
    if event_id is None or event_type is None or envelope.object not in ("event", "v2.core.event"):
        raise PayloadError
    thin = envelope.object == "v2.core.event"
    context = _name(envelope.context) or ""
    object_type, object_id, customer = _thin_subject(envelope) if thin else _snapshot_subject(envelope)
    return Event(
        id=event_id,
        type=event_type,
        created=_seconds(envelope.created, received),
        thin=thin,
        livemode=envelope.livemode is True,
        account=_name(envelope.account) or account_in(context),
        context=context,
        api_version=_name(envelope.api_version),
        object_type=object_type,
        object_id=object_id,
        customer=customer,
        snapshot_event=_name(envelope.snapshot_event),
        body=body,
    )


def decode(body: bytes) -> dict[str, Any]:
    """A JSON object as plain values. Raises PayloadError for anything else."""
    value = decode_value(body)
    if not isinstance(value, dict):
        raise PayloadError("Invalid payload: not a JSON object")
    return value


def decode_value(body: bytes) -> Any:
    """Any JSON as plain values. Raises PayloadError for what is none."""
    try:
        return _read_json(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _decode_patiently(body)


def _decode_patiently(body: bytes) -> Any:
    # JSON's grammar allows an unpaired surrogate escape; msgspec refuses it, PostgreSQL's text cannot hold it.
    # The standard parser takes it, and the odd half becomes a replacement character. The other liberties that
    # parser takes (NaN, UTF-16) are not JSON.
    try:
        return _without_surrogates(json.loads(body.decode(), parse_constant=_not_json))
    except (ValueError, RecursionError) as error:
        raise PayloadError from error


def _not_json(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


def _envelope(body: bytes) -> _Envelope:
    try:
        if not body.isascii():
            # The decoder steps over strings it does not need without looking whether they are text.
            body.decode()
        return _read_envelope(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # Something inside has an unexpected shape: `data` a list, say. It is still an event if it says so.
        payload = decode(body)
    data = _mapping(payload.get("data"))
    known = {name: payload[name] for name in _Envelope.__struct_fields__ if name in payload}
    known["data"] = _Data(
        _Object(**_fields(data.get("object"), _Object)),
        _Previous(**_fields(data.get("previous_attributes"), _Previous)),
    )
    known["related_object"] = _Related(**_fields(payload.get("related_object"), _Related))
    return _Envelope(**known)


def _fields(value: Any, shape: type[msgspec.Struct]) -> dict[str, Any]:
    return {name: item for name, item in _mapping(value).items() if name in shape.__struct_fields__}


def _snapshot_subject(envelope: _Envelope) -> tuple[str | None, str | None, str | None]:
    data = envelope.data
    if data is None or data.object is None:
        return None, None, None
    subject = data.object
    object_type, object_id = _name(subject.object), _name(subject.id)
    if object_type == "customer":
        return object_type, object_id, object_id
    customer = _reference(subject.customer) or _reference(subject.customer_account)
    if customer is None and data.previous_attributes is not None:
        # A detached payment method has no customer any more, but the event still belongs in their order.
        customer = _reference(data.previous_attributes.customer)
    return object_type, object_id, customer


def _thin_subject(envelope: _Envelope) -> tuple[str | None, str | None, str | None]:
    related = envelope.related_object
    if related is None:
        return None, None, None
    object_type, object_id = _name(related.type), _name(related.id)
    return object_type, object_id, object_id if object_type == "customer" else None


def _account_of(context: Any) -> str:
    # A thin event says its connected account here; below an organisation it is the last part. Source: Stripe's
    # documentation, "Event destinations", and `StripeContext` of its Python library.
    last = (_name(context) or "").rpartition("/")[2]
    return last if last.startswith("acct_") else ""


def _reference(value: Any) -> str | None:
    # Stripe gives an id, or the whole object where the endpoint expands it.
    return _name(value.get("id")) if isinstance(value, dict) else _name(value)


def _name(value: Any) -> str | None:
    # PostgreSQL's text holds no NUL and no half of a surrogate pair.
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME or "\0" in value:
        return None
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def _seconds(value: Any, otherwise: float) -> int:
    if isinstance(value, str):  # thin events say 2026-10-28T12:00:00.000Z
        try:
            moment = datetime.fromisoformat(value)
            value = int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
        except (ValueError, OverflowError):
            return int(otherwise)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LAST_SECOND:
        return value
    return int(otherwise)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
