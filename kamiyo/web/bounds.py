"""What a connection may keep before it has asked anything: so many bytes of a head, and so much time for them.

uvicorn bounds neither. One client that sends headers without end would take all the memory, and clients that send
nothing would keep their connections for ever. Bodies are bounded where they are read: see `webhooks.py`.
"""

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from kamiyo import telemetry
from kamiyo.telemetry import happened

#: Request line and headers together. Stripe's are under one kilobyte; a browser with many cookies sends a few.
MOST_HEAD_BYTES = 65_536

#: From the opening of a connection, or the first byte of its next request, until the head is complete.
HEAD_SECONDS = 15.0

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol for one connection, with bounds on the head of a request."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Give the first head its time."""
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came in, and count it where it belongs to a head that is not complete."""
        # uvicorn makes a cycle for each request, as soon as its head is complete.
        latest = self.cycle
        between = latest is None or latest.response_complete or not getattr(latest, "more_body", True)
        super().data_received(data)
        if self.cycle is not latest:
            self._end_head()
        elif between:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self._refuse(_TOO_LARGE, "head_too_large")
            elif self._head_timer is None:
                self._begin_head()

    def _begin_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _end_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        if self._head_bytes:
            self._refuse(_TOO_SLOW, "head_too_slow")
        else:
            # It has not begun to ask, and browsers do so to be ready: nothing to answer, nothing to tell of.
            self.transport.close()

    def _refuse(self, answer: bytes, reason: str) -> None:
        if self.transport.is_closing():
            return
        telemetry.REJECTED.labels(reason).inc()
        happened("delivery_rejected", reason=reason)
        # In the middle of another request's answer there is no place for this one.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(answer)
        self.transport.close()
