"""Stripe's API in a storm: what thin events name, and what no event decides, is read here; and objects are listed, for
operators who fill the tables. A process of its own.

It shows the objects of the storm's lives as they are at that moment. Each life has a clock of its own, always in the
past: a second of it has happened, with all that is in it, before the first event of it is posted, and `Date` says the
second that the answer shows; that of a list is the earliest of the lives that it shows something of. What goes wrong is
in a file that the harness writes (`Mood`), so that a server that was killed and started again knows it; every request
is a line in another.
"""

import argparse
import asyncio
import contextlib
import json
import random
import socket
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bench.chaos.crew import die_with_parent
from bench.chaos.traffic import Life, live
from kamiyo.simulator import CURRENT_API_VERSION, SimulatedEvent
from kamiyo.simulator.shapes import shape

#: The key that opens it, for one's own account and the connected one.
KEY = "rk_live_of_the_storm"

#: A request that was answered by nothing at all.
NOTHING = 0

# An answer counts as asked in the second before its `Date`, once what it took is taken off.
_DATE_IS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Mood:
    """What goes wrong: a `share` of the requests is answered `status` (NOTHING: not at all)."""

    status: int
    share: float
    retry_after: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """One request: when it came (unix seconds), what it was answered, and for what."""

    at: float
    status: int
    path: str


class Control:
    """The harness' side: what the server is told, and what it has written down, in files of `folder`."""

    def __init__(self, folder: Path) -> None:
        self._told = folder / "stripe.json"
        self._calls = folder / "stripe.calls"
        self._began: float | None = None
        self._moods: list[Mood] = []

    def begin(self, at: float) -> None:
        """The storm begins at this moment (unix seconds)."""
        self._began = at
        self._tell()

    @contextlib.contextmanager
    def feeling(self, mood: Mood) -> Iterator[None]:
        """Be in this mood while the block runs; of several, the latest counts."""
        self._moods.append(mood)
        self._tell()
        try:
            yield
        finally:
            self._moods.remove(mood)
            self._tell()

    def _tell(self) -> None:
        mood = asdict(self._moods[-1]) if self._moods else None
        draft = self._told.with_suffix(".new")
        draft.write_text(json.dumps({"began": self._began, "mood": mood}), encoding="utf-8")
        draft.replace(self._told)

    def calls(self) -> list[Call]:
        """Every request so far."""
        if not self._calls.exists():
            return []
        lines = (line.split(" ") for line in self._calls.read_text(encoding="utf-8").splitlines())
        return [Call(float(at), int(status), path) for at, status, path in lines]

    # ── The server's side ───────────────────────────────────────────────────────────────────────────────────────

    def told(self) -> tuple[float, Mood | None]:
        """How many seconds the storm is old (less than 0: it has not begun), and the mood."""
        told: dict[str, Any] = json.loads(self._told.read_text(encoding="utf-8")) if self._told.exists() else {}
        began, mood = told.get("began"), told.get("mood")
        return (-1.0 if began is None else time.time() - began), (Mood(**mood) if mood else None)

    def note(self, status: int, path: str) -> None:
        """Write a request down: at once, as this process may be killed at any moment."""
        with self._calls.open("a", encoding="utf-8") as file:
            file.write(f"{time.time():.6f} {status} {path}\n")


class Objects:
    """The objects of these lives, at any moment of the storm."""

    def __init__(self, lives: Sequence[Life]) -> None:
        self._lives = lives
        # By account and id: which life it is of, and the last event of each of its seconds.
        self._told: dict[tuple[str, str], tuple[int, dict[int, SimulatedEvent]]] = {}
        # By account and kind: when each object was created, and its id.
        self._kinds: dict[tuple[str, str], set[tuple[int, str]]] = {}
        for number, life in enumerate(lives):
            for event in life.events:
                if event.object_id is not None:
                    _, told = self._told.setdefault((event.account, event.object_id), (number, {}))
                    told[event.created] = event
                    created = getattr(event.after, "created", 0)
                    self._kinds.setdefault((event.account, event.object), set()).add((created, event.object_id))
        self._newest_first = {kind: sorted(found, reverse=True) for kind, found in self._kinds.items()}

    def show(self, account: str, object_id: str, at: float) -> tuple[dict[str, Any] | None, int]:
        """An object as it is `at` seconds into the storm, None where there is none; and that moment at Stripe."""
        number, told = self._told.get((account, object_id), (None, {}))
        if number is None:
            return None, int(time.time())
        happened = [second for since, second in self._lives[number].seconds if since <= at]
        now = happened[-1] if happened else 0
        seconds = sorted(told)
        place = bisect_right(seconds, now)
        if not place:
            return None, now
        event = told[seconds[place - 1]]
        if event.type == "invoice.deleted":
            return None, now
        if event.type == "customer.deleted":
            return {"id": object_id, "object": "customer", "deleted": True}, now
        return shape(event.after, CURRENT_API_VERSION, livemode=event.livemode), now

    def page(self, account: str, kind: str, at: float, asked: "Asked") -> tuple[list[dict[str, Any]], bool, int]:
        """What Stripe lists of a kind, newest first; whether there is more; and the moment that all of it shows."""
        listed, seconds, passed = list[dict[str, Any]](), list[int](), asked.behind is None
        for created, object_id in self._newest_first.get((account, kind), ()):
            if not passed or (asked.until is not None and created > asked.until):
                passed = passed or object_id == asked.behind
                continue
            if len(listed) == asked.limit:
                return listed, True, min(seconds)
            shown, second = self.show(account, object_id, at)
            # What is gone is not listed, and payment methods only customer by customer.
            if shown and not shown.get("deleted") and asked.customer in (None, shown.get("customer")):
                listed.append(shown)
                seconds.append(second)
        return listed, False, min(seconds, default=0)


