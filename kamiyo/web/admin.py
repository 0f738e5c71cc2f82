"""The calls of operators, and the two that anyone may make: health and supported events."""

import base64
import binascii
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, Any, Literal

import asyncpg
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BeforeValidator

from kamiyo import handlers, inbox
from kamiyo.database import UNAVAILABLE, Connection
from kamiyo.errors import (
    AdminError,
    DatabaseUnavailable,
    EventUnknown,
    ReceiveError,
    SecretMissing,
    Unavailable,
)
from kamiyo.event import LONGEST_NAME
from kamiyo.inbox import Filters
from kamiyo.settings import Settings
from kamiyo.telemetry import happened
from kamiyo.web import models
from kamiyo.web.doorkeeper import Doorkeeper
from kamiyo.web.system import System

_UNAUTHORIZED: dict[int | str, dict[str, Any]] = {
    401: {"model": models.Detail, "description": "The `X-Admin-Key` header is absent or wrong."},
    503: {"model": models.Detail, "description": "No admin key is configured, or the database is away."},
}
_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": models.Detail, "description": "No event has this id."}}

#: PostgreSQL is away, does not let us in, does not know our database, or has not our tables in it yet.
_NOT_NOW: tuple[type[BaseException], ...] = (
    *UNAVAILABLE,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedFunctionError,
)

# What operators see is nobody else's: not a cache's, not a frame's, not another site's.
_SAFE_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}

#: Names come from URLs and go to PostgreSQL's text, which holds no NUL.
_Name = Annotated[str, Query(max_length=LONGEST_NAME, pattern=r"^[^\x00]+$")]


def _no_number(value: Any) -> Any:
    # Pydantic would take one for unix seconds, so that `since=7`, meant as days, were the year 1970.
    try:
        float(value)
    except (TypeError, ValueError):
        return value
    raise ValueError("Give a date and a time, not a number")


_Moment = Annotated[
    datetime,
    BeforeValidator(_no_number),
    Query(description="RFC 3339, e.g. 2026-11-01T00:00:00Z; UTC where no offset is given."),
]
_Account = Annotated[
    str,
    Query(
        max_length=LONGEST_NAME,
        pattern=r"^[^\x00]+$",
        description="The account that the event is filed under (acct_…); `own` for one's own.",
    ),
]
_Context = Annotated[
    str,
    Query(
        max_length=LONGEST_NAME,
        pattern=r"^[^\x00]+$",
        description="The whole context of an organisation's or a connected account's event: acct_…, acct_…/acct_….",
    ),
]
_Livemode = Annotated[bool, Query(description="Only events of live mode (true), or of test mode (false).")]
_Status = Annotated[
    Literal["pending", "unread", "processing", "processed", "failed", "retrying", "dead"],
    Query(description="Failed are those that are `retrying` and those that are `dead`; `unread` are pending as well."),
]
_Replayable = Annotated[
    Literal["failed", "retrying", "dead", "processed"],
    Query(description="`failed` are those that are `retrying` and those that are `dead`."),
]


class AnsweringRoute(APIRoute):
    """Turns Kamiyo's errors into their answers by itself: a router has no exception handlers of its own to bring."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, wrapped."""
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                response = await handler(request)
            except (AdminError, ReceiveError) as error:
                headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else None
                response = JSONResponse({"detail": error.detail}, error.status, headers)
            response.headers.update(_SAFE_HEADERS)
            return response

        return answer


