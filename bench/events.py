"""What is sent: distinct events of four types in equal parts, pretty-printed and signed as Stripe does it.

An event is known by its number. Numbers make ids, and ids are as unique as numbers; so two runs never send the same
event as long as they use different numbers. Standard library only: peers' stubs use it in environments of their own.
"""

import hashlib
import hmac
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SECRET = "whsec_benchmark0123456789abcdef"
API_VERSION = "2026-10-28.endive"

_SHAPES = Path(__file__).parent / "shapes"


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the four types: its object's shape, the prefix of its ids, the size of its whole body in bytes."""

    event_type: str
    shape: str
    prefix: str
    size: int


KINDS = (
    Kind("customer.subscription.updated", "subscription", "sub_", 4585),
    Kind("invoice.payment_succeeded", "invoice", "in_", 5877),
    Kind("customer.updated", "customer", "cus_", 2655),
    Kind("payment_method.attached", "payment_method", "pm_", 2270),
)

MEAN_BYTES = sum(kind.size for kind in KINDS) / len(KINDS)

# Stripe's values of metadata hold 500 characters.
_LONGEST_PAD = 400


def event_id(number: int) -> str:
    """The event's id: ordered in time at its front, as Stripe's are, so that indexes grow at their end."""
    return f"evt_1{number:012d}KamiyoBench"


def object_id(number: int) -> str:
    """The id of the object event `number` is about; unique as well, so every event makes a row."""
    return f"{KINDS[number % 4].prefix}1{number:012d}KamiyoBench"


def customer_id(number: int, customers: int) -> str:
    """Whose the event is: one of `customers`, except that `customer.updated` is about a customer of its own."""
    # By a large step, so that neighbours in time are not neighbours in the index; each customer gets every type.
    return _customer((number // 4 * 7_919 + number % 4 * 101) % customers)


def customer_ids(customers: int) -> list[str]:
    """All that `customer_id` can return."""
    return [_customer(which) for which in range(customers)]


def _customer(which: int) -> str:
    return f"cus_bench{which:012d}"


def body(number: int, *, created: int, customers: int) -> bytes:
    """The whole event, `created` in unix seconds."""
    return body_about(object_id(number), number, created=created, owner=customer_id(number, customers))


def body_about(made: str, number: int, *, created: int, owner: str) -> bytes:
    """The same, about an object that other events may be about as well."""
    return _template(KINDS[number % 4]) % {
        b"event": event_id(number).encode(),
        b"object": made.encode(),
        b"customer": owner.encode(),
        b"item": made.rpartition("_")[2].encode(),
        b"created": b"%d" % created,
    }


def signature(payload: bytes, timestamp: int) -> str:
    """The `Stripe-Signature` header for `payload`."""
    signed = hmac.digest(SECRET.encode(), b"%d." % timestamp + payload, hashlib.sha256).hex()
    return f"t={timestamp},v1={signed}"


def requests(path: str, *, first: int, count: int, customers: int, now: int, signed: bool = True) -> Iterator[bytes]:
    """`count` whole HTTP/1.1 requests for the events from number `first` on."""
    for number in range(first, first + count):
        payload = body(number, created=now - 2, customers=customers)
        header = f"Stripe-Signature: {signature(payload, now)}\r\n" if signed else ""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: Stripe/1.0 (+https://stripe.com/docs/webhooks)\r\n"
            f"Accept: */*\r\nContent-Type: application/json; charset=utf-8\r\n{header}"
            f"Content-Length: {len(payload)}\r\n\r\n"
        )
        yield head.encode() + payload


def write_requests(file: Path, path: str, *, first: int, count: int, customers: int, now: int) -> None:
    """The same into a file `wrk.lua` reads: before each request its length, as eight digits."""
    with file.open("wb", buffering=1 << 20) as out:
        for request in requests(path, first=first, count=count, customers=customers, now=now):
            out.write(b"%08d" % len(request))
            out.write(request)


def stripe_object(shape: str, made: str, customer: str, created: int) -> dict[str, Any]:
    """The object as the API would give it, for a stub of the API."""
    text = json.dumps(_load(shape), ensure_ascii=False).replace('"@CREATED@"', str(created))
    values = {"@OBJECT@": made, "@CUSTOMER@": customer, "@ITEM@": made.rpartition("_")[2]}
    for token, value in values.items():
        text = text.replace(token, value)
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@cache
def _load(shape: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((_SHAPES / f"{shape}.json").read_text(encoding="utf-8"))
    return loaded


@cache
def _template(kind: Kind) -> bytes:
    """The body with `%(name)b` where an event differs, padded (in metadata) to exactly `kind.size` bytes."""
    text = _padded(kind).replace("%", "%%").replace('"@CREATED@"', "%(created)b")
    for token in ("event", "object", "customer", "item"):
        text = text.replace(f"@{token.upper()}@", f"%({token})b")
    return text.encode()


def _padded(kind: Kind) -> str:
    example = {
        "@EVENT@": event_id(0),
        "@OBJECT@": object_id(0).replace("sub_", kind.prefix),
        "@CUSTOMER@": customer_id(0, 1),
        "@ITEM@": object_id(0).rpartition("_")[2],
        '"@CREATED@"': "1790000000",
    }
    for notes in range(1, 10):
        missing = kind.size - _length(_text(kind, [""] * notes), example)
        if 0 <= missing <= notes * _LONGEST_PAD:
            lengths = [missing // notes + (missing % notes if note == 0 else 0) for note in range(notes)]
            return _text(kind, [_noise(length, seed=note) for note, length in enumerate(lengths)])
    raise ValueError(f"the shape {kind.shape} cannot be made {kind.size} bytes long")


def _text(kind: Kind, notes: list[str]) -> str:
    metadata = {f"note_{number}": note for number, note in enumerate(notes, 1)}
    subject = {**_load(kind.shape), "metadata": metadata}
    data: dict[str, Any] = {"object": subject}
    if kind.event_type.endswith(".updated"):
        data["previous_attributes"] = {"metadata": {"workspace": "before"}}
    envelope = {
        "id": "@EVENT@",
        "object": "event",
        "api_version": API_VERSION,
        "created": "@CREATED@",
        "data": data,
        "livemode": False,
        "pending_webhooks": 1,
        "request": {"id": None, "idempotency_key": None},
        "type": kind.event_type,
    }
    return json.dumps(envelope, indent=2, ensure_ascii=False)


def _length(text: str, values: dict[str, str]) -> int:
    for token, value in values.items():
        text = text.replace(token, value)
    return len(text.encode())


def _noise(length: int, *, seed: int) -> str:
    """Letters that do not compress, the same each time."""
    text = "".join(hashlib.sha256(f"{seed}/{part}".encode()).hexdigest() for part in range(length // 64 + 1))
    return text[:length]
