"""Stripe's side of the wire: posts each event, and again until it is answered 2xx."""

import asyncio
import contextlib
import heapq
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.chaos.traffic import Letter, Posting
from kamiyo.signature import sign

SECRET = "whsec_chaos"

_PATH = "/api/v1/webhooks/stripe"
#: Stripe gives up on an answer after about 20 seconds; here time is short.
_ANSWER_SECONDS = 6.0
#: Stripe's waits grow from minutes to hours; here from 0.1 s to 3 s.
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 3.0
#: Connections to each server.
_CARRIERS = 48
#: Of how many requests the client walks away before it is answered.
_WALKS_AWAY = 0.01


class StaleAccepted(AssertionError):
    """A signature outside the tolerance was answered 2xx."""


@dataclass(order=True)
class _Due:
    at: float
    posting: Posting = field(compare=False)
    server: int = field(compare=False)
    tries: int = field(compare=False, default=0)


class Stripe:
    """Posts `letters`, and keeps the list of what was promised: `answered`, by the letter's number, how often.

    `clock_offset` is how far its clock is off, in seconds: what it signs then is refused, and comes again.
    """

    def __init__(self, letters: Sequence[Letter], ports: Sequence[int], rng: random.Random) -> None:
        self._letters = letters
        self.ports = ports
        self._rng = rng
        self._later: list[_Due] = []
        self._now: asyncio.Queue[_Due] = asyncio.Queue()
        self._came = asyncio.Event()
        self._outstanding = 0
        self._finished = asyncio.Event()
        self.clock_offset = 0
        self.answered: Counter[int] = Counter()
        self.statuses: Counter[str] = Counter()
        self.last_status: dict[int, str] = {}

    @property
    def duplicates(self) -> int:
        """Deliveries that were answered 2xx although one of the same event had been before."""
        return sum(self.answered.values()) - len(self.answered)

    async def post(self, postings: Sequence[Posting]) -> None:
        """Post everything at its time, counted from now, and return once all of it is answered 2xx."""
        began = time.monotonic()
        for posting in postings:
            for server in (0, 1) if posting.server is None else (posting.server,):
                self._later.append(_Due(began + posting.at, posting, server))
        self._outstanding = len(self._later)
        heapq.heapify(self._later)
        async with asyncio.TaskGroup() as tasks:
            helpers = [tasks.create_task(self._carry()) for _ in range(_CARRIERS)]
            helpers.append(tasks.create_task(self._dispatch()))
            await self._finished.wait()
            for helper in helpers:
                helper.cancel()

    async def _dispatch(self) -> None:
        while True:
            self._came.clear()
            now = time.monotonic()
            while self._later and self._later[0].at <= now:
                self._now.put_nowait(heapq.heappop(self._later))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._later[0].at - now if self._later else None):
                    await self._came.wait()

    async def _carry(self) -> None:
        async with Connections(self.ports) as connections:
            while True:
                due = await self._now.get()
                status = await self._deliver(connections, due)
                self.statuses[status] += 1
                self.last_status[due.posting.letter] = status
                if status == "200":
                    self.answered[due.posting.letter] += 1
                    self._outstanding -= 1
                    if not self._outstanding:
                        self._finished.set()
                else:
                    self._again(due)

    def _again(self, due: _Due) -> None:
        wait = min(_FIRST_WAIT_SECONDS * 2**due.tries, _LONGEST_WAIT_SECONDS) * self._rng.uniform(0.8, 1.2)
        # Stripe knows one address; behind it either server may answer.
        again = _Due(time.monotonic() + wait, due.posting, 1 - due.server, due.tries + 1)
        heapq.heappush(self._later, again)
        self._came.set()

    async def _deliver(self, connections: "Connections", due: _Due) -> str:
        body = self._letters[due.posting.letter].body
        offset = self.clock_offset
        request = request_for(body, int(time.time()) + offset)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                if self._rng.random() < _WALKS_AWAY:
                    await connections.send_and_leave(due.server, request)
                    return "walked away"
                status = (await connections.post(due.server, request)).status
        except TimeoutError:
            connections.drop(due.server)
            return "no answer"
        except (OSError, EOFError, asyncio.LimitOverrunError):
            connections.drop(due.server)
            return "broken"
        if offset and status == "200":
            raise StaleAccepted(f"signed {offset} s away from now, and answered {status}")
        return status


def request_for(body: bytes, timestamp: int, secret: str = SECRET) -> bytes:
    """A delivery as it goes over the wire, signed at `timestamp` (unix seconds)."""
    head = (
        f"POST {_PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json; charset=utf-8\r\n"
        f"Stripe-Signature: {sign(body, secret, timestamp)}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered: the status, and the headers by their lower-case names."""

    status: str
    headers: dict[str, str]


class Connections:
    """One kept connection to each server."""

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = ports
        self._open: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def __aenter__(self) -> "Connections":
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in list(self._open):
            self.drop(server)

    async def post(self, server: int, request: bytes) -> "Answer":
        """Send one request and read its answer. Raises OSError or EOFError when the connection ends before it."""
        reader, writer = await self._to(server)
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        await reader.readexactly(int(headers.get("content-length", "0")))
        if headers.get("connection") == "close":
            self.drop(server)
        return Answer(status.split(" ")[1], headers)

    async def send_and_leave(self, server: int, request: bytes) -> None:
        """Send a request, and do not wait for what becomes of it."""
        _, writer = await self._to(server)
        writer.write(request)
        await writer.drain()
        self.drop(server)

    def drop(self, server: int) -> None:
        """End the connection to `server`; the next request makes another."""
        if server in self._open:
            _, writer = self._open.pop(server)
            writer.transport.abort()

    async def _to(self, server: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # A server ends a kept connection that was not used for a while. Whoever posts sees that before it posts.
        if server in self._open and (self._open[server][0].at_eof() or self._open[server][0].exception()):
            self.drop(server)
        if server not in self._open:
            self._open[server] = await asyncio.open_connection("127.0.0.1", self._ports[server])
        return self._open[server]
