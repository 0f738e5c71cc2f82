"""The dashboard as one ASGI application: who may see it, what every answer carries, and which page answers.

It stands at `/dashboard` of the Kamiyo API, and below the router's prefix where only the router is included. It does
not know where: the address it was reached at is the base of every link on a page.
"""

import asyncio
import hashlib
import itertools
import mimetypes
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

import asyncpg
import jinja2
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from kamiyo import inbox
from kamiyo.database import UNAVAILABLE, Connection
from kamiyo.errors import EventUnknown, KamiyoError
from kamiyo.settings import Settings
from kamiyo.web import webhooks
from kamiyo.web.dashboard import background, queries, wording
from kamiyo.web.dashboard.background import Background
from kamiyo.web.dashboard.session import Session, Sessions
from kamiyo.web.doorkeeper import Doorkeeper
from kamiyo.web.system import System

_HERE = Path(__file__).resolve().parent

# Nothing but our own files, no frame around us, nothing kept by a cache, no address given away to where a link leads.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Stopped(KamiyoError):
    """The application's lifespan has not started, or is over."""


#: PostgreSQL is away, does not let us in, or has not our tables in it yet.
_AWAY: tuple[type[BaseException], ...] = (
    Stopped,
    *UNAVAILABLE,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedFunctionError,
)

# A form here is a token and a few words.
_LONGEST_FORM = 16_384

# Pages asked for at once in one process; the others wait. Receiving and processing share the pool with them.
_MOST_LOOKING = 2


class PageNotFound(KamiyoError):
    """There is no such page; the message says what there is none of, for the person who asked."""


class Refused(KamiyoError):
    """An action without its session's token, or from another site."""


@dataclass(frozen=True)
class Visit:
    """One request by somebody who is signed in."""

    site: "Dashboard"
    request: Request
    base: str
    session: Session | None
    form: Mapping[str, str]

    @property
    def fragment(self) -> bool:
        """Whether the page's own script asks, for the part that changes."""
        return self.request.headers.get("x-fragment") == "live"

    @property
    def secure(self) -> bool:
        """Whether the browser came by https."""
        return self.request.url.scheme == "https"

    def url(self, *parts: str, **query: Any) -> str:
        """The address of a page here; query values of None are left out."""
        asked = urlencode({name: value for name, value in query.items() if value is not None})
        path = "/".join([self.base, *(quote(part, safe="") for part in parts)])
        return f"{path}?{asked}" if asked else path

    def asked(self, name: str) -> str | None:
        """A value of the address's query, without the spaces around it; None where it is absent or empty."""
        value = self.request.query_params.get(name, "").strip()
        return value if value and "\0" not in value else None

    def path(self, name: str) -> str:
        """A value out of the path. Raises PageNotFound for what nothing here can be called."""
        value = str(self.request.path_params[name])
        if "\0" in value or len(value) > 255:
            raise PageNotFound("Nothing has such an id.")
        return value

    def reading(self, seconds: int = 5) -> AbstractAsyncContextManager[Connection]:
        """A connection in a read-only transaction, whose questions may take `seconds` each."""
        return self.site.reading(seconds)

    def page(self, template: str, status: int = 200, **values: Any) -> Response:
        """A page, or only its live part where the script asks for that."""
        frame = "fragment.html" if self.fragment else "page.html"
        return HTMLResponse(self.site.render(template, self, frame=frame, **values), status)

    def to(self, *parts: str, **query: Any) -> Response:
        """Go on to another page."""
        return RedirectResponse(self.url(*parts, **query), 303)


Answer = Callable[[Visit], Awaitable[Response]]


@cache
def _templates() -> jinja2.Environment:
    # One for all applications of a process: a template is compiled once.
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "when": lambda moment: wording.when(moment, datetime.now(UTC)),
        "at": wording.at,
        "exact": wording.exact,
        "day": wording.day,
        "span": wording.span,
        "count": wording.count,
        "percent": wording.percent,
        "money": wording.money,
        "state": inbox.state_of,
        "groupby_in_order": _grouped,
    }
    templates.globals |= {"plural": wording.plural, "MOST_COUNTED": queries.MOST_COUNTED}
    return templates


