"""A receiver that does everything right, in memory: what each faulty one differs from in one place.

It speaks just enough HTTP to be asked, and shows its events and objects as the conformance kit can read them.
"""

import asyncio
import contextlib
import hmac
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, ClassVar

SECRETS = ("whsec_of_the_tests", "whsec_after_the_roll")


class Refused(Exception):
    """Answered with this status, on purpose."""

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.status = status


@dataclass
class Request:
    """A request without its body."""

    method: str
    path: str
    headers: list[tuple[str, str]]

    def all(self, name: str) -> list[str]:
        """Every line of this header, in order."""
        return [value for key, value in self.headers if key == name]

    def one(self, name: str) -> str | None:
        """Its first line."""
        return next(iter(self.all(name)), None)


@dataclass
class Held:
    """An object, and the event that last changed it."""

    object: dict[str, Any]
    created: int
    type: str
    previous: dict[str, Any]


@dataclass
class Receiver:
    """Sound. A fault is a subclass that overrides one attribute or method."""

    secrets: ClassVar[Sequence[str]] = SECRETS
    schemes: ClassVar[Sequence[str]] = ("v1",)
    oldest: ClassVar[float] = 300
    newest: ClassVar[float] = 300
    limit: ClassVar[int] = 1024 * 1024

    statuses: dict[str, str] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)

    # ── Delivered ───────────────────────────────────────────────────────────────────────────────────────────

    async def deliver(self, request: Request, reader: asyncio.StreamReader) -> int:
        """One delivery, to the status of its answer."""
        body = await self.body(request, reader)
        self.verify(body, request.all("stripe-signature"))
        return await self.take(json.loads(body), body)

    async def body(self, request: Request, reader: asyncio.StreamReader) -> bytes:
        """The body, as far as it is wanted."""
        if request.one("transfer-encoding") == "chunked":
            return await self.chunked(reader)
        length = int(request.one("content-length") or 0)
        if length > self.limit:
            raise Refused(413)
        return await reader.readexactly(length)

    async def chunked(self, reader: asyncio.StreamReader) -> bytes:
        """A body in chunks."""
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            if len(body) + size > self.limit:
                raise Refused(413)
            body += (await reader.readexactly(size + 2))[:-2]
        return body

    def verify(self, body: bytes, lines: list[str]) -> None:
        """Refuse what no secret signed lately."""
        stamp, given = self.signatures(lines)
        if not -self.newest <= time.time() - int(stamp) <= self.oldest:
            raise Refused(400)
        for secret in self.secrets:
            expected = hmac.digest(secret.encode(), f"{stamp}.".encode() + body, sha256).hex()
            if any(hmac.compare_digest(expected, one) for one in given):
                return
        raise Refused(400)

    def signatures(self, lines: list[str]) -> tuple[str, list[str]]:
        """The stamp, and the signatures that count."""
        if not lines:
            raise Refused(400)
        fields = [part.partition("=")[::2] for part in lines[0].split(",")]
        return dict(fields)["t"], [value for key, value in fields if key in self.schemes]

    # ── Taken ───────────────────────────────────────────────────────────────────────────────────────────────

    async def take(self, event: dict[str, Any], body: bytes) -> int:
        """Store and process an event; once."""
        if event["id"] not in self.statuses:
            self.process(event)
        return 200

    def process(self, event: dict[str, Any]) -> None:
        """The event's effect, and that it had it: both or neither."""
        self.project(event)
        self.statuses[event["id"]] = "processed"
        self.times[event["id"]] = self.times.get(event["id"], 0) + 1

    def project(self, event: dict[str, Any]) -> None:
        """Bring the object up to date, never back."""
        data = event.get("data") or {}
        subject = data.get("object") or {}
        if "id" not in subject:
            return
        now = Held(self.kept(subject), event["created"], event["type"], data.get("previous_attributes") or {})
        before = self.held.get(subject["id"])
        if before is None or self.is_newer(now, before):
            self.held[subject["id"]] = now

    def is_newer(self, now: Held, before: Held) -> bool:
        """Whether `now` happened after `before`."""
        if now.created != before.created:
            return now.created > before.created
        # What still has the values that the other replaced is the older one.
        still = before.previous and all(now.object.get(name) == value for name, value in before.previous.items())
        return not still

    def kept(self, subject: dict[str, Any]) -> dict[str, Any]:
        """An object as it is kept: what Stripe has moved is where it was."""
        if subject["object"] == "subscription" and "current_period_end" not in subject:
            end = subject["items"]["data"][0]["current_period_end"]
            return subject | {"current_period_end": end}
        if subject["object"] == "invoice" and "subscription" not in subject:
            details = (subject["parent"] or {}).get("subscription_details") or {}
            return subject | {"subscription": details.get("subscription")}
        return subject

    # ── Shown ───────────────────────────────────────────────────────────────────────────────────────────────

    def show(self, path: str) -> tuple[int, dict[str, Any]]:
        """The views: `/events/{event_id}` and `/objects/{object_type}/{object_id}`."""
        _, kind, *_, key = path.split("/")
        if kind == "events" and key in self.statuses:
            return 200, {"status": self.statuses[key], "times": self.times.get(key)}
        if kind == "objects" and key in self.held:
            return 200, self.held[key].object
        return 404, {}

    # ── HTTP ────────────────────────────────────────────────────────────────────────────────────────────────

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, which is one request."""
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = [line.partition(":") for line in lines]
        request = Request(method, path, [(name.lower(), value.strip()) for name, _, value in headers])
        shown: dict[str, Any] = {}
        try:
            if method == "GET":
                status, shown = self.show(path)
            else:
                status = await self.deliver(request, reader)
        except Refused as refused:
            status = refused.status
        except (asyncio.IncompleteReadError, OSError):
            return await self.cut_off()
        except Exception:
            # Which is what any framework makes of it.
            status = 500
        content = json.dumps(shown).encode()
        writer.write(
            f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content
        )
        await writer.drain()

    async def cut_off(self) -> None:
        """The rest of a body will never come: nothing to wait for."""

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end."""
        # A client that leaves in the middle is no error of anyone's.
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            await self.answer(reader, writer)
        writer.close()

    @asynccontextmanager
    async def serving(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        """Serve on a free port of the loopback, over TLS where that is given; yields the address."""
        tasks: set[asyncio.Task[None]] = set()
        broken: list[BaseException] = []

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            def finished(task: asyncio.Task[None]) -> None:
                tasks.discard(task)
                writer.transport.abort()
                if not task.cancelled() and (error := task.exception()) is not None:
                    broken.append(error)

            task = asyncio.create_task(self.connection(reader, writer))
            tasks.add(task)
            task.add_done_callback(finished)

        listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        server = await asyncio.start_server(accept, sock=listening, limit=64 * 1024, ssl=tls)
        try:
            yield f"{'https' if tls else 'http'}://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert not broken, f"the receiver itself is broken: {broken}"
