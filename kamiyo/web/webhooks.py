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
    Unavailable,
)
from kamiyo.receive import Receipt
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


class ClientLeft(Exception):
    """The client closed the connection before its body was complete."""


class StripeEndpoint:
    """Receives deliveries for the system that `system()` names at the time of the call, None before the start."""

    def __init__(self, system: Callable[[], System | None]) -> None:
        self._system = system

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one delivery: every way it can end is one of the contract's answers."""
        try:
            receipt = await self._receive(scope, receive)
        except ClientLeft:
            happened("client_left")
        except ReceiveError as error:
            count_refusal(error)
            await _answer(send, error.status, {"detail": error.detail}, error.retry_after)
        else:
            await _answer(
                send,
                200,
                {
                    "status": "success",
                    "message": receipt.message.value,
                    "event_id": receipt.event_id,
                    "event_type": receipt.event_type,
                },
            )

    async def _receive(self, scope: Scope, receive: Receive) -> Receipt:
        system = self._system()
        if system is None:
            raise Unavailable("the application's lifespan has not started")
        system.receiver.ready()
        signature, length = None, None
        for name, value in scope["headers"]:
            if name == b"stripe-signature":
                signature = value
            elif name == b"content-length":
                length = value
        body = await read_body(receive, system.settings.max_body_bytes, length)
        try:
            receipt = await system.receiver.receive(body, signature)
        except SignatureError as error:
            system.alerts.signatures.refused(error.reason, body)
            raise
        system.alerts.signatures.accepted(body)
        return receipt


async def read_body(receive: Receive, limit: int, length: bytes | None) -> bytes:
    """The whole body, `length` being what its header says of it.

    Raises BodyTooLarge beyond `limit` bytes, BodyTooSlow when it trickles, and ClientLeft.
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
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await _rest_of_body(receive, body, limit)
    except TimeoutError:
        raise BodyTooSlow from None


async def _rest_of_body(receive: Receive, body: bytes, limit: int) -> bytes:
    parts, size = [body], len(body)
    while size <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part: bytes = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if not message.get("more_body", False):
            break
    if size > limit:
        raise BodyTooLarge
    return b"".join(parts)


def count_refusal(error: ReceiveError) -> None:
    """Count a refused delivery by its reason, and log it."""
    if isinstance(error, SignatureError):
        reason = f"signature_{error.reason}"
    elif isinstance(error, RoadKeyInvalid):
        reason = "api_key"
    elif isinstance(error, PayloadError):
        reason = "payload"
    elif isinstance(error, BodyTooLarge):
        reason = "too_large"
    elif isinstance(error, BodyTooSlow):
        reason = "too_slow"
    else:
        reason = type(error).__name__.lower()
    telemetry.REJECTED.labels(reason).inc()
    happened("delivery_rejected", reason=reason)


async def _answer(send: Send, status: int, content: dict[str, str], retry_after: int | None = None) -> None:
    body = _encode(content)
    headers = [_JSON, _SAFE, (b"content-length", str(len(body)).encode())]
    if retry_after is not None:
        headers.append((b"retry-after", str(retry_after).encode()))
    if status in (408, 413):
        # The rest of the body was not read, so nothing sensible can follow it on this connection.
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
