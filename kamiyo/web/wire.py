"""The wire: a delivery answered as it comes off its connection, without becoming an ASGI call.

For each request uvicorn makes a scope, a task and half a dozen awaits, which took longer than reading, verifying and
storing the event together. A delivery needs none of it: when its last byte is there it joins the group commit, and when
that is through its answer is written.

Only the plain case is taken, which is every delivery of Stripe's: POST to the one path, HTTP/1.1, one Content-Length of
moderate size, nothing else under way on the connection. Whatever differs goes through ASGI to `StripeEndpoint`, which
gives the same answers. httptools parses both; how a request ends is never decided here.
"""

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from kamiyo.errors import BodyTooSlow, ReceiveError, SecretMissing, SignatureError
from kamiyo.event import Event
from kamiyo.receive import Message
from kamiyo.telemetry import happened
from kamiyo.web.app import STRIPE_PATH, KamiyoApi
from kamiyo.web.system import System
from kamiyo.web.webhooks import BODY_SECONDS, StripeEndpoint, acknowledgement, count_refusal, rendered

_PATH = STRIPE_PATH.encode()

# Below what uvicorn lets a connection read ahead, so that no delivery here ever needs its flow control.
_LONGEST_BODY = 65_536


class _Nobody:
    def set(self) -> None:
        """Wake nobody: there is no task."""


class _Delivery:
    """What uvicorn calls a cycle, from the last header to the answer. Its public attributes are those uvicorn uses."""

    __slots__ = (
        "_parts",
        "_protocol",
        "_signature",
        "_system",
        "disconnected",
        "keep_alive",
        "response_complete",
        "timer",
    )

    message_event = _Nobody()

    def __init__(self, protocol: "WireProtocol", system: System, signature: bytes | None, *, keep_alive: bool) -> None:
        self._protocol, self._system, self._signature = protocol, system, signature
        self._parts: list[bytes] | None = []
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False
        self.timer: asyncio.TimerHandle | None = None

    @property
    def reading(self) -> bool:
        """Whether its body is not complete yet."""
        return self._parts is not None and not self.response_complete

    def read(self, part: bytes) -> None:
        """Take a part of the body."""
        if self._parts is not None:
            self._parts.append(part)

    def complete(self) -> None:
        """The body is complete: hand it over."""
        parts, self._parts = self._parts, None
        if self.response_complete or parts is None:
            return
        if self.timer is not None:
            self.timer.cancel()
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        signatures = self._system.alerts.signatures
        try:
            self._system.receiver.submit(body, self._signature, self._answered)
        except SignatureError as error:
            signatures.refused(error.reason, body)
            self._refuse(error)
        except ReceiveError as error:
            self._refuse(error)
        else:
            signatures.accepted(body)

    def too_slow(self) -> None:
        """Its time is over and its body is not complete."""
        if self.reading:
            self._refuse(BodyTooSlow())

    def _answered(self, event: Event, answer: Message | ReceiveError) -> None:
        if isinstance(answer, ReceiveError):
            self._refuse(answer)
        else:
            headers, body = rendered(200, acknowledgement(event.id, event.type, answer))
            self._protocol.answer(self, 200, headers, body)

    def _refuse(self, error: ReceiveError) -> None:
        count_refusal(error)
        headers, body = rendered(error.status, {"detail": error.detail}, error.retry_after)
        self._protocol.answer(self, error.status, headers, body)


class WireProtocol(HttpToolsProtocol):
    """uvicorn's protocol for one connection, with the short way for deliveries."""

    cycle: Any
    parser: Any

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        plain = not config.access_log and config.limit_concurrency is None
        self._endpoint = _endpoint_of(self.app) if plain else None

    def data_received(self, data: bytes) -> None:
        """Parse what came in; time a body of which not all came at once."""
        super().data_received(data)
        cycle = self.cycle
        if type(cycle) is _Delivery and cycle.reading and cycle.timer is None:
            cycle.timer = self.loop.call_later(BODY_SECONDS, cycle.too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note a client that left in the middle of its body."""
        cycle = self.cycle
        if type(cycle) is _Delivery and cycle.reading:
            happened("client_left")
            cycle.response_complete = True
            if cycle.timer is not None:
                cycle.timer.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Begin a request; the scope is made when it turns out to need one."""
        self.url = b""
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header."""
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Decide which way the request goes."""
        delivery = self._delivery() if self.url == _PATH and self._endpoint is not None else None
        if delivery is not None:
            self.cycle = delivery
            return
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url = url
        for name, value in headers:
            super().on_header(name, value)
        super().on_headers_complete()

    def _delivery(self) -> _Delivery | None:
        parser = self.parser
        if (
            parser.get_method() != b"POST"
            or parser.get_http_version() != "1.1"
            or parser.should_upgrade()
            or (self.cycle is not None and not self.cycle.response_complete)
        ):
            return None
        signature, length = None, b""
        for name, value in self.headers:
            name = name.lower()
            if name == b"stripe-signature":
                signature = value
            elif name == b"content-length":
                length = value
            elif name in (b"transfer-encoding", b"expect"):
                return None
        system = self._endpoint.system if self._endpoint is not None else None
        if system is None or not length.isdigit() or len(length) > len(str(_LONGEST_BODY)):
            return None
        if int(length) > min(_LONGEST_BODY, system.settings.max_body_bytes):
            return None
        try:
            system.receiver.ready()
        except SecretMissing:
            return None
        return _Delivery(self, system, signature, keep_alive=parser.should_keep_alive())

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        cycle = self.cycle
        if type(cycle) is _Delivery:
            cycle.read(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        cycle = self.cycle
        if type(cycle) is not _Delivery:
            super().on_message_complete()
            return
        try:
            cycle.complete()
        except Exception as error:
            # As uvicorn does where an application raises: the server's error, not the client's.
            self.logger.error("Exception while receiving a delivery\n", exc_info=error)
            self.answer(
                cycle,
                500,
                [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"21"), _CLOSE],
                b"Internal Server Error",
            )

    def answer(self, delivery: _Delivery, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Write a delivery's answer, and let the connection go on."""
        delivery.response_complete = True
        if _CLOSE in headers:
            delivery.keep_alive = False
        elif not delivery.keep_alive:
            headers.append(_CLOSE)
        if self.transport.is_closing():
            return
        parts = [STATUS_LINE[status]]
        for name, value in (*self.server_state.default_headers, *headers):
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n", body)
        self.transport.write(b"".join(parts))
        if not delivery.keep_alive:
            self.transport.close()
        self.on_response_complete()


_CLOSE = (b"connection", b"close")


def _endpoint_of(app: Any) -> StripeEndpoint | None:
    # uvicorn wraps an application in others (proxy headers). One that is not Kamiyo's own may have a middleware of its
    # own around the router, which must not be gone past.
    for _ in range(5):
        if isinstance(app, KamiyoApi):
            return app.stripe
        app = getattr(app, "app", None)
    return None
