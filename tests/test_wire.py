"""Deliveries that are answered off the wire: in every way like those that go through ASGI, only sooner."""

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kamiyo.database import Connection
from kamiyo.web import create_app, webhooks
from kamiyo.web.app import STRIPE_PATH, KamiyoApi, create_router
from kamiyo.web.webhooks import Receive, Scope, Send, StripeEndpoint
from kamiyo.web.wire import WireProtocol
from tests.conftest import (
    DEADLINE,
    SECRET,
    Log,
    MakeSettings,
    event_json,
    fresh_id,
    locks_waited_for,
    signed,
    until,
    waiting_for_locks,
)
from tests.turns import statuses

_END = b"HTTP/1.1 200 OK"


@dataclass
class Door:
    """A server on this event loop; `through_asgi` counts deliveries that became an ASGI call."""

    port: int
    server: uvicorn.Server
    app: FastAPI
    through_asgi: list[str] = field(default_factory=list)

    async def say(self, *parts: bytes, hang_up: bool = False) -> bytes:
        """Send `parts` one after another over a new connection; everything that is answered until it closes.

        It closes by itself where the requests end with one that says `Connection: close`.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
            if hang_up:
                return b""
            async with asyncio.timeout(DEADLINE):
                return await reader.read()
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


class _Counted(StripeEndpoint):
    def __init__(self, behind: StripeEndpoint, calls: list[str]) -> None:
        super().__init__(lambda: behind.system, behind.bodies)
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._calls.append(scope["path"])
        await super().__call__(scope, receive, send)


@contextlib.asynccontextmanager
async def opened(app: FastAPI, protocol: type[HttpToolsProtocol] = WireProtocol) -> AsyncIterator[Door]:
    """`app` with a socket, its connections served by `protocol`."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, log_level="critical", access_log=False))
    door = Door(listening.getsockname()[1], server, app)
    if isinstance(app, KamiyoApi):
        app.stripe = _Counted(app.stripe, door.through_asgi)
    serving = asyncio.create_task(server.serve([listening]))
    try:
        # A connection waits until the server has started, and breaks where it could not.
        await door.say(request(b"", method="GET", path="/", headers={"Host": "kamiyo"}))
        yield door
    finally:
        server.should_exit = True
        await serving
        listening.close()


@pytest.fixture
async def door(database_url: str, settings: MakeSettings) -> AsyncIterator[Door]:
    """Kamiyo as `kamiyo serve` serves it, without a worker."""
    async with opened(create_app(settings(KAMIYO_WORKER=False, KAMIYO_MAX_BODY_BYTES=20_000))) as door:
        yield door


