"""HTTP/1.1 on a bare socket, for what an HTTP client is too polite to do.

Half a body, two header lines of one name, a connection whose sending half is closed: here each is a matter of
which bytes are written when. One request and one answer to a connection.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from kamiyo.errors import KamiyoError

# The longest head of an answer that is read, in bytes.
_LONGEST_HEAD = 65_536


class ConformError(KamiyoError):
    """The check cannot be made as asked; the message says what to give instead."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where deliveries go. `path` includes the query."""

    secure: bool
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> "Address":
        """Read a URL. Raises ConformError unless it is http or https, with a host and without a password."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ConformError(f"{url!r} is no URL") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ConformError("give the receiver's address as http://host:port/path or https://host/path")
        secure = parts.scheme == "https"
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not (path + parts.hostname).isascii() or not (path + parts.hostname).isprintable() or " " in path:
            raise ConformError("the receiver's address has characters that must be percent-encoded")
        return cls(secure, parts.hostname, port or (443 if secure else 80), path)

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


class Unreachable(Exception):
    """No connection could be made; the text says why."""

    def __init__(self, error: OSError) -> None:
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = f"its certificate is not trusted, {error.verify_message}"
        elif isinstance(error, TimeoutError):
            reason = "no connection in time"
        elif isinstance(error, ConnectionRefusedError):
            reason = "the connection is refused"
        else:
            reason = error.strerror or type(error).__name__
        super().__init__(f"could not be reached: {reason}")


class Ending(StrEnum):
    """How a connection went, from the sender's end."""

    answered = "answered"
    closed = "closed the connection without an answer"
    silent = "gave no answer in time"
    garbled = "answered something that is not HTTP"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: `status` is None unless it is an HTTP answer."""

    ending: Ending
    status: int | None = None

    @property
    def accepted(self) -> bool:
        """Whether Stripe would call the event delivered."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def refused(self) -> bool:
        """Whether it says that the request was at fault."""
        return self.status is not None and 400 <= self.status < 500

    @property
    def left(self) -> bool:
        """Whether the connection was closed without an answer."""
        return self.ending is Ending.closed

    def __str__(self) -> str:
        return self.ending.value if self.status is None else f"{self.ending.value} {self.status}"


def head(address: Address, signatures: Sequence[str], length: int | None) -> bytes:
    """The head of a delivery, worded as Stripe's are; one header line for each of `signatures`.

    `length` None announces a body in chunks.
    """
    lines = [
        f"POST {address.path} HTTP/1.1",
        f"Host: {address.authority}",
        "User-Agent: kamiyo-conform",
        "Accept: */*; q=0.5, application/xml",
        "Cache-Control: no-cache",
        "Content-Type: application/json; charset=utf-8",
        *(f"Stripe-Signature: {signature}" for signature in signatures),
        "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}",
        "Connection: close",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


class Wire:
    """One open connection. What comes back is read from the start on: an early answer is never missed."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
        self._writer, self._seconds = writer, seconds
        self._reading = asyncio.create_task(_read(reader))

    async def send(self, data: bytes) -> bool:
        """Write; False when nothing more can be written: the other end has gone, or has stopped reading."""
        try:
            async with asyncio.timeout(self._seconds):
                self._writer.write(data)
                await self._writer.drain()
        except OSError:  # TimeoutError is one
            return False
        return not self._writer.is_closing()

    def half_close(self) -> bool:
        """Close the sending half; False where the connection has no such thing (TLS)."""
        if not self._writer.can_write_eof():
            return False
        with contextlib.suppress(OSError):  # it is gone altogether
            self._writer.write_eof()
        return True

    async def answered_within(self, seconds: float) -> bool:
        """Whether the answer, or the end of the connection, is there in `seconds`."""
        await asyncio.wait([self._reading], timeout=seconds)
        return self._reading.done()

    async def answer(self, seconds: float) -> Answer:
        """What came back within `seconds` from now."""
        if not await self.answered_within(seconds):
            return Answer(Ending.silent)
        return self._reading.result()

    async def close(self) -> None:
        """Hang up."""
        self._reading.cancel()
        self._writer.close()
        # The other end may have gone first, rudely, or may never say goodbye (TLS waits for that).
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self._writer.wait_closed()
        self._writer.transport.abort()


@asynccontextmanager
async def connected(address: Address, seconds: float) -> AsyncIterator[Wire]:
    """A new connection. Raises Unreachable when there is none in `seconds`, which also bound each write."""
    context = ssl.create_default_context() if address.secure else None
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context, limit=_LONGEST_HEAD)
    except OSError as error:  # TimeoutError and ssl.SSLError among them
        raise Unreachable(error) from error
    wire = Wire(reader, writer, seconds)
    try:
        yield wire
    finally:
        await wire.close()


async def _read(reader: asyncio.StreamReader) -> Answer:
    while True:
        try:
            first, *_ = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)
        except (asyncio.IncompleteReadError, OSError):
            return Answer(Ending.closed)
        except asyncio.LimitOverrunError:
            return Answer(Ending.garbled)
        protocol, _, rest = first.partition(b" ")
        status = rest[:3]
        if not protocol.startswith(b"HTTP/1.") or len(status) != 3 or not status.isdigit():
            return Answer(Ending.garbled)
        if not status.startswith(b"1"):  # "100 Continue" is not the answer yet
            return Answer(Ending.answered, int(status))
