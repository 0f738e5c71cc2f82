"""The router that is the whole integration, and the application around it."""

import sys
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from functools import cache
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse
from starlette.routing import Route

from kamiyo import __version__, telemetry
from kamiyo.errors import KamiyoError
from kamiyo.settings import Settings, in_force, load_settings
from kamiyo.web import models
from kamiyo.web.admin import admin_router
from kamiyo.web.dashboard import Dashboard, create_dashboard
from kamiyo.web.roads import roads_router
from kamiyo.web.system import System, running
from kamiyo.web.webhooks import Bodies, Receive, Scope, Send, StripeEndpoint

PREFIX = "/api/v1/webhooks"
STRIPE_PATH = f"{PREFIX}/stripe"
_DASHBOARD = f"{PREFIX}/dashboard"


def create_router(settings: Settings | None = None) -> APIRouter:
    """A router to include in any FastAPI application: it brings its own lifespan (database, worker, shutdown).

    `settings` default to the environment's, read when the application starts.
    """
    return _router(settings)[0]


class KamiyoApi(FastAPI):
    """FastAPI with a short way in for Stripe's deliveries.

    Routing and middleware cost more than all that is done with an event; here nothing depends on them. In an
    application of the user's own the router is reached like any other, middleware included.
    """

    stripe: StripeEndpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == STRIPE_PATH and scope["method"] == "POST":
            await self.stripe(scope, receive, send)
        elif scope["type"] == "lifespan":
            await super().__call__(scope, receive, _in_a_sentence(send))
        else:
            await super().__call__(scope, receive, _keeping_safe(scope, send))


def _in_a_sentence(send: Send) -> Send:
    """`send`, with the sentence alone where the start is refused on purpose: a traceback would hide it."""

    async def send_sentence(message: MutableMapping[str, Any]) -> None:
        error = sys.exception()
        if message["type"] == "lifespan.startup.failed" and isinstance(error, KamiyoError):
            message["message"] = str(error)
        await send(message)

    return send_sentence


def _keeping_safe(scope: Scope, send: Send) -> Send:
    """`send`, with the headers that tell a browser to do nothing unexpected, where an answer has none of its own."""
    wanted = [*_SAFE, (_POLICY, _DOCS_MAY if scope.get("path") in ("/docs", "/redoc") else _NOTHING_MAY)]

    async def send_safely(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            there = {name.lower() for name, _ in headers}
            message["headers"] = headers + [header for header in wanted if header[0] not in there]
        await send(message)

    return send_safely


_SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]
_POLICY = b"content-security-policy"
_NOTHING_MAY = b"default-src 'none'; frame-ancestors 'none'"
# FastAPI's pages begin with a script of their own and load the rest from a network for such files. They show nothing
# that anybody sent.
_DOCS_MAY = (
    b"default-src 'none'; script-src 'unsafe-inline' https:; style-src 'unsafe-inline' https:; font-src https:; "
    b"img-src 'self' data: https:; connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; "
    b"frame-ancestors 'none'"
)