def request(
    body: bytes | None = None,
    *,
    method: str = "POST",
    path: str = STRIPE_PATH,
    version: str = "1.1",
    last: bool = True,
    headers: dict[str, str] | None = None,
    **more: str,
) -> bytes:
    """A delivery as bytes, rightly signed and with its length, unless `headers` say otherwise."""
    body = event_json() if body is None else body
    words = {"Host": "kamiyo", **signed(body), "Content-Length": str(len(body))} if headers is None else headers
    words |= {name.replace("_", "-"): value for name, value in more.items()} | ({"Connection": "close"} if last else {})
    lines = [f"{method} {path} HTTP/{version}", *(f"{name}: {value}" for name, value in words.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def plain(answer: bytes) -> bytes:
    """An answer without what differs from one event, or one second, to the next."""
    return re.sub(rb"evt_\w+|date: [^\r]*", b"", answer)


def requests() -> dict[str, tuple[list[bytes], bool | None]]:
    """By how they are worded, and whether the short way takes them; None: they never were for the endpoint.

    Signed when they are asked for: a signature is good for five minutes, and so long a run may take to come here.
    """
    body = event_json("evt_same")
    unsigned = {"Host": "kamiyo", "Content-Length": "2"}
    chunked = {"Host": "kamiyo", **signed(b'{"id":1}'), "Transfer-Encoding": "chunked"}
    return {
        "an event": ([request()], True),
        "a copy": ([request(body, last=False) + request(body)], False),
        "a copy, later": ([request(body)], True),
        "in pieces": ([part.to_bytes() for part in request()], True),
        "names of headers in any case": ([request().replace(b"Stripe-Signature", b"sTRIPE-sIGNATURE")], True),
        "forged": ([request(headers={**unsigned, "Stripe-Signature": "t=1,v1=00"}, body=b"{}")], True),
        "unsigned": ([request(headers=unsigned, body=b"{}")], True),
        "no event": ([request(b"[]")], True),
        "no text": ([request(b"\xff")], True),
        "empty": ([request(b"")], True),
        "too long": ([request(event_json(extra="x" * 30_000))], False),
        "too long to count": ([request(headers={"Host": "k", "Content-Length": "9" * 30}, body=b"{}")], None),
        "without a length": ([request(headers={"Host": "kamiyo"}, body=b"")], False),
        "chunked": ([request(headers=chunked, body=b'8\r\n{"id":1}\r\n0\r\n\r\n')], False),
        "of HTTP/1.0": ([request(version="1.0", last=False)], False),
        "that waits to be asked": ([request(Expect="100-continue")], False),
        "an upgrade": ([request(last=False, Connection="upgrade, close", Upgrade="h2c")], False),
        "another method": ([request(method="GET")], None),
        "another path": ([request(path=STRIPE_PATH + "/")], None),
        "with a question": ([request(path=STRIPE_PATH + "?x=1")], False),
        "nonsense": ([b"what?\r\n\r\n"], None),
    }


async def test_whatever_is_sent_the_answer_is_the_one_that_asgi_gives(
    door: Door, settings: MakeSettings, db: Connection
) -> None:
    async with opened(
        create_app(settings(KAMIYO_WORKER=False, KAMIYO_MAX_BODY_BYTES=20_000)), HttpToolsProtocol
    ) as other:
        for name, (parts, short) in requests().items():
            door.through_asgi.clear()
            said = await door.say(*parts)
            if name != "a copy, later":
                await db.execute("DELETE FROM webhook_events")
            assert plain(said) == plain(await other.say(*parts)), name
            assert plain(said), name
            assert bool(door.through_asgi) is (short is False), name


async def test_deliveries_that_come_before_the_last_answer_are_answered_in_their_order(
    door: Door, db: Connection
) -> None:
    ids = [fresh_id() for _ in range(3)]
    one, two, three = (request(event_json(event_id), last=False) for event_id in ids)
    health = request(b"", method="GET", path="/api/v1/webhooks/supported-events", headers={"Host": "kamiyo"})
    said = await door.say(one + two, three + health)
    assert [event_id.decode() for event_id in re.findall(rb"evt_\w+", said)] == ids
    assert said.count(b"HTTP/1.1 200 OK") == 4
    assert set(await statuses(db)) == set(ids)


async def test_a_connection_takes_one_delivery_after_another(door: Door, db: Connection) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    for _ in range(3):
        writer.write(request(last=False))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK") and b"connection" not in head
        length = re.search(rb"content-length: (\d+)", head)
        assert length and await reader.readexactly(int(length[1]))
    writer.close()
    assert len(await statuses(db)) == 3
    assert not door.through_asgi


async def test_a_body_that_trickles_is_answered_408_and_one_that_breaks_off_is_noted(
    door: Door, log: Log, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = request(last=False)
    await door.say(whole[:-5], hang_up=True)
    await until(lambda: _is(any(line["event"] == "client_left" for line in log())))

    monkeypatch.setattr(webhooks, "BODY_SECONDS", 0.05)
    said = await door.say(whole[:-5])
    assert said.startswith(b"HTTP/1.1 408 ") and b"connection: close" in said
    assert await statuses(db) == {}


async def test_a_body_of_which_nothing_comes_is_given_up_whichever_way_it_takes(
    door: Door, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "BODY_SECONDS", 0.05)
    announced = {"Host": "kamiyo", "Content-Length": "100"}
    heads = [
        request(b"", headers=announced),
        request(b"", headers={"Host": "kamiyo", "Transfer-Encoding": "chunked"}),
        request(b"", path=f"{STRIPE_PATH}?x=1", headers=announced),
    ]
    for head in heads:
        said = await door.say(head)
        assert said.startswith(b"HTTP/1.1 408 ") and b"connection: close" in said
    assert len(door.through_asgi) == 2
    # So is a form of the dashboard's.
    said = await door.say(request(b"", path="/dashboard/sign-in", headers=announced))
    assert said.startswith(b"HTTP/1.1 403 ") and b"too slowly" in said


async def _is(value: bool) -> bool:
    return value


async def test_half_bodies_are_held_up_to_a_bound_which_those_of_both_ways_share(
    door: Door, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "MOST_BYTES_ARRIVING", 30_000)
    endpoint = door.app.stripe if isinstance(door.app, KamiyoApi) else None
    assert endpoint is not None
    half = request(event_json(obj={"id": "ch_1", "object": "charge", "description": "x" * 15_000}), last=False)[:-20]
    waiting = [asyncio.create_task(door.say(half)) for _ in range(3)]
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    said = done.pop().result()
    assert said.startswith(b"HTTP/1.1 503 ") and b"connection: close" in said
    # A whole one does not wait behind them.
    assert (await door.say(request())).startswith(_END)
    for one in waiting:
        one.cancel()
    await until(lambda: _is(endpoint.bodies.arriving == 0))
    assert not door.through_asgi


async def test_the_end_of_a_long_body_is_not_taken_for_a_head(
    database_url: str, settings: MakeSettings, db: Connection
) -> None:
    whole = request(event_json(extra="x" * 100_000))
    async with opened(create_app(settings(KAMIYO_WORKER=False))) as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        writer.write(whole[:1000])
        await until(lambda: _is(bool(door.through_asgi)))
        writer.write(whole[1000:])
        assert (await reader.read()).startswith(_END)
        writer.close()


async def test_where_traces_are_on_every_delivery_takes_the_way_that_is_traced(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = door.app.stripe.system if isinstance(door.app, KamiyoApi) else None
    assert system is not None
    monkeypatch.setattr(system.receiver, "_traces", _Traces())
    assert (await door.say(request())).startswith(_END)
    assert door.through_asgi == [STRIPE_PATH]


class _Traces:
    def received(self, *_: object, **__: object) -> None:
        """Keep nothing."""

    committed = received


async def test_a_delivery_whose_commit_does_not_come_is_answered_503_and_one_that_comes_late_is_stored(
    database_url: str, settings: MakeSettings, db: Connection
) -> None:
    app = create_app(settings(KAMIYO_WORKER=False, KAMIYO_COMMIT_TIMEOUT=0.2))
    async with opened(app) as door:
        async with db.transaction():
            await db.execute("LOCK TABLE webhook_events IN ACCESS EXCLUSIVE MODE")
            said = await asyncio.gather(*(door.say(request()) for _ in range(3)))
        assert [answer[:13] for answer in said] == [b"HTTP/1.1 503 "] * 3
        assert all(b"retry-after: 5" in answer for answer in said)

        async def taken() -> bool:
            # The connection is made anew, for which a busy machine may take longer than a delivery waits here. What
            # Stripe does then is to send it again.
            return (await door.say(request(event_json("evt_late")))).startswith(_END)

        await until(taken)
    assert "evt_late" in await statuses(db)


async def test_a_stop_answers_what_is_being_committed_and_closes_the_connection(door: Door, db: Connection) -> None:
    async with locks_waited_for(db), db.transaction():
        await db.execute("LOCK TABLE webhook_events IN ACCESS EXCLUSIVE MODE")
        saying = asyncio.create_task(door.say(request(last=False)))
        await until(lambda: waiting_for_locks(db))
        door.server.should_exit = True
        await until(lambda: _is(not door.server.servers[0].is_serving()))
    said = await saying
    assert said.startswith(_END) and b"connection: close" in said
    assert len(await statuses(db)) == 1


async def test_an_error_of_ours_is_answered_500(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a defect")

    system = door.app.stripe.system if isinstance(door.app, KamiyoApi) else None
    assert system is not None
    monkeypatch.setattr(system.receiver, "submit", broken)
    said = await door.say(request(last=False))
    assert said.startswith(b"HTTP/1.1 500 ") and b"connection: close" in said


async def test_in_an_application_of_ones_own_nothing_goes_past_its_middleware(
    database_url: str, settings: MakeSettings
) -> None:
    app = FastAPI()
    app.include_router(create_router(settings(KAMIYO_WORKER=False)))
    seen: list[str] = []

    @app.middleware("http")
    async def look(ask: Any, call_next: Any) -> Any:
        seen.append(ask.url.path)
        return await call_next(ask)

    async with opened(app) as door:
        assert (await door.say(request())).startswith(_END)
    assert seen == ["/", STRIPE_PATH]


async def test_nobody_is_let_in_before_the_start_or_without_a_secret(settings: MakeSettings, database_url: str) -> None:
    async with opened(create_app(settings(KAMIYO_WORKER=False, STRIPE_WEBHOOK_SECRET=""))) as door:
        body = event_json()
        said = await door.say(request(body, headers={"Host": "kamiyo", **signed(body, SECRET, time.time())}))
        assert said.startswith(b"HTTP/1.1 503 ") and b"Webhook secret not configured" in said
