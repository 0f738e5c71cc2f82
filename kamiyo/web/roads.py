"""The other roads in: Amazon EventBridge and Azure Event Grid, which carry Stripe's events without its signature.

Each proves itself by a key that it sends in the header `X-Api-Key`. Never in the address: addresses are written down by
every proxy on the way. After that an event is received like any other: same group commit, same dedupe.
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import JSONResponse

from kamiyo import envelope
from kamiyo.envelope import Validation
from kamiyo.errors import PayloadError, ReceiveError, RoadClosed, RoadKeyInvalid, Unavailable
from kamiyo.receive import Receipt
from kamiyo.telemetry import happened
from kamiyo.web import models
from kamiyo.web.system import System
from kamiyo.web.webhooks import UNREAD, Bodies, ClientLeft, count_refusal

_EVENTBRIDGE, _EVENTGRID = "eventbridge", "eventgrid"

_ApiKey = Annotated[str | None, Header(description="KAMIYO_EVENTBRIDGE_KEY, or KAMIYO_EVENTGRID_KEY.")]

# A question whether this is the place is some hundred bytes long.
_LONGEST_QUESTION = 16_384

# Events of one batch that wait for their commit at the same time.
_TOGETHER = 100

_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": models.Detail, "description": "`Invalid payload`: no event, or no JSON."},
    401: {"model": models.Detail, "description": "`Invalid API key`: the header `X-Api-Key` is absent or wrong."},
    408: {"model": models.Detail, "description": "`Request body came too slowly`: over 15 seconds."},
    413: {"model": models.Detail, "description": "`Payload too large`: over KAMIYO_MAX_BODY_BYTES."},
    503: {
        "model": models.Detail,
        "description": "Not committed, with `Retry-After`: no key is configured, the database is away, or more is "
        "waiting than can be committed soon.",
        "headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
    },
}


def roads_router(current: Callable[[], System | None], bodies: Bodies) -> APIRouter:
    """The calls of other roads, for the system that `current()` names at the time of the call; None: not started."""
    router = APIRouter(tags=["webhooks"])

    @router.post(
        "/eventbridge",
        summary="Receive an event from Amazon EventBridge",
        response_model=models.Received,
        responses=_REFUSALS,
        openapi_extra=_body("An EventBridge event whose `detail` is Stripe's event; or Stripe's event alone.", {}),
    )
    async def receive_from_eventbridge(request: Request, x_api_key: _ApiKey = None) -> Response:
        """Answers 200 only after the event is committed; an event seen before is answered 200 as well."""

        async def answer() -> dict[str, Any]:
            system = _running(current())
            _admit(x_api_key, system.settings.eventbridge_keys)
            body = await _read(bodies, request, system.settings.max_body_bytes)
            event = envelope.from_eventbridge(body)
            caller = _caller(request)
            return _told(await system.receiver.receive_vouched(event, source=_EVENTBRIDGE, caller=caller))

        return await _answered(answer)

    @router.post(
        "/eventgrid",
        summary="Receive events from Azure Event Grid",
        response_model=models.ReceivedByEventGrid,
        response_model_exclude_none=True,
        responses=_REFUSALS,
        openapi_extra=_body(
            "A CloudEvent whose `data` is Stripe's event, or a list of them; or the same in Event Grid's own schema.",
            {"oneOf": [{"type": "object"}, {"type": "array", "items": {"type": "object"}}]},
        ),
    )
    async def receive_from_eventgrid(
        request: Request,
        x_api_key: _ApiKey = None,
        aeg_event_type: Annotated[
            str | None, Header(description="`SubscriptionValidation`: the question whether this is the place.")
        ] = None,
    ) -> Response:
        """Answers 200 only after all events are committed. Where some are none, the others are stored all the same.

        A `SubscriptionValidationEvent` gets its code back; without a key as well, for Event Grid asks before it has one
        to show, and being asked lets nobody in.
        """

        async def answer() -> dict[str, Any]:
            system = _running(current())
            asked = aeg_event_type == "SubscriptionValidation" and x_api_key is None
            limit = system.settings.max_body_bytes
            if asked and system.settings.eventgrid_keys:
                body = await _read(bodies, request, min(limit, _LONGEST_QUESTION))
                # Of whoever shows no key, no more is looked at than whether it is the question.
                question = envelope.question(body)
                if question is None:
                    raise RoadKeyInvalid
                return {"validationResponse": question.code}
            _admit(x_api_key, system.settings.eventgrid_keys)
            carried = envelope.from_eventgrid(await _read(bodies, request, limit))
            if isinstance(carried, Validation):
                return {"validationResponse": carried.code}
            receipts = await _receive_all(system, carried, _caller(request))
            return {"status": "success", "count": len(receipts), "events": [_told(receipt) for receipt in receipts]}

        return await _answered(answer)

    @router.options(
        "/eventgrid",
        summary="Allow Azure Event Grid to deliver",
        responses={
            200: {
                "description": "It may.",
                "headers": {
                    name: {"schema": {"type": "string"}}
                    for name in ("WebHook-Allowed-Origin", "WebHook-Allowed-Rate", "Allow")
                },
            },
            403: {"model": models.Detail, "description": "Somebody else asks than Event Grid."},
            503: _REFUSALS[503],
        },
        response_class=Response,
    )
    async def allow_eventgrid(
        webhook_request_origin: Annotated[
            str | None, Header(description="Who asks: `eventgrid.azure.net`.", alias="WebHook-Request-Origin")
        ] = None,
    ) -> Response:
        """The handshake of CloudEvents' web hooks. It gives leave to deliver; what is delivered needs the key."""

        async def answer() -> Response:
            if not _running(current()).settings.eventgrid_keys:
                raise RoadClosed
            if webhook_request_origin is None or not envelope.may_deliver(webhook_request_origin):
                return JSONResponse({"detail": "WebHook-Request-Origin is not Azure Event Grid's"}, 403)
            allowed = {"WebHook-Allowed-Origin": webhook_request_origin, "WebHook-Allowed-Rate": "*", "Allow": "POST"}
            return Response(headers=allowed)

        return await _answered(answer)

    return router


