"""What other roads wrap Stripe's events in: Amazon EventBridge and Azure Event Grid.

The event itself is taken out byte for byte, so that what is stored is the JSON as the road carried it. An event that
comes without an envelope, from an input transformer say, is taken as it is.

    EventBridge   {"detail-type": …, "source": "aws.partner/stripe.com/ed_…", …, "detail": {the event}}
    CloudEvents   {"specversion": "1.0", …, "data": {the event}}, or a list of them; `data_base64` for its bytes
    Event Grid    [{"eventType": …, "dataVersion": …, "data": {the event}}, …]

Source: AWS' EventBridge user guide, "Events"; CloudEvents 1.0.2, "JSON event format" and "HTTP 1.1 web hooks"; Azure's
documentation, "Webhook event delivery".
"""

import base64
import binascii
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kamiyo.errors import PayloadError
from kamiyo.event import decode, decode_value

#: Events in one delivery, at most. Source: Azure's documentation, "Output batching": 5000.
MOST_EVENTS = 5000

_VALIDATION = "Microsoft.EventGrid.SubscriptionValidationEvent"
# Event Grid names itself so: worldwide, for the US government, in China.
_EVENT_GRID = re.compile(r"(?:[a-z0-9-]+\.)*eventgrid\.azure\.(?:net|us|cn)", re.IGNORECASE)

_NOTHING = msgspec.Raw()


class _EventBridge(msgspec.Struct):
    detail: msgspec.Raw = _NOTHING


class _Item(msgspec.Struct):
    specversion: Any = None
    eventType: Any = None
    data: msgspec.Raw = _NOTHING
    data_base64: Any = None


@dataclass(frozen=True, slots=True)
class Validation:
    """Event Grid asks whether this is the place: `code` is to be sent back."""

    code: str


_read_eventbridge = msgspec.json.Decoder(_EventBridge).decode
_read_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_read_item = msgspec.json.Decoder(_Item).decode


def from_eventbridge(body: bytes) -> bytes:
    """The event in a delivery of EventBridge; the body itself where it has no `detail`.

    Raises PayloadError for what is no JSON object.
    """
    _must_be_text(body)
    try:
        return bytes(_read_eventbridge(body).detail) or body
    except (msgspec.DecodeError, RecursionError):
        # Text that only the patient parser takes (half a surrogate pair): the event is written anew.
        payload = decode(body)
        return _written(payload["detail"]) if "detail" in payload else body


def from_eventgrid(body: bytes) -> list[bytes] | Validation:
    """What a delivery of Event Grid carries, in order: never empty, and perhaps not all of it events. Or the question
    whether this is the place.

    Raises PayloadError for what is neither a JSON object nor a list of JSON, for an empty list, and for a question
    without its code.
    """
    items = _items(body)
    return _question(items) or [_event(item) for item in items]


def question(body: bytes) -> Validation | None:
    """The question whether this is the place, if a delivery of Event Grid is that. Nothing else of it is looked at.

    Raises PayloadError as `from_eventgrid` does.
    """
    return _question(_items(body))


def _items(body: bytes) -> list[bytes]:
    _must_be_text(body)
    try:
        items = [bytes(item) for item in _read_list(body)] if body.lstrip()[:1] == b"[" else [body]
    except (msgspec.DecodeError, RecursionError):
        # As above; what is no JSON at all, this says.
        found = decode_value(body)
        items = [_written(item) for item in found] if isinstance(found, list) else [body]
    if not 0 < len(items) <= MOST_EVENTS:
        raise PayloadError
    return items


def _question(items: Sequence[bytes]) -> Validation | None:
    first = _item(items[0])
    return Validation(_code(first)) if first is not None and first.eventType == _VALIDATION else None


def may_deliver(origin: str) -> bool:
    """Whether a `WebHook-Request-Origin` is Event Grid's own name."""
    return _EVENT_GRID.fullmatch(origin) is not None


def _item(item: bytes) -> _Item | None:
    try:
        return _read_item(item)
    except (msgspec.DecodeError, RecursionError):
        pass
    try:
        said = decode(item)
    except PayloadError:
        return None
    data = msgspec.Raw(_written(said["data"])) if "data" in said else _NOTHING
    return _Item(said.get("specversion"), said.get("eventType"), data, said.get("data_base64"))


def _event(item: bytes) -> bytes:
    """What may be an event: whoever parses it finds out."""
    wrapped = _item(item)
    if wrapped is None or (wrapped.specversion is None and wrapped.eventType is None):
        return item
    if isinstance(wrapped.data_base64, str):
        try:
            return base64.b64decode(wrapped.data_base64, validate=True)
        except (binascii.Error, ValueError):
            return b""
    return bytes(wrapped.data)


def _code(question: _Item) -> str:
    code = decode(bytes(question.data)).get("validationCode")
    if not isinstance(code, str) or not 0 < len(code) <= 255:
        raise PayloadError
    return code


def _must_be_text(body: bytes) -> None:
    if not body.isascii():
        try:
            # The decoder steps over what it does not need without looking whether it is text.
            body.decode()
        except UnicodeDecodeError:
            raise PayloadError from None


def _written(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise PayloadError from error