def _router(settings: Settings | None) -> tuple[APIRouter, StripeEndpoint, Dashboard]:
    current: System | None = None

    @cache
    def given() -> Settings:
        return settings or load_settings()

    @cache
    def effective() -> Settings:
        return in_force(given())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal current
        if current is not None and current is getattr(app.state, "kamiyo", None):
            yield  # this very router, included a second time
            return
        # An application that is started again reads the environment again.
        given.cache_clear()
        effective.cache_clear()
        async with _system_of(app, given()) as system, dashboard.running(system):
            current = system
            try:
                yield
            finally:
                current = None

    dashboard = create_dashboard(lambda: current, effective)
    router = APIRouter(lifespan=lifespan)
    bodies = Bodies()
    endpoint = StripeEndpoint(lambda: current, bodies)
    # The first route that matches answers; the documented one below it is for `/docs`.
    router.routes.append(Route(STRIPE_PATH, endpoint, methods=["POST"], include_in_schema=False))
    # Typed into Stripe's dashboard with a slash at its end, the address would be answered with a redirect, which Stripe
    # takes for a failure.
    router.routes.append(Route(f"{STRIPE_PATH}/", endpoint, methods=["POST"], include_in_schema=False))
    _document(router)
    router.include_router(roads_router(lambda: current, bodies), prefix=PREFIX)
    router.include_router(admin_router(lambda: current, effective), prefix=PREFIX)
    router.routes.extend(dashboard.routes(_DASHBOARD))

    @router.get("/metrics", tags=["webhooks"], summary="Metrics for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format; the counts of all processes of this server."""
        if not effective().metrics:
            raise HTTPException(404)
        if current is not None:
            await current.refresh_gauges()
        page, content_type = telemetry.exposition()
        return Response(page, media_type=content_type)

    return router, endpoint, dashboard


@asynccontextmanager
async def _system_of(app: FastAPI, settings: Settings) -> AsyncIterator[System]:
    """The system of an application: started, or that of another of our routers in it, which runs longer than this one.

    Routers with different settings have a system each.
    """
    before: System | None = getattr(app.state, "kamiyo", None)
    if before is not None and before.settings == in_force(settings):
        yield before
        return
    async with running(settings) as system:
        # For whoever holds the application and not the router: `kamiyo.testing`.
        app.state.kamiyo = system
        try:
            yield system
        finally:
            app.state.kamiyo = before


def create_app(settings: Settings | None = None) -> FastAPI:
    """The Kamiyo API: the router in an application of its own."""
    app = KamiyoApi(title="Kamiyo API", description=_ABOUT, version=__version__)
    router, app.stripe, dashboard = _router(settings)
    app.router.routes.extend(dashboard.routes("/dashboard"))
    # Links in alerts lead below the router's prefix, where every application has it. Here it has one place, and so one
    # session.
    for path in (_DASHBOARD, f"{_DASHBOARD}/{{path:path}}"):
        app.router.routes.append(Route(path, _to_the_dashboard, include_in_schema=False))
    app.include_router(router)

    @app.get("/", include_in_schema=False)
    async def where_to_look() -> dict[str, str]:
        return {
            "name": "Kamiyo API",
            "dashboard": "/dashboard",
            "docs": "/docs",
            "health": f"{PREFIX}/health",
            "metrics": "/metrics",
        }

    return app


async def _to_the_dashboard(request: Request) -> Response:
    rest, root = request.path_params.get("path", ""), request.scope.get("root_path", "")
    asked = f"?{request.url.query}" if request.url.query else ""
    return RedirectResponse(quote(f"{root}/dashboard/{rest}".rstrip("/")) + asked, 307)


_ABOUT = """Stripe's webhooks, received, stored, processed, retried.

Calls of operators take the header `X-Admin-Key`."""


def _document(router: APIRouter) -> None:
    """The receiving call as `/docs` shows it; `StripeEndpoint` answers before FastAPI gets here."""

    @router.post(
        STRIPE_PATH,
        tags=["webhooks"],
        summary="Receive an event from Stripe",
        response_model=models.Received,
        responses={
            400: {
                "model": models.Detail,
                "description": "`Missing Stripe signature header`, `Invalid signature`, or `Invalid payload`.",
            },
            408: {"model": models.Detail, "description": "`Request body came too slowly`: over 15 seconds."},
            413: {"model": models.Detail, "description": "`Payload too large`: over KAMIYO_MAX_BODY_BYTES."},
            503: {
                "model": models.Detail,
                "description": "Not committed, with `Retry-After`: Stripe delivers it again. No secret is configured, "
                "the database is away, or more is waiting than can be committed or received soon.",
                "headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
            },
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "description": "The event, byte for byte as Stripe signed it.",
                "content": {"application/json": {"schema": {"type": "object"}}},
            },
            "parameters": [
                {
                    "name": "Stripe-Signature",
                    "in": "header",
                    "required": True,
                    "description": "`t=<unix seconds>,v1=<hex HMAC-SHA256>[,v1=…]`",
                    "schema": {"type": "string"},
                },
                {
                    "name": "shadow",
                    "in": "query",
                    "required": False,
                    "description": "`1` for a twin endpoint on an API version that is to be tried: what it delivers is "
                    "verified with STRIPE_SHADOW_WEBHOOK_SECRET, kept apart, and compared by `kamiyo upgrade-report`.",
                    "schema": {"type": "string"},
                },
            ],
        },
    )
    async def receive_stripe_event() -> None:
        """Answers 200 only after the event is committed; an event seen before is answered 200 as well."""
        raise NotImplementedError("StripeEndpoint answers this path")
