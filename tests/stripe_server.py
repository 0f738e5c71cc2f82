"""A small real HTTP server that speaks the parts of Stripe's API that Kamiyo reads, with the faults Stripe has."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

KEY = "sk_test_of_the_tests"

#: A fault: the request is answered by nothing at all until the caller gives up.
HANGS = 0

_Call = Callable[[Request], Awaitable[Response]]

_COLLECTIONS = {
    "customers": "customer",
    "subscriptions": "subscription",
    "invoices": "invoice",
    "payment_methods": "payment_method",
}


@dataclass
class StripeServer:
    """Stripe's state, and how it feels.

    `events` (newest first) and webhook `endpoints` are as the API lists them; objects are put in with `show`. `faults`
    are what goes wrong with the next answers, one each: a status (429, 500…; 200: nothing) or HANGS. `retry_after` goes
    with a 429. Every answer takes `slow` seconds; one that is asked for while there is a `held` waits for that.
    What begins with a path in `forbidden` is answered 403. Stripe's clock (`Date`) is `ahead` seconds before this
    machine's, or stands still at `stopped_at`. `asked` are the queries, `paths` the paths, `asked_at` the moments (of
    time.monotonic) of all requests so far, and `accounts` whose the requests were about.

    `keys` are the keys there are, each with the account that it opens ('' is the platform). `events_of` are the events
    of an account in a mode, where they are others than `events`; where there are any, the platform may read the
    accounts named in it or in an object, and no others. With `pages` each page of events waits for one of its permits.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    events_of: dict[tuple[str, bool], list[dict[str, Any]]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=lambda: {KEY: ""})
    pages: asyncio.Semaphore | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    endpoints: list[dict[str, Any]] = field(default_factory=list)
    objects: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    faults: list[int] = field(default_factory=list)
    forbidden: set[str] = field(default_factory=set)
    retry_after: str = "0"
    slow: float = 0.0
    held: asyncio.Event | None = None
    ahead: float = 0.0
    stopped_at: int | None = None
    asked: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    asked_at: list[float] = field(default_factory=list)
    accounts: list[str] = field(default_factory=list)
    base: str = ""

    def show(self, *objects: Mapping[str, Any], account: str = "") -> None:
        """Have these objects from now on, each under its `object` and `id`: as they are, `{"deleted": true}` too."""
        for one in objects:
            key = (account, one["object"], one["id"])
            self.objects.pop(key, None)  # lists are newest first, and a changed object keeps nobody's place
            self.objects[key] = dict(one)

    def forget(self, object_type: str, object_id: str, account: str = "") -> None:
        """Have no such object any more: it is answered 404."""
        self.objects.pop((account, object_type, object_id), None)

    async def list_events(self, request: Request) -> Response:
        """`GET /v1/events`, newest first, with `created[gte]`, `created[lte]`, `limit` and `starting_after`."""
        query = request.query_params
        await self._turn()
        whose, live = self._whose(request), "_live_" in request.headers["authorization"]
        within = [
            event
            for event in self.events_of.get((whose, live), self.events)
            if int(query.get("created[gte]", 0)) <= event["created"] <= int(query.get("created[lte]", 2**40))
        ]
        return self._page(request, within)

    async def read_account(self, request: Request) -> Response:
        """`GET /v1/account`: whose the key is."""
        return JSONResponse({"id": self._whose(request) or "acct_platform", "object": "account"})

    async def list_endpoints(self, request: Request) -> Response:
        """`GET /v1/webhook_endpoints`, with `limit` and `starting_after`."""
        return self._page(request, self.endpoints)

    async def list_objects(self, request: Request) -> Response:
        """`GET /v1/customers` and the like, newest first; with `created`, `customer`, `type` and `status`.

        As at Stripe, deleted customers are not listed, and canceled subscriptions only with `status=all`.
        """
        object_type = _COLLECTIONS.get(request.path_params["collection"])
        return _missing() if object_type is None else self._page(request, self._listed(request, object_type))

    async def list_payment_methods(self, request: Request) -> Response:
        """`GET /v1/customers/{id}/payment_methods`; 404 for a customer that is not there any more."""
        customer = request.path_params["id"]
        if self.objects.get((self._whose(request), "customer", customer), {"deleted": True}).get("deleted"):
            return _missing()
        listed = self._listed(request, "payment_method")
        return self._page(request, [one for one in listed if one["customer"] == customer])

    def _listed(self, request: Request, object_type: str) -> list[dict[str, Any]]:
        query = request.query_params
        latest = int(query.get("created[lte]", 2**53))
        found = [
            one
            for (account, kind, _), one in reversed(self.objects.items())
            if (account, kind) == (self._whose(request), object_type)
            and not one.get("deleted")
            and (object_type != "subscription" or query.get("status") == "all" or one.get("status") != "canceled")
            and all(one.get(name) == query[name] for name in ("customer", "type") if name in query)
            and one.get("created", 0) <= latest
        ]
        return sorted(found, key=lambda one: one.get("created", 0), reverse=True)

    async def read_object(self, request: Request) -> Response:
        """`GET /v1/customers/{id}` and the like; anything else that was shown as well, by its plural."""
        collection = request.path_params["collection"]
        object_type = _COLLECTIONS.get(collection, collection.removesuffix("s"))
        if request.url.path.startswith("/v2/core/"):
            object_type = f"v2.core.{object_type}"
        one = self.objects.get((self._whose(request), object_type, request.path_params["id"]))
        return JSONResponse(one) if one is not None else _missing()

    async def nothing(self, request: Request) -> Response:
        """Any other path: 404, with Stripe's time."""
        return _missing()

    async def answer(self, request: Request, call: _Call) -> Response:
        """One request: refused, or delayed, or answered by `call`; at Stripe's time."""
        self.asked.append(str(request.url.query))
        self.paths.append(request.url.path)
        self.asked_at.append(time.monotonic())
        self.accounts.append(_account(request))
        said, held = self._refusal(request), self.held
        if said is None:
            # What is shown is looked up first: an answer that takes long is old when it comes.
            said = await call(request)
        if held is not None:
            await held.wait()
        if self.slow:
            await asyncio.sleep(self.slow)
        now = time.time() + self.ahead if self.stopped_at is None else self.stopped_at
        said.headers["Date"] = formatdate(now, usegmt=True)
        return said

    def _refusal(self, request: Request) -> Response | None:
        if request.headers.get("authorization", "").removeprefix("Bearer ") not in self.keys:
            return _error(401, "invalid_request_error", f"Invalid key {KEY}")
        if request.url.path.startswith(tuple(self.forbidden)):
            return _error(403, "invalid_request_error", f"The key {KEY} may not do that")
        account, known = _account(request), {account for account, *_ in (*self.events_of, *self.objects)}
        if account and self.events_of and account not in known:
            return _error(403, "invalid_request_error", "The key may not read that account", code="account_invalid")
        if self.faults:
            status = self.faults.pop(0)
            if status == 200:
                return None
            if status == HANGS:
                return _Silence()
            said = _error(status, "api_error", "a fault")
            if status == 429:
                said.headers["Retry-After"] = self.retry_after
            return said
        return None

    async def _turn(self) -> None:
        if self.pages is not None:
            # Whoever asked may be dead by now; the server's end must not wait for a permit that nobody gives.
            waits = {asyncio.create_task(self.pages.acquire()), asyncio.create_task(self.over.wait())}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()

    def _whose(self, request: Request) -> str:
        key = request.headers["authorization"].removeprefix("Bearer ")
        return request.headers.get("stripe-account") or self.keys[key]

    @staticmethod
    def _page(request: Request, objects: list[dict[str, Any]]) -> Response:
        query = request.query_params
        ids = [one["id"] for one in objects]
        behind = query.get("starting_after")
        if behind is not None and behind not in ids:
            return _error(
                400, "invalid_request_error", "No such object", code="resource_missing", param="starting_after"
            )
        begin = ids.index(behind) + 1 if behind is not None else 0
        page = objects[begin : begin + int(query.get("limit", 10))]
        more = begin + len(page) < len(objects)
        return _Said({"object": "list", "url": request.url.path, "data": page, "has_more": more})