class Dashboard:
    """The pages for operators. One of it serves any number of addresses.

    `current` names the running system, None before the start; `settings` are asked for when they are needed.
    `open_pages` need no session.
    """

    def __init__(
        self,
        current: Callable[[], System | None],
        settings: Callable[[], Settings],
        pages: Mapping[str, Answer],
        actions: Mapping[str, Answer],
        open_pages: Mapping[str, Answer],
        open_actions: Mapping[str, Answer],
    ) -> None:
        self._current, self._settings = current, settings
        self._background: Background | None = None
        self._looking = asyncio.Semaphore(_MOST_LOOKING)
        self._router = Router(
            [
                Route("/static/{name}", self._static),
                *self._guarded(open_pages, "GET", guarded=False),
                *self._guarded(open_actions, "POST", guarded=False),
                *self._guarded(actions, "POST"),
                *self._guarded(pages, "GET"),
                Route("/{path:path}", self._gate(_nothing)),
            ],
            redirect_slashes=False,
        )

    def _guarded(self, answers: Mapping[str, Answer], method: str, *, guarded: bool = True) -> Iterator[Route]:
        for path, answer in answers.items():
            yield Route(path, self._gate(answer, guarded=guarded), methods=[method])

    def routes(self, path: str) -> list[Route]:
        """The routes that put the dashboard at `path`."""
        return [
            Route(path, self, name="dashboard", include_in_schema=False),
            Route(path + "/{path:path}", self, name="dashboard pages", include_in_schema=False),
        ]

    @asynccontextmanager
    async def running(self, system: System) -> AsyncIterator[None]:
        """Do what goes on behind the pages, while the block runs."""
        async with background.running(system) as self._background:
            try:
                yield
            finally:
                self._background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; every answer carries the headers that keep it to its reader."""
        rest = str(scope["path_params"].get("path", ""))
        root = scope.get("root_path", "")
        path = scope["path"] if scope["path"].startswith(root) else root + scope["path"]
        base = path.removesuffix(rest).rstrip("/")
        inner = {**scope, "path": f"{base}/{rest}", "root_path": base, "path_params": {}}

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._router(inner, receive, guarded_send)
        except HTTPException as error:
            # The only one: a path that exists, by a method that it does not take.
            await PlainTextResponse(error.detail, error.status_code, error.headers)(inner, receive, guarded_send)
        except ClientDisconnect:
            pass

    # ── Who may see it ──────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _key(self) -> str:
        return self._settings().admin_api_key.get_secret_value()

    @cached_property
    def sessions(self) -> Sessions:
        """Who is signed in."""
        return Sessions(self._key)

    @cached_property
    def doorkeeper(self) -> Doorkeeper:
        """Who may sign in."""
        return Doorkeeper(self._key)

    def _gate(self, answer: Answer, *, guarded: bool = True) -> Callable[[Request], Awaitable[Response]]:
        async def answered(request: Request) -> Response:
            visit = Visit(self, request, quote(request.scope["root_path"]), None, {})
            if not self._key:
                return visit.page("no_key.html", 503)
            try:
                visit = replace(visit, session=self.sessions.of(request))
                if request.method == "POST":
                    visit = replace(visit, form=await _form(request))
                    _require_own_site(request)
                if guarded and visit.session is None:
                    return _to_sign_in(visit)
                if guarded and request.method == "POST":
                    _require_token(visit)
                return await answer(visit)
            except Refused as refused:
                return visit.page("notice.html", 403, title="Not done", text=str(refused))
            except PageNotFound as absent:
                return visit.page("notice.html", 404, title="Not found", text=str(absent))
            except EventUnknown:
                return visit.page("notice.html", 404, title="Not found", text=_NO_EVENT)
            except asyncpg.QueryCanceledError:
                return visit.page("notice.html", 503, title="That took too long", text=_TOO_LONG)
            except _AWAY:
                return visit.page("notice.html", 503, title="The database does not answer", text=_NO_DATABASE, again=5)

        return answered

    # ── What a page needs ───────────────────────────────────────────────────────────────────────────────────────

    def system(self) -> System:
        """The running system. Raises Stopped while there is none."""
        system = self._current()
        if system is None:
            raise Stopped
        return system

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings()

    @property
    def behind(self) -> Background:
        """What goes on behind the pages. Raises Stopped while nothing does."""
        if self._background is None:
            raise Stopped
        return self._background

    @asynccontextmanager
    async def reading(self, seconds: int) -> AsyncIterator[Connection]:
        """A connection in a read-only transaction, whose questions may take `seconds` each."""
        async with (
            self._looking,
            self.system().pool.acquire(timeout=5) as db,
            db.transaction(readonly=True),
        ):
            await queries.limit(db, seconds)
            yield db

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Connection]:
        """A connection for an action, in a transaction."""
        async with self.system().pool.acquire(timeout=5) as db, db.transaction():
            yield db

    def render(self, template: str, visit: Visit, **values: Any) -> str:
        """The text of a page."""
        return (
            _templates()
            .get_template(template)
            .render(visit=visit, url=visit.url, static=lambda name: f"{visit.base}/{self._address_of(name)}", **values)
        )

    # ── The stylesheet, the script, the icon ────────────────────────────────────────────────────────────────────

    @cached_property
    def _files(self) -> dict[str, tuple[bytes, str, str]]:
        return {path.name: _file(path) for path in sorted((_HERE / "static").iterdir())}

    def _address_of(self, name: str) -> str:
        return f"static/{name}?v={self._files[name][2]}"

    async def _static(self, request: Request) -> Response:
        found = self._files.get(request.path_params["name"])
        if found is None:
            return PlainTextResponse("Not found", 404)
        content, kind, version = found
        headers = {"ETag": f'"{version}"'}
        # An address with its version in it never means anything else.
        named = request.query_params.get("v") == version
        headers["Cache-Control"] = "public, max-age=31536000, immutable" if named else "no-cache"
        if request.headers.get("if-none-match") == f'"{version}"':
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)


def _file(path: Path) -> tuple[bytes, str, str]:
    content = path.read_bytes()
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return content, kind, hashlib.sha256(content).hexdigest()[:12]


def _grouped(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[tuple[Any, list[Mapping[str, Any]]]]:
    # Jinja's own groupby sorts by the value, and the names of days do not sort like days.
    for value, group in itertools.groupby(rows, key=lambda row: row[name]):
        yield value, list(group)


async def _nothing(visit: Visit) -> Response:
    raise PageNotFound("There is no page at this address.")


def _to_sign_in(visit: Visit) -> Response:
    if visit.fragment:
        return PlainTextResponse("Signed out", 401)
    path = visit.request.url.path.removeprefix(visit.request.scope["root_path"])
    query = visit.request.url.query
    wanted = f"{path}?{query}" if query else path
    if visit.request.method == "GET" and visit.request.headers.get("sec-fetch-site") == "cross-site":
        # A link from elsewhere, out of an alert say: on the way in the browser keeps a SameSite=Strict cookie to
        # itself. Asked by a page of our own it gives it.
        return visit.page("bounce.html", onward=visit.base + quote(path) + (f"?{query}" if query else ""))
    known = visit.request.method == "GET" and wanted != "/"
    return visit.to("sign-in", next=wanted if known else None)


async def _form(request: Request) -> dict[str, str]:
    body = b""
    try:
        async with asyncio.timeout(webhooks.BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > _LONGEST_FORM:
                    raise Refused("The form is too long.")
    except TimeoutError:
        raise Refused("The form came too slowly.") from None
    return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))


def _require_own_site(request: Request) -> None:
    # Every browser says so since 2023; whoever does not send it has no cookie to misuse either.
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Refused("This was asked for by another site, so it was not done.")


def _require_token(visit: Visit) -> None:
    if visit.session is None or not visit.session.allows(visit.form.get("token", "")):
        raise Refused("The page was from an earlier session, so nothing was done. Go back, reload it, and try again.")


_NO_EVENT = (
    "No event here has this id. Stripe may not have delivered it yet, or it was cleaned up: processed events are kept "
    "until somebody removes them with kamiyo cleanup."
)
_TOO_LONG = "The question was stopped after a while. Narrow it: a customer, an object, a type, or a shorter time."
_NO_DATABASE = (
    "Deliveries are answered 503 for as long as this lasts, so Stripe keeps them and delivers again. This page asks "
    "again by itself every few seconds."
)
