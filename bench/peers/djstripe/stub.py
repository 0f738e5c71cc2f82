"""A stub of the Stripe API, as cheap as possible: `python -m bench.peers.djstripe.stub PORT`.

It answers at once with the object an event carried; the real API takes about 100 ms for each.
"""

import asyncio
import json
import sys
from functools import cache
from typing import Any, cast

import uvloop

from bench.events import customer_id, stripe_object
from bench.peers.base import CUSTOMERS

_CREATED = 1_790_000_000
_SHAPES = {
    "subscriptions": "subscription",
    "invoices": "invoice",
    "customers": "customer",
    "payment_methods": "payment_method",
}


def answer(path: str) -> bytes | None:
    """The body for `GET path`; None for what the stub does not have."""
    _, resource, *rest = path.partition("?")[0].strip("/").split("/")
    made = rest[0] if rest else ""
    if len(rest) > 1:
        return json.dumps({"object": "list", "data": [], "has_more": False, "url": path}).encode()
    if resource in ("account", "accounts"):
        return json.dumps(_account()).encode()
    if resource in _SHAPES:
        digits = "".join(filter(str.isdigit, made))[1:] or "0"
        return _object(_SHAPES[resource]) % {
            b"id": made.encode(),
            b"customer": customer_id(int(digits), CUSTOMERS).encode(),
            b"item": made.rpartition("_")[2].encode(),
        }
    if resource in ("prices", "plans", "products"):
        return json.dumps({**_catalogue(resource), "id": made}).encode()
    return None


@cache
def _object(shape: str) -> bytes:
    text = json.dumps(stripe_object(shape, "@ID@", "@CUSTOMER@", _CREATED)).replace("%", "%%")
    return (
        text.replace('"si_@ID@"', '"si_%(item)b"')
        .replace("@ID@", "%(id)b")
        .replace("@CUSTOMER@", "%(customer)b")
        .encode()
    )


@cache
def _catalogue(resource: str) -> dict[str, Any]:
    item = stripe_object("subscription", "sub_1", "cus_1", _CREATED)["items"]["data"][0]
    if resource == "prices":
        return dict(item["price"])
    if resource == "plans":
        return dict(item["plan"])
    product = {"object": "product", "active": True, "created": _CREATED, "name": "Team", "type": "service"}
    empty: dict[str, Any] = {"attributes": [], "images": [], "metadata": {}, "marketing_features": []}
    unset = dict.fromkeys(("default_price", "description", "package_dimensions", "shippable", "tax_code", "url"))
    return {**product, **empty, **unset, "livemode": False, "unit_label": None, "statement_descriptor": None}


def _account() -> dict[str, Any]:
    return {
        "id": "acct_1BenchmarkAccount",
        "object": "account",
        "business_profile": {"name": "Benchmark"},
        "business_type": "company",
        "charges_enabled": True,
        "country": "US",
        "created": _CREATED,
        "default_currency": "usd",
        "details_submitted": True,
        "email": "owner@bench.example",
        "metadata": {},
        "payouts_enabled": True,
        "settings": {"branding": {"icon": None, "logo": None}, "dashboard": {"display_name": "Benchmark"}},
        "type": "standard",
    }


class Stub(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to answer."""
        # uvloop's transports have the methods of asyncio's, but not its base class.
        self._transport = cast(asyncio.Transport, transport)
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        """Answer each request; a GET has no body."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
            path = head.split(b" ", 2)[1].decode()
            body = answer(path)
            status = b"200 OK"
            if body is None:
                print("the stub does not have", path, flush=True)
                status, body = (
                    b"404 Not Found",
                    b'{"error": {"type": "invalid_request_error", "message": "none"}}',
                )
            self._transport.write(
                b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nRequest-Id: req_1\r\nContent-Length: %d\r\n\r\n%b"
                % (status, len(body), body)
            )


async def main() -> None:
    """Serve until the process is ended."""
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
