"""The wire between Kamiyo and PostgreSQL, which can be cut: a small TCP proxy in front of PostgreSQL."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum, auto
from urllib.parse import parse_qs, urlsplit


class Flow(StrEnum):
    """What passes a connection."""

    open = auto()
    asks = auto()  # only from the client to the server: it acts, and its answers are lost
    nothing = auto()  # neither way, and nobody is told


@dataclass(eq=False)
class _Pair:
    """One connection: the client's half and the server's, and what passes."""

    flow: Flow = Flow.open
    client: "_Half | None" = None
    server: "_Half | None" = None

    def abort(self) -> None:
        """End both halves at once, with whatever is in them."""
        for half in (self.client, self.server):
            if half is not None and half.transport is not None:
                half.transport.abort()


class _Half(asyncio.Protocol):
    """One end of a connection; what it reads goes to the other one."""

    def __init__(self, pair: _Pair, *, is_client: bool) -> None:
        self._pair = pair
        self._is_client = is_client
        self._early: list[bytes] = []
        self.transport: asyncio.Transport | None = None
        self.other: _Half | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write."""
        self.transport = transport  # type: ignore[assignment]  # uvloop's has asyncio's methods, not its base class

    def join(self, other: "_Half") -> None:
        """From now on the two are one connection."""
        self.other = other
        for data in self._early:
            self._pass(data)

    def data_received(self, data: bytes) -> None:
        """Hand it on, if it passes."""
        if self.other is None:
            self._early.append(data)
        else:
            self._pass(data)

    def _pass(self, data: bytes) -> None:
        flow = self._pair.flow
        if flow is Flow.nothing or (flow is Flow.asks and not self._is_client):
            return
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        """The reader of this half is slow: stop reading what is meant for it."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """It has caught up."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        """The other half ends as well, unless nobody is to know."""
        self.transport = None
        if self._pair.flow is not Flow.nothing and self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class Proxy:
    """Carries connections from a port of the loopback to the PostgreSQL at `url`. Make it with `carrying`."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._shut = 0
        self._new_flow = Flow.open
        self.port = 0

    @property
    def url(self) -> str:
        """The address of the same database, through here."""
        at = self._target
        password = f":{at.password}" if at.password else ""
        return f"postgresql://{at.username or ''}{password}@127.0.0.1:{self.port}{at.path}?sslmode=disable"

    @contextlib.asynccontextmanager
    async def unreachable(self) -> AsyncIterator[None]:
        """No new connection while the block runs, and the old ones end."""
        self._shut += 1
        self._abort(list(self._pairs))
        try:
            yield
        finally:
            self._shut -= 1

    def cut(self, share: float, rng: random.Random) -> None:
        """End a share of the connections at once."""
        self._abort(self._some(share, rng))

    async def hold(self, share: float, rng: random.Random, flow: Flow, seconds: float) -> None:
        """Let only `flow` pass a share of the connections for `seconds`, then end them."""
        held = self._some(share, rng)
        for pair in held:
            pair.flow = flow
        await asyncio.sleep(seconds)
        self._abort(held)

    def blackhole(self, share: float, rng: random.Random) -> None:
        """From now on nothing passes a share of the connections, and neither side is told, as when a router forgets
        them. Only the server's half is ended some day, by its own limit."""
        for pair in self._some(share, rng):
            pair.flow = Flow.nothing

    def fall_silent(self) -> None:
        """From now on nothing passes any connection, nor any new one: as behind a router that drops everything."""
        self._new_flow = Flow.nothing
        for pair in self._pairs:
            pair.flow = Flow.nothing

    def _some(self, share: float, rng: random.Random) -> list[_Pair]:
        pairs = [pair for pair in self._pairs if pair.flow is Flow.open]
        return rng.sample(pairs, min(len(pairs), max(1, round(share * len(pairs)))))

    def _abort(self, pairs: list[_Pair]) -> None:
        for pair in pairs:
            pair.abort()
            self._pairs.discard(pair)

    def accept(self) -> asyncio.Protocol:
        """The protocol of a new connection."""
        pair = _Pair(self._new_flow)
        pair.client = _Half(pair, is_client=True)
        task = asyncio.get_running_loop().create_task(self._carry(pair, pair.client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return pair.client

    async def _carry(self, pair: _Pair, client: _Half) -> None:
        if self._shut:
            await asyncio.sleep(0)  # until the transport is there
            pair.abort()
            return
        pair.server = _Half(pair, is_client=False)
        self._pairs.add(pair)
        try:
            await self._connect(pair.server)
        except OSError:
            # PostgreSQL is not there: what a client is told then is what it would be told without a proxy.
            pair.abort()
            self._pairs.discard(pair)
            return
        pair.server.join(client)
        client.join(pair.server)
        if client.transport is None:
            pair.abort()
        self._pairs = {one for one in self._pairs if _lives(one)}

    async def _connect(self, half: _Half) -> None:
        loop, options = asyncio.get_running_loop(), parse_qs(self._target.query)
        port = options.get("port", [str(self._target.port or 5432)])[0]
        host = options.get("host", [self._target.hostname or "127.0.0.1"])[0]
        if host.startswith("/"):
            await loop.create_unix_connection(lambda: half, f"{host}/.s.PGSQL.{port}")
        else:
            await loop.create_connection(lambda: half, host, int(port))

    def close(self) -> None:
        """End every connection."""
        self._abort(list(self._pairs))


def _lives(pair: _Pair) -> bool:
    return any(half is not None and half.transport is not None for half in (pair.client, pair.server))


@contextlib.asynccontextmanager
async def carrying(url: str) -> AsyncIterator[Proxy]:
    """A proxy to the PostgreSQL at `url`, on a free port of the loopback, while the block runs."""
    proxy = Proxy(url)
    server = await asyncio.get_running_loop().create_server(proxy.accept, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.close()