def _body(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema or {"type": "object"}}}
    return {"requestBody": {"required": True, "description": description, "content": content}}


async def _answered(answer: Callable[[], Awaitable[dict[str, Any] | Response]]) -> Response:
    """Every way a delivery can end is one of the contract's answers."""
    try:
        said = await answer()
    except ClientLeft:
        happened("client_left")
        said = Response(status_code=400)  # nobody reads it
    except ReceiveError as error:
        count_refusal(error)
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
        if isinstance(error, UNREAD):
            headers["Connection"] = "close"
        said = JSONResponse({"detail": error.detail}, error.status, headers)
    response = said if isinstance(said, Response) else JSONResponse(said)
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def _running(system: System | None) -> System:
    if system is None:
        raise Unavailable("the application's lifespan has not started")
    return system


def _admit(given: str | None, keys: Sequence[str]) -> None:
    if not keys:
        raise RoadClosed
    shown = (given or "").encode("latin-1", "replace")
    # Each is compared, so that the time says nothing of which one fits.
    if not any([hmac.compare_digest(shown, key.encode()) for key in keys]):
        raise RoadKeyInvalid


async def _read(bodies: Bodies, request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length")
    return await bodies.read(request.receive, limit, length.encode("latin-1") if length is not None else None)


def _caller(request: Request) -> bytes | None:
    value = request.headers.get("traceparent")
    return value.encode("latin-1") if value is not None else None


async def _receive_all(system: System, carried: Sequence[bytes], caller: bytes | None) -> list[Receipt]:
    receiver = system.receiver
    # A few at a time: all at once, a batch larger than what may wait for its commit would be too much however often it
    # is delivered again, and would leave no room for anybody else.
    size = min(_TOGETHER, system.settings.max_waiting)
    ends: list[Receipt | BaseException] = []
    for start in range(0, len(carried), size):
        ends += await asyncio.gather(
            *(
                receiver.receive_vouched(event, source=_EVENTGRID, caller=caller)
                for event in carried[start : start + size]
            ),
            return_exceptions=True,
        )
    # Whatever is not committed must be delivered again; only then, what is no event. Event Grid takes one answer for
    # all, and drops what was answered 400: so that nothing else is dropped with it, the rest is stored by now.
    for kind in (Unavailable, PayloadError, BaseException):
        for end in ends:
            if isinstance(end, kind):
                raise end
    return [end for end in ends if isinstance(end, Receipt)]


def _told(receipt: Receipt) -> dict[str, Any]:
    return {
        "status": "success",
        "message": receipt.message.value,
        "event_id": receipt.event_id,
        "event_type": receipt.event_type,
    }
