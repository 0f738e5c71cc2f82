"""`POST /stripe`: the door Stripe knocks at.

A plain ASGI callable: FastAPI's call path costs several times what receiving an event does. The documented twin that
`/docs` shows is in `admin.py`'s neighbour `app.py`; this one answers. `wire.py` answers the plain case before it is
an ASGI call, in the same words.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
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

#: The header after which a connection takes no further request.
CLOSE = (b"connection", b"close")


#: How long a body may hold its connection, from the end of the head to its last byte; also one of which nothing comes.
BODY_SECONDS = 15.0

#: Bytes of bodies that one process holds while the rest of them is still on its way, all connections together.
MOST_BYTES_ARRIVING = 64 * 1024 * 1024

#: Answered before the whole body was read, so nothing sensible can follow it on the connection.
UNREAD = (BodyTooLarge, BodyTooSlow, TooMuchArriving)


class ClientLeft(Exception):
    """The client closed the connection before its body was complete."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a sender reads."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Bodies:
    """Reads bodies, and counts what one process holds of those whose rest is still on its way."""

    def __init__(self) -> None:
        #: Bytes of the bodies of which not all came yet.
        self.arriving = 0

    async def read(self, receive: Receive, limit: int, length: bytes | None) -> bytes:
        """The whole body, `length` being what its header says of it.

        Raises BodyTooLarge beyond `limit` bytes, BodyTooSlow when it trickles, TooMuchArriving, and ClientLeft.
        """
        if length is not None and length.isdigit() and int(length[:12]) > limit:
            raise BodyTooLarge
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await self._whole(receive, parts, limit)
        except TimeoutError:
            raise BodyTooSlow from None
        finally:
            self.arriving -= sum(map(len, parts))

    async def _whole(self, receive: Receive, parts: list[bytes], limit: int) -> bytes:
        message = await receive()
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if message["type"] == "http.disconnect":
                raise ClientLeft
            if len(body) > limit:
                raise BodyTooLarge
            return body
        parts.append(body)
        self.arriving += len(body)
        await self._rest_of_body(receive, parts, limit)
        return b"".join(parts)

    async def _rest_of_body(self, receive: Receive, parts: list[bytes], limit: int) -> None:
        size, more = len(parts[0]), True
        while more and size <= limit:
            if self.arriving > MOST_BYTES_ARRIVING:
                raise TooMuchArriving
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            part: bytes = message.get("body", b"")
            parts.append(part)
            size += len(part)
            self.arriving += len(part)
            more = message.get("more_body", False)
        if size > limit:
            raise BodyTooLarge


class StripeEndpoint:
    """Receives deliveries for the system that `system()` names at the time of the call, None before the start."""

    def __init__(self, system: Callable[[], System | None], bodies: Bodies) -> None:
        self._system = system
        #: What it reads bodies with.
        self.bodies = bodies

    @property
    def system(self) -> System | None:
        """The running system, if there is one."""
        return self._system()

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
            await _send(send, refusal(Unavailable()))
            raise
        except ReceiveError as error:
            if shadow:
                happened("shadow_refused", reason=_reason(error))
            else:
                count_refusal(error)
            await _send(send, refusal(error))
        else:
            await _send(send, acknowledgement(receipt.event_id, receipt.event_type, receipt.message))

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
        body = await self.bodies.read(receive, system.settings.max_body_bytes, length)
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


def acknowledgement(event_id: str, event_type: str, message: str) -> Answer:
    """What a sender reads whose event is committed."""
    return _answer(200, {"status": "success", "message": message, "event_id": event_id, "event_type": event_type})


def refusal(error: ReceiveError) -> Answer:
    """What a sender reads whose event is not."""
    answer = _answer(error.status, {"detail": error.detail})
    if error.retry_after is not None:
        answer.headers.append((b"retry-after", str(error.retry_after).encode()))
    if isinstance(error, UNREAD):
        answer.headers.append(CLOSE)
    return answer


def _answer(status: int, content: dict[str, str]) -> Answer:
    body = _encode(content)
    return Answer(status, [_JSON, _SAFE, (b"content-length", str(len(body)).encode())], body)


async def _send(send: Send, answer: Answer) -> None:
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    await send({"type": "http.response.body", "body": answer.body})
