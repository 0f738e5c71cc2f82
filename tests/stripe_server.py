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
    """Stripe's state: `events` and webhook `endpoints` as the API lists them; `faults` that the next answers have."""

    events: list[dict[str, Any]] = field(default_factory=list)
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
        within = [
            event
            for event in self.events
            if int(query["created[gte]"]) <= event["created"] <= int(query["created[lte]"])
        ]
        return self._page(request, within)

    async def list_endpoints(self, request: Request) -> Response:
        """`GET /v1/webhook_endpoints`, with `limit` and `starting_after`."""
        return self._refusal(request) or self._page(request, self.endpoints)

    def _refusal(self, request: Request) -> Response | None:
        self.asked.append(str(request.url.query))
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": {"type": "invalid_request_error", "message": f"Invalid key {KEY}"}}, 401)
        if self.faults:
            status = self.faults.pop(0)
            headers = {"Retry-After": "0"} if status == 429 else None
            return JSONResponse({"error": {"type": "api_error", "message": "a fault"}}, status, headers)
        return None

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
        server.should_exit = True
        await running