def admin_router(current: Callable[[], System | None], settings: Callable[[], Settings]) -> APIRouter:
    """The calls under `/api/v1/webhooks`, but for the receiving one."""
    router = APIRouter(route_class=AnsweringRoute)

    def system() -> System:
        running = current()
        if running is None:
            raise Unavailable("the application's lifespan has not started")
        return running

    @asynccontextmanager
    async def connection() -> AsyncIterator[Connection]:
        try:
            async with system().pool.acquire(timeout=5) as db:
                yield db
        except _NOT_NOW as error:
            raise DatabaseUnavailable from error

    @cache
    def doorkeeper() -> Doorkeeper:
        return Doorkeeper(settings().admin_api_key.get_secret_value())

    async def admin(
        request: Request, x_admin_key: Annotated[str | None, Header(description="ADMIN_API_KEY")] = None
    ) -> None:
        await doorkeeper().admit(x_admin_key, request.client.host if request.client else "")

    guarded: dict[str, Any] = {"dependencies": [Depends(admin)], "tags": ["operators"]}

    @router.get(
        "/health",
        tags=["webhooks"],
        summary="How the webhook system is",
        response_model=models.Health,
        responses={503: {"model": models.Health, "description": "Unhealthy: no database, or over 20 % failed."}},
    )
    async def health() -> Response:
        """`degraded` when over 10 % of the last 24 hours failed or the oldest due event waits over 5 minutes."""
        try:
            async with connection() as db:
                row = await inbox.health(db)
        except Unavailable:
            return _health("unhealthy", "down", 0, 0)
        status: str = row["status"]
        word = "operational" if status == "healthy" else "degraded"
        return _health(status, word, row["events_last_24h"], row["failed_events_last_24h"])

    @router.get("/live", tags=["webhooks"], summary="Whether the process answers", response_model=models.Alive)
    async def live() -> dict[str, str]:
        """For a supervisor's liveness probe: says nothing of the database, whose absence a restart does not mend."""
        return {"status": "alive"}

    @router.get(
        "/ready",
        tags=["webhooks"],
        summary="Whether deliveries can be taken",
        response_model=models.Ready,
        responses={
            503: {
                "model": models.Detail,
                "description": "No secret and no key of a road is configured, or the database is away.",
            }
        },
    )
    async def ready() -> dict[str, str]:
        """For a load balancer that can send deliveries elsewhere; unlike `/health` it says nothing of failed events."""
        if not system().settings.any_door_open:
            raise SecretMissing
        async with connection() as db:
            await db.execute("SELECT 1")
        return {"status": "ready"}

    @router.get(
        "/supported-events",
        tags=["webhooks"],
        summary="The event types that change something here",
        response_model=models.SupportedEvents,
    )
    async def supported_events() -> dict[str, Any]:
        """The ten of the guide, and those that handlers of your own are registered for."""
        types = handlers.supported_types()
        return {"status": "success", "supported_events": types, "count": len(types)}

    @router.get(
        "/statistics",
        summary="What came in, by type",
        response_model=models.Statistics,
        responses=_UNAUTHORIZED,
        **guarded,
    )
    async def statistics(days: Annotated[int, Query(ge=1, le=3650)] = 7) -> dict[str, Any]:
        """Counts of the events received in the last `days`, by where they stand now."""
        async with connection() as db:
            rows = await inbox.statistics(db, days)
        return _statistics(rows, days)

    @router.get("/events", summary="List events", response_model=models.EventPage, responses=_UNAUTHORIZED, **guarded)
    async def list_events(
        status: _Status | None = None,
        type: _Name | None = None,
        customer: _Name | None = None,
        object_id: _Name | None = None,
        account: _Account | None = None,
        context: _Context | None = None,
        livemode: _Livemode | None = None,
        since: _Moment | None = None,
        until: _Moment | None = None,
        cursor: Annotated[str | None, Query(description="`next` of the page before.", max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 50,
    ) -> dict[str, Any]:
        """Newest first. Every filter is optional; a page is found by its position, so deep pages cost the same."""
        who = Filters(status, type, customer, object_id, _kept_as(account), context, livemode)
        filters = replace(who, since=_utc("since", since), until=_utc("until", until))
        async with connection() as db:
            rows = await inbox.listed(db, filters, before=_position(cursor), limit=limit + 1)
        more, rows = len(rows) > limit, rows[:limit]
        return {
            "status": "success",
            "count": len(rows),
            "events": [summary_of(row) for row in rows],
            "next": _cursor(rows[-1]["created_at"], rows[-1]["seq"]) if more else None,
        }

    @router.get(
        "/events/failed/list",
        summary="List failed events",
        response_model=models.FailedEvents,
        responses=_UNAUTHORIZED,
        **guarded,
    )
    async def failed_events(limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
        """Newest first, each with its last error. `next_try_at` is null for those that are dead."""
        async with connection() as db:
            rows = await inbox.failed(db, limit)
        return {
            "status": "success",
            "count": len(rows),
            "events": [_account_or_none(dict(row)) for row in rows],
        }

    @router.post(
        "/events/replay",
        summary="Run many events again",
        response_model=models.Replayed,
        responses=_UNAUTHORIZED,
        **guarded,
    )
    async def replay(
        status: _Replayable = "failed",
        type: _Name | None = None,
        customer: _Name | None = None,
        object_id: _Name | None = None,
        account: _Account | None = None,
        context: _Context | None = None,
        livemode: _Livemode | None = None,
        since: _Moment | None = None,
        until: _Moment | None = None,
        fingerprint: Annotated[str | None, Query(max_length=64, pattern="^[0-9a-f]+$")] = None,
        dry_run: Annotated[bool, Query(description="Only count what would run again.")] = False,
    ) -> dict[str, Any]:
        """By the filters of the list; the failed ones unless `status` says otherwise. Written to the audit."""
        who = Filters(status, type, customer, object_id, _kept_as(account), context, livemode)
        filters = replace(who, since=_utc("since", since), until=_utc("until", until))
        async with connection() as db:
            matched = await inbox.count_matching(db, filters, fingerprint)
            replayed = 0 if dry_run else await inbox.replay(db, filters, fingerprint)
        happened("events_retried", count=replayed, dry_run=dry_run)
        return {"status": "success", "dry_run": dry_run, "matched_count": matched, "replayed_count": replayed}

    @router.get(
        "/events/{event_id}",
        summary="One event, with its payload and every failed try",
        response_model=models.EventDetail,
        responses={**_UNAUTHORIZED, **_UNKNOWN},
        **guarded,
    )
    async def get_event(event_id: str) -> Response:
        """Everything that is known of one event."""
        async with connection() as db:
            row, failures = await inbox.one(db, _believable(event_id))
        return Response(detail_of(row, failures, row["body"]), media_type="application/json")

    @router.post(
        "/events/{event_id}/retry",
        summary="Run a failed event again",
        response_model=models.Retried,
        responses={
            **_UNAUTHORIZED,
            **_UNKNOWN,
            409: {"model": models.Detail, "description": "The event is not failed."},
        },
        **guarded,
    )
    async def retry(event_id: str) -> dict[str, Any]:
        """Puts it back in line, now, with five new tries."""
        async with connection() as db:
            await inbox.retry(db, _believable(event_id))
        happened("events_retried", count=1, event_id=event_id)
        return {"status": "success", "message": "Event queued for retry", "event_id": event_id}

    @router.post(
        "/cleanup",
        summary="Remove old processed events",
        response_model=models.CleanedUp,
        responses=_UNAUTHORIZED,
        **guarded,
    )
    async def cleanup(days: Annotated[int, Query(ge=1, le=3650)] = 30) -> dict[str, Any]:
        """Never touches an event that is not processed. Ids are remembered for as long as Stripe may send them."""
        async with connection() as db:
            deleted = await inbox.clean_up(db, days)
        happened("events_pruned", count=deleted, days=days)
        return {"status": "success", "deleted_count": deleted, "older_than_days": days}

    return router


def _health(status: str, word: str, events: int, failed: int) -> JSONResponse:
    return JSONResponse(
        {
            "status": status,
            "webhook_system": word,
            "events_last_24h": events,
            "failed_events_last_24h": failed,
            "supported_event_types": len(handlers.supported_types()),
        },
        status_code=503 if status == "unhealthy" else 200,
    )


def _statistics(rows: list[asyncpg.Record], days: int) -> dict[str, Any]:
    by_type = {
        row["event_type"]: {
            "total": row["received"],
            "processed": row["processed"],
            "failed": row["failed"],
            "pending": row["pending"],
            "avg_processing_time_ms": round(row["processing_us"] / 1000 / row["processed"], 3)
            if row["processed"]
            else 0,
        }
        for row in rows
    }
    totals = {name: sum(one[name] for one in by_type.values()) for name in ("total", "processed", "failed", "pending")}
    finished = totals["processed"] + totals["failed"]
    return {
        "status": "success",
        "period_days": days,
        "summary": {
            "total_events": totals["total"],
            "processed": totals["processed"],
            "failed": totals["failed"],
            "pending": totals["pending"],
            "success_rate": round(100 * totals["processed"] / finished, 2) if finished else 100.0,
        },
        "by_event_type": by_type,
    }


def summary_of(row: asyncpg.Record) -> dict[str, Any]:
    """An event as lists show it: the values of `models.EventSummary`."""
    return _account_or_none(dict(row) | {"processing_time_ms": row["processing_us"] / 1000})


def _account_or_none(values: dict[str, Any]) -> dict[str, Any]:
    return values | {name: values[name] or None for name in ("account", "context") if name in values}


def detail_of(row: asyncpg.Record, failures: Sequence[asyncpg.Record], body: bytes | None) -> bytes:
    """An event with its failed tries and its payload, as the JSON of `models.EventDetail`."""
    tries = [models.Attempt(**failure) for failure in failures]
    told = models.EventDetail(**summary_of(row), payload=None, failures=tries)
    # The payload goes in as the text it came as: every JSON that could be stored can be shown, however deep it
    # is nested, and no number or letter is changed on the way.
    head = told.model_dump_json(exclude={"payload"}).encode()
    return head[:-1] + b',"payload":' + (b"null" if body is None else body) + b"}"


def _believable(event_id: str) -> str:
    # No stored id is like that, and PostgreSQL would refuse to look for one with a NUL.
    if "\0" in event_id or len(event_id) > LONGEST_NAME:
        raise EventUnknown
    return event_id


def _kept_as(account: str | None) -> str | None:
    return "" if account == inbox.OWN else account


def _utc(name: str, moment: datetime | None) -> datetime | None:
    if moment is None:
        return None
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise _invalid(name, "The moment is outside the years 1 to 9999", moment.isoformat()) from None


def _invalid(name: str, message: str, given: str) -> RequestValidationError:
    """The error FastAPI itself raises for a query parameter, so that there is one shape of 422."""
    return RequestValidationError([{"type": "value_error", "loc": ("query", name), "msg": message, "input": given}])


def _cursor(created_at: datetime, seq: int) -> str:
    microseconds = int(created_at.timestamp()) * 1_000_000 + created_at.microsecond
    return base64.urlsafe_b64encode(struct.pack(">qq", microseconds, seq)).decode().rstrip("=")


def _position(cursor: str | None) -> tuple[datetime, int] | None:
    if not cursor:
        return None
    try:
        microseconds, seq = struct.unpack(">qq", base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds), seq
    except (binascii.Error, struct.error, ValueError, OverflowError):
        raise _invalid("cursor", "Take it from `next` of the page before", cursor) from None
