"""The wire: a delivery answered as it comes off its connection, without becoming an ASGI call.

For each request uvicorn makes a scope, a task and half a dozen awaits, which was a fifth of all that an event costs. A
delivery needs none of it: when its last byte is there it joins the group commit, and when that is through its answer is
written.

Only the plain case is taken: POST to the one path without a query, HTTP/1.1, one Content-Length of
moderate size, nothing else under way on the connection, no traces wanted. Whatever differs goes through ASGI to
`StripeEndpoint`, which gives the same answers. httptools parses both; how a request ends is never decided here. See
docs/decisions/0026.
"""

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from kamiyo.errors import BodyTooSlow, ReceiveError, SecretMissing, SignatureError, TooMuchArriving
from kamiyo.event import Event
from kamiyo.receive import Message
from kamiyo.telemetry import happened
from kamiyo.web import webhooks
from kamiyo.web.app import STRIPE_PATH, KamiyoApi
from kamiyo.web.bounds import BoundedProtocol
from kamiyo.web.system import System
from kamiyo.web.webhooks import CLOSE, Answer, StripeEndpoint, acknowledgement, count_refusal, refusal

_PATH = STRIPE_PATH.encode()

# Below what uvicorn lets a connection read ahead, so that no delivery here ever needs its flow control.
_LONGEST_BODY = 65_536


class _Nobody:
    def set(self) -> None:
        """Wake nobody: there is no task."""


class _Delivery:
    """What uvicorn calls a cycle, from the last header to the answer. Its public attributes are those uvicorn uses."""

    __slots__ = (
        "_arriving",
        "_endpoint",
        "_parts",
        "_protocol",
        "_signature",
        "_system",
        "_timer",
        "disconnected",
        "keep_alive",
        "more_body",
        "response_complete",
    )

    message_event = _Nobody()

    def __init__(
        self,
        protocol: "WireProtocol",
        endpoint: StripeEndpoint,
        system: System,
        signature: bytes | None,
        *,
        keep_alive: bool,
    ) -> None:
        self._protocol, self._endpoint, self._system, self._signature = protocol, endpoint, system, signature
        self._parts: list[bytes] = []
        self._arriving = 0
        self._timer: asyncio.TimerHandle | None = None
        self.keep_alive = keep_alive
        self.disconnected = False
        self.more_body = True
        self.response_complete = False

    def read(self, part: bytes) -> None:
        """Take a part of the body."""
        self._parts.append(part)

    def wait(self) -> None:
        """Not all of the body came at once: from now on it is timed and counted."""
        loop = self._protocol.loop
        if self._timer is None:
            self._timer = loop.call_later(webhooks.BODY_SECONDS, self._refuse, BodyTooSlow())
        came = sum(map(len, self._parts)) - self._arriving
        self._arriving += came
        self._endpoint.bodies.arriving += came
        if self._endpoint.bodies.arriving > webhooks.MOST_BYTES_ARRIVING:
            self._refuse(TooMuchArriving())

    def complete(self) -> None:
        """The body is complete: hand it over."""
        if self.response_complete:
            return
        self._read_no_more()
        body = b"".join(self._parts)
        self._parts.clear()
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

    def leave(self) -> None:
        """The client is gone."""
        if self.more_body and not self.response_complete:
            happened("client_left")
            self._read_no_more()
            self.response_complete = True

    def _read_no_more(self) -> None:
        self.more_body = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._endpoint.bodies.arriving -= self._arriving

    def _answered(self, event: Event, answer: Message | ReceiveError) -> None:
        if isinstance(answer, ReceiveError):
            self._refuse(answer)
        else:
            self._protocol.answer(self, acknowledgement(event.id, event.type, answer))

    def _refuse(self, error: ReceiveError) -> None:
        self._read_no_more()
        count_refusal(error)
        self._protocol.answer(self, refusal(error))


class WireProtocol(BoundedProtocol):
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
        """Parse what came in."""
        super().data_received(data)
        cycle = self.cycle
        if type(cycle) is _Delivery and cycle.more_body and not cycle.response_complete:
            cycle.wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note a client that left in the middle of its body."""
        if type(self.cycle) is _Delivery:
            self.cycle.leave()
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
        delivery = self._delivery(self._endpoint) if self._endpoint is not None and self.url == _PATH else None
        if delivery is not None:
            self.cycle = delivery
            return
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url = url
        for name, value in headers:
            super().on_header(name, value)
        super().on_headers_complete()

    def _delivery(self, endpoint: StripeEndpoint) -> _Delivery | None:
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
        system = endpoint.system
        if system is None or system.receiver.traced or not length.isdigit() or len(length) > len(str(_LONGEST_BODY)):
            return None
        if int(length) > min(_LONGEST_BODY, system.settings.max_body_bytes):
            return None
        try:
            system.receiver.ready()
        except SecretMissing:
            return None
        return _Delivery(self, endpoint, system, signature, keep_alive=parser.should_keep_alive())

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
            self.answer(cycle, Answer(500, [_PLAIN, (b"content-length", b"21"), CLOSE], b"Internal Server Error"))

    def answer(self, delivery: _Delivery, answer: Answer) -> None:
        """Write a delivery's answer, and let the connection go on."""
        delivery.response_complete = True
        headers = answer.headers
        if CLOSE in headers:
            delivery.keep_alive = False
        elif not delivery.keep_alive:
            headers.append(CLOSE)
        if self.transport.is_closing():
            return
        parts = [STATUS_LINE[answer.status]]
        for name, value in (*self.server_state.default_headers, *headers):
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n", answer.body)
        self.transport.write(b"".join(parts))
        if not delivery.keep_alive:
            self.transport.close()
        self.on_response_complete()


_PLAIN = (b"content-type", b"text/plain; charset=utf-8")


def _endpoint_of(app: Any) -> StripeEndpoint | None:
    # uvicorn wraps an application in others (proxy headers). One that is not Kamiyo's own may have a middleware of its
    # own around the router, which must not be gone past.
    for _ in range(5):
        if isinstance(app, KamiyoApi):
            return app.stripe
        app = getattr(app, "app", None)
    return None