class _Said(JSONResponse):
    """Half a surrogate pair as well, which JSON can write and UTF-8 cannot."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


class _Silence(Response):
    """No answer: the connection stays open until the caller hangs up."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


def _account(request: Request) -> str:
    return request.headers.get("stripe-account", "")


def _error(status: int, kind: str, message: str, **more: str) -> Response:
    return JSONResponse({"error": {"type": kind, "message": message, **more}}, status)


def _missing() -> Response:
    return _error(404, "invalid_request_error", "No such object", code="resource_missing")


def _route(stripe: StripeServer, path: str, call: _Call, methods: tuple[str, ...] = ("GET",)) -> Route:
    async def answer(request: Request) -> Response:
        return await stripe.answer(request, call)

    return Route(path, answer, methods=methods)


@contextlib.asynccontextmanager
async def stripe_server() -> AsyncIterator[StripeServer]:
    """A running server; its `base` is what STRIPE_API_BASE takes."""
    stripe = StripeServer()
    app = Starlette(
        routes=[
            _route(stripe, "/v1/events", stripe.list_events),
            _route(stripe, "/v1/webhook_endpoints", stripe.list_endpoints),
            _route(stripe, "/v1/account", stripe.read_account),
            _route(stripe, "/v1/{collection}", stripe.list_objects),
            _route(stripe, "/v1/customers/{id}/payment_methods", stripe.list_payment_methods),
            _route(stripe, "/{version:str}/{collection}/{id}", stripe.read_object),
            _route(stripe, "/v2/core/{collection}/{id}", stripe.read_object),
            _route(stripe, "/{path:path}", stripe.nothing, methods=("GET", "HEAD")),
        ]
    )
    door = socket.create_server(("127.0.0.1", 0))
    stripe.base = f"http://127.0.0.1:{door.getsockname()[1]}"
    config = uvicorn.Config(app, log_level="error", lifespan="off", date_header=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    # The socket listens already: whoever connects before uvicorn accepts just waits.
    running = asyncio.create_task(server.serve(sockets=[door]))
    try:
        yield stripe
    finally:
        stripe.over.set()
        server.should_exit = True
        await running
