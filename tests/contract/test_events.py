"""What operators may look at: the statistics, the list of events with its filters and pages, what failed, one event."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from kamiyo import handlers, inbox
from kamiyo.database import Connection
from kamiyo.event import Event
from tests.conftest import ADMIN, PREFIX, deliver, event_json, noop, settled, until
from tests.contract.conftest import put


async def ask(client: httpx.AsyncClient, path: str, **params: Any) -> Any:
    """The JSON of an operator's GET that succeeds."""
    answer = await client.get(PREFIX + path, params=params, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ── GET /statistics ───────────────────────────────────────────────────────────────────────────────────────


async def test_statistics_count_by_type_and_status_within_the_days_asked_for(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    for _ in range(3):
        await put(db, event_type="customer.created", processing_us=1500)
    await put(db, event_type="customer.created", status="failed")
    await put(db, event_type="invoice.paid", status="pending")
    await put(db, event_type="invoice.paid", status="processing")
    await put(db, event_type="charge.refunded", age=timedelta(days=3))
    await put(db, event_type="charge.refunded", age=timedelta(days=12))

    week = await ask(quiet_client, "/statistics")
    assert list(week) == ["status", "period_days", "summary", "by_event_type"]
    assert (week["status"], week["period_days"]) == ("success", 7)
    assert week["summary"] == {
        "total_events": 7,
        "processed": 4,
        "failed": 1,
        "pending": 2,
        "success_rate": 80.0,
    }
    assert week["by_event_type"] == {
        "customer.created": {
            "total": 4,
            "processed": 3,
            "failed": 1,
            "pending": 0,
            "avg_processing_time_ms": 1.5,
        },
        "invoice.paid": {"total": 2, "processed": 0, "failed": 0, "pending": 2, "avg_processing_time_ms": 0},
        "charge.refunded": {
            "total": 1,
            "processed": 1,
            "failed": 0,
            "pending": 0,
            "avg_processing_time_ms": 0,
        },
    }
    assert (await ask(quiet_client, "/statistics", days=1))["summary"]["total_events"] == 6
    assert (await ask(quiet_client, "/statistics", days=30))["summary"]["total_events"] == 8
    # Folding the counts away changes nothing of what they say.
    await inbox.fold_counts(db)
    assert await ask(quiet_client, "/statistics") == week


async def test_statistics_of_nothing_are_zeros_and_a_hundred_percent(quiet_client: httpx.AsyncClient) -> None:
    said = await ask(quiet_client, "/statistics", days=1)
    assert said["summary"] == {
        "total_events": 0,
        "processed": 0,
        "failed": 0,
        "pending": 0,
        "success_rate": 100.0,
    }
    assert said["by_event_type"] == {}


# ── GET /events ───────────────────────────────────────────────────────────────────────────────────────────


async def test_events_are_listed_newest_first_with_what_is_known_of_each(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    await put(db, "evt_old", age=timedelta(hours=1))
    invoice = {"id": "in_1", "object": "invoice", "customer": "cus_1"}
    handlers.on("invoice.upcoming")(noop)
    await deliver(
        quiet_client,
        event_json("evt_new", "invoice.upcoming", invoice, created=1_700_000_000, account="acct_1"),
    )
    page = await ask(quiet_client, "/events")
    assert (page["status"], page["count"], page["next"]) == ("success", 2, None)
    assert [event["event_id"] for event in page["events"]] == ["evt_new", "evt_old"]
    new = page["events"][0]
    for moment in ("created_at", "next_try_at"):
        assert abs(datetime.fromisoformat(new.pop(moment)) - datetime.now(UTC)) < timedelta(minutes=1)
    assert new == {
        "event_id": "evt_new",
        "event_type": "invoice.upcoming",
        "status": "pending",
        "outcome": None,
        "stripe_created": "2023-11-14T22:13:20Z",
        "processed_at": None,
        "read_due_at": None,
        "attempts": 0,
        "processing_time_ms": 0.0,
        "object_type": "invoice",
        "object_id": "in_1",
        "customer": "cus_1",
        "account": "acct_1",
        "context": None,
        "livemode": False,
        "api_version": "2026-10-28.endive",
        "thin": False,
        "source": "webhook",
    }


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({"status": "failed"}, {"evt_f", "evt_r"}),
        ({"status": "dead"}, {"evt_f"}),
        ({"status": "retrying"}, {"evt_r"}),
        ({"status": "pending"}, {"evt_p", "evt_u"}),
        ({"status": "unread"}, {"evt_u"}),
        ({"status": "processing"}, {"evt_w"}),
        ({"status": "processed"}, {"evt_a", "evt_b"}),
        ({"type": "invoice.paid"}, {"evt_b", "evt_f"}),
        ({"customer": "cus_1"}, {"evt_a", "evt_f"}),
        ({"object_id": "in_1"}, {"evt_b"}),
        ({"account": "acct_1"}, {"evt_w"}),
        ({"type": "invoice.paid", "customer": "cus_1"}, {"evt_f"}),
        ({"type": "nothing.such"}, set()),
        ({"until": "-2h"}, {"evt_a"}),
        ({"since": "-2h"}, {"evt_b", "evt_f", "evt_p", "evt_r", "evt_u", "evt_w"}),
        ({"since": "-4h", "until": "-2h"}, {"evt_a"}),
    ],
)
async def test_events_are_filtered(
    filters: dict[str, str], found: set[str], quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    await put(db, "evt_a", customer="cus_1", age=timedelta(hours=3))
    await put(db, "evt_b", "invoice.paid", object_id="in_1")
    await put(db, "evt_f", "invoice.paid", status="failed", customer="cus_1")
    await put(db, "evt_p", status="pending")
    await put(db, "evt_w", status="processing", account="acct_1")
    soon = datetime.now(UTC) + timedelta(minutes=5)
    await put(db, "evt_r", status="failed", next_try_at=soon)
    await put(db, "evt_u", status="pending", read_due_at=soon, read_try_at=soon)
    moments = {
        name: (datetime.now(UTC) - timedelta(hours=int(value[1:-1]))).isoformat()
        for name, value in filters.items()
        if value.startswith("-")
    }
    page = await ask(quiet_client, "/events", **{**filters, **moments})
    assert {event["event_id"] for event in page["events"]} == found
    assert page["count"] == len(found)


async def test_since_is_inclusive_until_is_not_and_a_time_without_an_offset_is_utc(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    at = datetime.now(UTC) - timedelta(minutes=5)
    await put(db, "evt_1", created_at=at)
    naive = at.replace(tzinfo=None).isoformat()
    for moment in (at.isoformat(), naive):
        assert (await ask(quiet_client, "/events", since=moment))["count"] == 1
        assert (await ask(quiet_client, "/events", until=moment))["count"] == 0


async def test_pages_show_every_event_once_even_when_more_arrive_meanwhile(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    moment = datetime.now(UTC) - timedelta(minutes=1)
    # Several share a moment to the microsecond, as the events of one commit do.
    expected = {await put(db, created_at=moment + timedelta(microseconds=n // 4)) for n in range(11)}
    seen: list[str] = []
    cursor, pages = "", 0
    while cursor is not None:
        page = await ask(quiet_client, "/events", limit=3, **({"cursor": cursor} if cursor else {}))
        seen += [event["event_id"] for event in page["events"]]
        cursor, pages = page["next"], pages + 1
        await put(db)
    assert pages == 4
    assert len(seen) == len(set(seen)) == 11
    assert set(seen) == expected


@pytest.mark.parametrize(
    "params",
    [
        {"status": "lost"},
        {"limit": "0"},
        {"limit": "501"},
        {"limit": "many"},
        {"since": "yesterday"},
        {"since": "7"},
        {"until": "-0.5"},
        {"until": "2.3e-8"},
        {"since": "0001-01-01T00:00:00+10:00"},
        {"cursor": "nonsense"},
        {"cursor": "é"},
        {"cursor": "QAAAAAAAAAAAAAAAAAAAAQ"},
        {"cursor": "x" * 65},
        {"type": ""},
        {"customer": "x" * 256},
        {"object_id": "a\0b"},
    ],
    ids=str,
)
async def test_a_filter_that_makes_no_sense_is_422_in_the_documented_shape(
    params: dict[str, str], quiet_client: httpx.AsyncClient
) -> None:
    answer = await quiet_client.get(f"{PREFIX}/events", params=params, headers=ADMIN)
    assert answer.status_code == 422
    assert all({"loc", "msg", "type"} <= set(problem) for problem in answer.json()["detail"])


# ── GET /events/failed/list ───────────────────────────────────────────────────────────────────────────────


async def test_failed_events_are_listed_newest_first_with_their_last_error(
    client: httpx.AsyncClient, db: Connection
) -> None:
    @handlers.on("order.shipped")
    async def failing(event: Event, db: Connection) -> None:
        if event.attempt < 5:
            raise handlers.Retry(after=0)
        raise LookupError(f"no order of {event.id}, try {event.attempt}")

    for event_id in ("evt_1", "evt_2"):
        await deliver(client, event_json(event_id, "order.shipped", {"id": f"or_{event_id}", "object": "order"}))

    async def both_dead() -> Any:
        said = await ask(client, "/events/failed/list")
        return said if said["count"] == 2 and not any(event["next_try_at"] for event in said["events"]) else None

    said = await until(both_dead)
    assert said["status"] == "success"
    assert [event["event_id"] for event in said["events"]] == ["evt_2", "evt_1"]
    newest = said["events"][0]
    assert (newest["event_type"], newest["status"], newest["object_id"]) == (
        "order.shipped",
        "failed",
        "or_evt_2",
    )
    assert (newest["retry_count"], newest["attempts"]) == (5, 5)
    assert (newest["error_type"], newest["error_message"]) == ("LookupError", "no order of evt_2, try 5")
    assert [event["event_id"] for event in (await ask(client, "/events/failed/list", limit=1))["events"]] == ["evt_2"]


async def test_no_failed_events_are_an_empty_list(quiet_client: httpx.AsyncClient) -> None:
    assert await ask(quiet_client, "/events/failed/list") == {"status": "success", "count": 0, "events": []}


# ── GET /events/{event_id} ────────────────────────────────────────────────────────────────────────────────


async def test_an_event_is_shown_with_its_payload_and_every_failed_try(
    client: httpx.AsyncClient, db: Connection
) -> None:
    @handlers.on("order.shipped")
    async def failing_twice(event: Event, db: Connection) -> None:
        if event.attempt < 3:
            raise handlers.Retry(0, f"try {event.attempt}")

    body = event_json("evt_1", "order.shipped", {"id": "or_1", "object": "order", "note": "a\0b"})
    await deliver(client, body)
    await settled(db, "evt_1", "processed")
    said = await ask(client, "/events/evt_1")
    assert said["payload"] == json.loads(body)
    assert (said["event_id"], said["status"], said["outcome"], said["attempts"]) == (
        "evt_1",
        "processed",
        "handled",
        3,
    )
    assert [(one["retry_count"], one["error_message"]) for one in said["failures"]] == [
        (1, "try 1"),
        (2, "try 2"),
    ]
    assert all("failing_twice" in one["traceback"] and one["fingerprint"] for one in said["failures"])


async def test_an_event_whose_body_is_past_retention_is_shown_without_it(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    await put(db, "evt_1")
    assert (await ask(quiet_client, "/events/evt_1"))["payload"] is None


@pytest.mark.parametrize(
    "payload",
    [
        '"data": {"object": {"note": "\\ud800"}}',
        '"data": ' + "[" * 400 + "]" * 400,
        '"data": {"object": {"n": 1e400}}',
        '"data": {"object": {"n": 123456789012345678901234567890}}',
        '"created": "0001-01-01T00:00:00+23:59"',
        '"created": "9999-12-31T23:59:59-23:59"',
    ],
    ids=[
        "half a surrogate pair",
        "400 deep",
        "beyond a float",
        "a large number",
        "before the year 1",
        "after 9999",
    ],
)
async def test_whatever_odd_thing_stripe_signed_can_be_looked_at(payload: str, quiet_client: httpx.AsyncClient) -> None:
    body = f'{{"id": "evt_1", "object": "event", "type": "x", {payload}}}'.encode()
    assert (await deliver(quiet_client, body)).status_code == 200
    assert (await ask(quiet_client, "/events"))["count"] == 1
    assert (await ask(quiet_client, "/events/evt_1"))["event_id"] == "evt_1"


@pytest.mark.parametrize("event_id", ["evt_unknown", "%00", "evt%00_1", "x" * 3000, "%ED%A0%80", "%27%22%3B--"])
async def test_an_unknown_event_is_404(event_id: str, quiet_client: httpx.AsyncClient, db: Connection) -> None:
    await put(db, "evt_1")
    for method, path in (("GET", f"/events/{event_id}"), ("POST", f"/events/{event_id}/retry")):
        answer = await quiet_client.request(method, PREFIX + path, headers=ADMIN)
        assert (answer.status_code, answer.json()) == (404, {"detail": "Event not found"})
