"""`POST /stripe`: the door Stripe knocks at.

A plain ASGI callable: FastAPI's call path costs several times what receiving an event does. The documented twin that
`/docs` shows is in `admin.py`'s neighbour `app.py`; this one answers.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from kamiyo import telemetry
from kamiyo.errors import (
    BodyTooLarge,
    BodyTooSlow,
    PayloadError,
    ReceiveError,
    RoadKeyInvalid,
    SignatureError,
    TooMuchArriving,
    Unavailable,
)
from kamiyo.receive import Receipt
from kamiyo.shadow import ShadowReceipt, is_shadow
from kamiyo.telemetry import happened
from kamiyo.web.system import System

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_encode = msgspec.json.Encoder().encode
_JSON = (b"content-type", b"application/json")
_SAFE = (b"x-content-type-options", b"nosniff")


# A body that came in one piece, as Stripe's do, is never timed. One that trickles may hold its connection this long.
_BODY_SECONDS = 15.0


#: Bytes of bodies that one process holds while the rest of them is still on its way, all connections together.
MOST_BYTES_ARRIVING = 64 * 1024 * 1024

#: Answered before the whole body was read, so nothing sensible can follow it on the connection.
UNREAD = (BodyTooLarge, BodyTooSlow, TooMuchArriving)


class ClientLeft(Exception):
    """The client closed the connection before its body was complete."""


class Bodies:
    """Reads bodies, and counts what one process holds of those whose rest is still on its way."""

    def __init__(self) -> None:
        self._bytes_arriving = 0

    async def read(self, receive: Receive, limit: int, length: bytes | None) -> bytes:
        """The whole body, `length` being what its header says of it.

        Raises BodyTooLarge beyond `limit` bytes, BodyTooSlow when it trickles, TooMuchArriving, and ClientLeft.
        """
        if length is not None and length.isdigit() and int(length[:12]) > limit:
            raise BodyTooLarge
        message = await receive()
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if message["type"] == "http.disconnect":
                raise ClientLeft
            if len(body) > limit:
                raise BodyTooLarge
            return body
        parts = [body]
        self._bytes_arriving += len(body)
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                await self._rest_of_body(receive, parts, limit)
        except TimeoutError:
            raise BodyTooSlow from None
        finally:
            self._bytes_arriving -= sum(map(len, parts))
        return b"".join(parts)

    async def _rest_of_body(self, receive: Receive, parts: list[bytes], limit: int) -> None:
        size, more = len(parts[0]), True
        while more and size <= limit:
            if self._bytes_arriving > MOST_BYTES_ARRIVING:
                raise TooMuchArriving
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            part: bytes = message.get("body", b"")
            parts.append(part)
            size += len(part)
            self._bytes_arriving += len(part)
            more = message.get("more_body", False)
        if size > limit:
            raise BodyTooLarge


class StripeEndpoint:
    """Receives deliveries for the system that `system()` names at the time of the call, None before the start."""

    def __init__(self, system: Callable[[], System | None], bodies: Bodies) -> None:
        self._system = system
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one delivery: every way it can end is one of the contract's answers."""
        # Only a twin endpoint's address has a query, so that looking costs the others nothing.
        query: bytes = scope.get("query_string", b"")
        shadow = bool(query) and is_shadow(query)
        receipt: Receipt | ShadowReceipt
        try:
            receipt = await self._receive(scope, receive, shadow)
        except ClientLeft:
            happened("client_left")
        except asyncio.CancelledError:
            # A server that stops gives up on whoever still waits; unanswered, that would be called an error of ours.
            await _answer(send, Unavailable.status, {"detail": Unavailable.detail}, Unavailable.retry_after)
            raise
        except ReceiveError as error:
            if shadow:
                happened("shadow_refused", reason=_reason(error))
            else:
                count_refusal(error)
            unread = isinstance(error, UNREAD)
            await _answer(send, error.status, {"detail": error.detail}, error.retry_after, close=unread)
        else:
            await _answer(
                send,
                200,
                {
                    "status": "success",
                    "message": receipt.message,
                    "event_id": receipt.event_id,
                    "event_type": receipt.event_type,
                },
            )

    async def _receive(self, scope: Scope, receive: Receive, shadow: bool) -> Receipt | ShadowReceipt:
        system = self._system()
        if system is None:
            raise Unavailable("the application's lifespan has not started")
        (system.shadow if shadow else system.receiver).ready()
        signature, length, caller = None, None, None
        for name, value in scope["headers"]:
            if name == b"stripe-signature":
                signature = value
            elif name == b"content-length":
                length = value
            elif name == b"traceparent":
                caller = value
        body = await self._bodies.read(receive, system.settings.max_body_bytes, length)
        if shadow:
            return await system.shadow.receive(body, signature)
        try:
            receipt = await system.receiver.receive(body, signature, caller)
        except SignatureError as error:
            system.alerts.signatures.refused(error.reason, body)
            raise
        system.alerts.signatures.accepted(body)
        return receipt


def _reason(error: ReceiveError) -> str:
    if isinstance(error, SignatureError):
        return f"signature_{error.reason}"
    if isinstance(error, RoadKeyInvalid):
        return "api_key"
    if isinstance(error, PayloadError):
        return "payload"
    if isinstance(error, BodyTooLarge):
        return "too_large"
    if isinstance(error, BodyTooSlow):
        return "too_slow"
    return type(error).__name__.lower()


def count_refusal(error: ReceiveError) -> None:
    """Count a refused delivery by its reason, and log it."""
    reason = _reason(error)
    telemetry.REJECTED.labels(reason).inc()
    happened("delivery_rejected", reason=reason)


async def _answer(
    send: Send, status: int, content: dict[str, str], retry_after: int | None = None, *, close: bool = False
) -> None:
    body = _encode(content)
    headers = [_JSON, _SAFE, (b"content-length", str(len(body)).encode())]
    if retry_after is not None:
        headers.append((b"retry-after", str(retry_after).encode()))
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
