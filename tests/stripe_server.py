"""A small real HTTP server that speaks the parts of Stripe's API that Kamiyo reads, with the faults Stripe has."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

KEY = "sk_test_of_the_tests"


@dataclass
class StripeServer:
    """Stripe's state: `events` and webhook `endpoints` as the API lists them; `faults` that the next answers have.

    `keys` are the keys there are, each with the account that it opens ('' is the platform). `events_of` are the events
    of an account in a mode, where they are others than `events`; the platform may read the accounts named in it. With
    `pages` each page of events waits for one of its permits.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    events_of: dict[tuple[str, bool], list[dict[str, Any]]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=lambda: {KEY: ""})
    pages: asyncio.Semaphore | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    endpoints: list[dict[str, Any]] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    base: str = ""

    async def list_events(self, request: Request) -> Response:
        """`GET /v1/events`, newest first, with `created[gte]`, `created[lte]`, `limit` and `starting_after`."""
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        query = request.query_params
        await self._turn()
        whose, live = self._whose(request), "_live_" in request.headers["authorization"]
        within = [
            event
            for event in self.events_of.get((whose, live), self.events)
            if int(query.get("created[gte]", 0)) <= event["created"] <= int(query.get("created[lte]", 2**40))
        ]
        if "starting_after" in query and query["starting_after"] not in {event["id"] for event in within}:
            return JSONResponse({"error": {"type": "invalid_request_error", "code": "resource_missing"}}, 400)
        return self._page(request, within)

    async def read_account(self, request: Request) -> Response:
        """`GET /v1/account`: whose the key is."""
        refusal = self._refusal(request)
        return refusal or JSONResponse({"id": self._whose(request) or "acct_platform", "object": "account"})

    async def list_endpoints(self, request: Request) -> Response:
        """`GET /v1/webhook_endpoints`, with `limit` and `starting_after`."""
        return self._refusal(request) or self._page(request, self.endpoints)

    def _refusal(self, request: Request) -> Response | None:
        self.asked.append(str(request.url.query))
        if request.headers.get("authorization", "").removeprefix("Bearer ") not in self.keys:
            return JSONResponse({"error": {"type": "invalid_request_error", "message": f"Invalid key {KEY}"}}, 401)
        account = request.headers.get("stripe-account", "")
        if account and account not in {known for known, _ in self.events_of}:
            return JSONResponse({"error": {"type": "invalid_request_error", "code": "account_invalid"}}, 403)
        if self.faults:
            status = self.faults.pop(0)
            headers = {"Retry-After": "0"} if status == 429 else None
            return JSONResponse({"error": {"type": "api_error", "message": "a fault"}}, status, headers)
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
        begin = ids.index(query["starting_after"]) + 1 if "starting_after" in query else 0
        page = objects[begin : begin + int(query["limit"])]
        more = begin + len(page) < len(objects)
        return JSONResponse({"object": "list", "url": request.url.path, "data": page, "has_more": more})


@contextlib.asynccontextmanager
async def stripe_server() -> AsyncIterator[StripeServer]:
    """A running server; its `base` is what STRIPE_API_BASE takes."""
    stripe = StripeServer()
    app = Starlette(
        routes=[
            Route("/v1/events", stripe.list_events),
            Route("/v1/webhook_endpoints", stripe.list_endpoints),
            Route("/v1/account", stripe.read_account),
        ]
    )
    door = socket.create_server(("127.0.0.1", 0))
    stripe.base = f"http://127.0.0.1:{door.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    # The socket listens already: whoever connects before uvicorn accepts just waits.
    running = asyncio.create_task(server.serve(sockets=[door]))
    try:
        yield stripe
    finally:
        stripe.over.set()
        server.should_exit = True
        await running
