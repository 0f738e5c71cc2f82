"""Stripe's side: events as signed requests, and their delivery into the application under test."""

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias, TypedDict

import httpx
from fastapi import FastAPI

from kamiyo import database, simulator
from kamiyo.event import parse
from kamiyo.signature import sign
from kamiyo.simulator import CURRENT_API_VERSION, SimulatedEvent
from kamiyo.testing.database import SECRET, Database, KitError, Settled, apart, at_rest, current, settle
from kamiyo.web.system import System

#: Where the router receives Stripe's deliveries.
PATH = "/api/v1/webhooks/stripe"

#: One of the simulator's, one of your own as Stripe words it, or the bytes of one.
AnyEvent: TypeAlias = SimulatedEvent | Mapping[str, Any] | bytes

# Stripe delivers over several connections at once.
_AT_ONCE = 8
_MOST_IN_WAVE = 6


class Signed(TypedDict):
    """A request as Stripe would send it, in the words of httpx and of FastAPI's TestClient."""

    content: bytes
    headers: dict[str, str]


def signed(
    event: AnyEvent, *, secret: str = SECRET, api_version: str = CURRENT_API_VERSION, at: float | None = None
) -> Signed:
    """The body and the headers with which Stripe would deliver `event`: `client.post(PATH, **signed(event))`.

    Signed at `at` (unix seconds; now). `api_version` words a simulated event; other events are as they are given.
    """
    body = _body(event, api_version)
    signature = sign(body, secret, int(time.time() if at is None else at))
    return {
        "content": body,
        "headers": {"Content-Type": "application/json; charset=utf-8", "Stripe-Signature": signature},
    }


def deliver(
    app: FastAPI,
    events: Iterable[AnyEvent],
    *,
    shuffle: int | None = None,
    api_version: str = CURRENT_API_VERSION,
    path: str = PATH,
    allow_dead: bool = False,
    within: float = 30.0,
) -> list[Settled]:
    """Start `app`, deliver `events` to it, wait until every one is settled, stop it; return what became of each.

    Without `shuffle` each comes once, in the order given, the next one when the last one is at rest. With it, a seed,
    they come in any order, a few at once, about a third of them more than once, and some once more when everything is
    over. The same seed is the same disorder.

    Needs the fixture `kamiyo_database`. Raises AssertionError when the application refuses a delivery, when an event
    dies (unless `allow_dead`), and when something is not settled `within` seconds; KitError when it cannot work.
    """
    __tracebackhide__ = True  # pytest: the failure is the caller's
    order = order_of(bodies_of(events, api_version), shuffle)
    return run(app, order, path=path, allow_dead=allow_dead, within=within)


#: Bodies in waves. A wave comes over several connections at once; the next one comes when it is at rest.
Order = Sequence[Sequence[bytes]]


def order_of(bodies: Sequence[bytes], shuffle: int | None) -> Order:
    """How `bodies` come: one after the other, or in the disorder of a seed and then some of them late."""
    if shuffle is None:
        return [[body] for body in bodies]
    rng = random.Random(shuffle)  # noqa: S311 - repeatable on purpose
    coming = simulator.deliveries(bodies, rng)
    waves = []
    # What comes at once is handled in the order of Stripe's time; only what comes later can be late.
    while coming:
        size = rng.randint(1, _MOST_IN_WAVE)
        waves.append(coming[:size])
        coming = coming[size:]
    return [*waves, [body for body in bodies if rng.random() < 0.3]]


def bodies_of(events: Iterable[AnyEvent], api_version: str) -> list[bytes]:
    """Each event's bytes, once."""
    return list(dict.fromkeys(_body(event, api_version) for event in events))


def run(
    app: FastAPI,
    order: Order,
    *,
    path: str,
    allow_dead: bool,
    within: float,
    meddle: Callable[[System], None] = lambda system: None,
) -> list[Settled]:
    """Start `app`, let `meddle` change what runs in it, deliver, wait, stop. See `deliver`."""
    __tracebackhide__ = True
    return apart(_run(current(), app, order, path, allow_dead, within, meddle))


async def _run(
    database_in_use: Database,
    app: FastAPI,
    order: Order,
    path: str,
    allow_dead: bool,
    within: float,
    meddle: Callable[[System], None],
) -> list[Settled]:
    if getattr(app.state, "kamiyo", None) is not None:
        raise KitError(
            "The application runs already, in a TestClient perhaps. Post `**signed(event)` with that, and wait with "
            "kamiyo_database.settle()."
        )
    lifespan: AbstractAsyncContextManager[Any] = app.router.lifespan_context(app)
    transport = httpx.ASGITransport(app)
    async with lifespan, httpx.AsyncClient(transport=transport, base_url="http://kamiyo.test") as client:
        system = _system_of(app, database_in_use)
        meddle(system)
        db = await database.connect(database_in_use.url, application="kamiyo testing")
        try:
            for wave in order:
                await _post(client, path, wave, system.settings.webhook_secrets[0])
                await at_rest(db, within)
            return _judged(await settle(db, within), order, allow_dead)
        finally:
            await db.close()


def _system_of(app: FastAPI, database_in_use: Database) -> System:
    system: System | None = getattr(app.state, "kamiyo", None)
    if system is None:
        raise KitError("The application does not include Kamiyo's router: app.include_router(webhook_router)")
    if system.url != database_in_use.url:
        raise KitError(
            "The application runs on another database than kamiyo_database, and nothing was delivered to it. It was "
            "given settings of its own: leave them to the environment, which the fixture sets."
        )
    if not system.settings.worker or not system.settings.webhook_secrets:
        raise KitError("The application under test needs a worker and a signing secret; its settings have no such.")
    return system


async def _post(client: httpx.AsyncClient, path: str, wave: Sequence[bytes], secret: str) -> None:
    free = asyncio.Semaphore(_AT_ONCE)

    async def post(body: bytes) -> None:
        async with free:
            answer = await client.post(path, **signed(body, secret=secret))
        if answer.status_code != 200:
            event = parse(body, received=0)
            raise AssertionError(
                f"the application answered {answer.status_code} to {event.id} ({event.type}): {answer.text[:500]}"
            )

    answers = await asyncio.gather(*map(post, wave), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer


def _judged(settled: Sequence[Settled], order: Order, allow_dead: bool) -> list[Settled]:
    by_id = {one.event_id: one for one in settled}
    ids = dict.fromkeys(parse(body, received=0).id for wave in order for body in wave)
    found = [by_id[event_id] for event_id in ids]
    dead = [one for one in found if one.dead]
    if dead and not allow_dead:
        said = "\n".join(f"{one.event_id} ({one.event_type}), after {one.tries} tries: {one.error}" for one in dead)
        raise AssertionError(f"{len(dead)} of {len(found)} events are dead:\n{said}")
    return found


def _body(event: AnyEvent, api_version: str) -> bytes:
    if isinstance(event, SimulatedEvent):
        return event.body(api_version)
    return event if isinstance(event, bytes) else simulator.encode(dict(event))