@dataclass(frozen=True, slots=True)
class Asked:
    """What of a list is asked for."""

    limit: int = 10
    behind: str | None = None
    until: int | None = None
    customer: str | None = None


_LISTS = {"customers": "customer", "subscriptions": "subscription", "invoices": "invoice"}


class SimulatedApi:
    """Answers `GET /v1/…/{id}`, and the lists that the tables are filled from."""

    def __init__(self, objects: Objects, control: Control, rng: random.Random) -> None:
        self._objects = objects
        self._control = control
        self._rng = rng
        self.app = Starlette(
            routes=[
                Route("/v1/customers/{customer}/payment_methods", self._list),
                *(Route(f"/v1/{name}", self._list) for name in _LISTS),
                Route("/v1/{kind:path}/{id}", self._show),
            ]
        )

    async def _show(self, request: Request) -> Response:
        account, at = request.headers.get("stripe-account", ""), self._control.told()[0]
        return self._answer(request, *self._objects.show(account, request.path_params["id"], at))

    async def _list(self, request: Request) -> Response:
        account, at = request.headers.get("stripe-account", ""), self._control.told()[0]
        words, customer = request.query_params, request.path_params.get("customer")
        until = words.get("created[lte]")
        asked = Asked(
            *(int(words.get("limit", 10)), words.get("starting_after"), int(until) if until else None, customer)
        )
        kind = "payment_method" if customer else _LISTS[request.url.path.rpartition("/")[2]]
        listed, more, second = self._objects.page(account, kind, at, asked)
        return self._answer(request, {"object": "list", "data": listed, "has_more": more}, second)

    def _answer(self, request: Request, shown: dict[str, Any] | None, second: int) -> Response:
        path = request.url.path
        _, mood = self._control.told()
        if mood is not None and self._rng.random() < mood.share:
            self._control.note(mood.status, path)
            return _refusal(mood)
        if request.headers.get("authorization") != f"Bearer {KEY}":
            self._control.note(401, path)
            return _error(401, "invalid_request_error")
        self._control.note(200 if shown else 404, path)
        said = JSONResponse(shown) if shown else _error(404, "invalid_request_error")
        said.headers["Date"] = formatdate(second + _DATE_IS_AHEAD, usegmt=True)
        return said


class _Silence(Response):
    """No answer: the connection stays open until the caller hangs up."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


def _refusal(mood: Mood) -> Response:
    if mood.status == NOTHING:
        return _Silence()
    said = _error(mood.status, "api_error")
    if mood.status == 429:
        said.headers["Retry-After"] = str(mood.retry_after)
    return said


def _error(status: int, kind: str) -> Response:
    return JSONResponse({"error": {"type": kind, "message": "in the storm"}}, status)


@contextlib.asynccontextmanager
async def answering(api: SimulatedApi, port: int = 0) -> AsyncIterator[str]:
    """The API on this port of the loopback (0: any) while the block runs; its address."""
    door = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(
        api.app, log_level="error", lifespan="off", date_header=False, timeout_graceful_shutdown=1, access_log=False
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[door]))
    try:
        yield f"http://127.0.0.1:{door.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


async def _serve(api: SimulatedApi, port: int) -> None:
    async with answering(api, port):
        await asyncio.Event().wait()


def _main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m bench.chaos.stripe_api", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where the harness says what goes wrong")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--gentle", action="store_true")
    given = parser.parse_args()
    _, lives = live(given.seed, given.seconds, rate=given.rate, gentle=given.gentle)
    api = SimulatedApi(Objects(lives), Control(given.folder), random.Random(f"stripe api/{given.seed}"))
    asyncio.run(_serve(api, given.port))


if __name__ == "__main__":
    _main()
