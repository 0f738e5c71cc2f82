"""Every answer of the contract, asked for over HTTP."""

import asyncio
import hmac
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI

from kamiyo import database, handlers, inbox
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import GUIDE_TYPES
from kamiyo.signature import sign
from kamiyo.web import create_app, create_router, doorkeeper, webhooks
from tests.conftest import (
    ADMIN,
    ADMIN_KEY,
    PREFIX,
    SECRET,
    Log,
    MakeSettings,
    NewDatabase,
    Served,
    deliver,
    event_json,
    fresh_id,
    noop,
    running_client,
    serving,
    settings_for,
    settled,
    signed,
    until,
)

STRIPE = f"{PREFIX}/stripe"

#: Every call of operators, with a path that reaches it.
ADMIN_CALLS = [
    ("GET", "/statistics"),
    ("GET", "/events"),
    ("GET", "/events/failed/list"),
    ("GET", "/events/evt_1"),
    ("POST", "/events/evt_1/retry"),
    ("POST", "/events/replay"),
    ("POST", "/cleanup"),
]


async def put(
    db: Connection,
    event_id: str | None = None,
    event_type: str = "charge.succeeded",
    *,
    status: str = "processed",
    age: timedelta = timedelta(0),
    **columns: Any,
) -> str:
    """An event of `age` in the ledger, as a worker would have left it."""
    values = {
        "event_id": event_id or fresh_id(),
        "event_type": event_type,
        "status": status,
        "created_at": datetime.now(UTC) - age,
        "stripe_created": datetime.now(UTC) - age,
        "lane": 1,
        "outcome": "handled" if status == "processed" else None,
        "processed_at": datetime.now(UTC) if status == "processed" else None,
        "failed_at": datetime.now(UTC) if status == "failed" else None,
        "next_try_at": None if status in ("processed", "failed") else datetime.now(UTC) - age,
        **columns,
    }
    places = ", ".join(f"${n}" for n in range(1, len(values) + 1))
    insert = f"INSERT INTO webhook_events ({', '.join(values)}) VALUES ({places})"  # noqa: S608 - names of ours
    await db.execute(insert, *values.values())
    return str(values["event_id"])


async def ask(client: httpx.AsyncClient, path: str, **params: Any) -> Any:
    """The JSON of an operator's GET that succeeds."""
    answer = await client.get(PREFIX + path, params=params, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ── POST /stripe ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_new_event_is_answered_200_once_it_is_committed(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    answer = await deliver(quiet_client, event_json("evt_1", "customer.subscription.updated"))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == {
        "status": "success",
        "message": "Event received",
        "event_id": "evt_1",
        "event_type": "customer.subscription.updated",
    }
    assert await db.fetchval("SELECT event_type FROM webhook_events") == "customer.subscription.updated"


async def test_an_endpoint_that_was_entered_with_a_slash_at_its_end_receives_as_well(
    quiet_client: httpx.AsyncClient, server: Served
) -> None:
    body = event_json("evt_1")
    answer = await quiet_client.post(f"{PREFIX}/stripe/", content=body, headers=signed(body))
    assert (answer.status_code, answer.json()["message"]) == (200, "Event received")
    async with httpx.AsyncClient(base_url=server.url) as client:  # with the protocol of `kamiyo serve`
        answer = await client.post(f"{PREFIX}/stripe/", content=body, headers=signed(body))
        assert (answer.status_code, answer.json()["message"]) == (200, "Event already processed")


async def test_a_copy_is_already_received_until_the_first_one_is_processed(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    handlers.on("order.shipped")(noop)
    body = event_json("evt_1", "order.shipped")
    assert (await deliver(quiet_client, body)).json()["message"] == "Event received"
    again = await deliver(quiet_client, body)
    assert (again.status_code, again.json()["message"]) == (200, "Event already received")
    await db.execute("UPDATE webhook_events SET status = 'processed', outcome = 'handled', next_try_at = NULL")
    late = await deliver(quiet_client, body)
    assert (late.status_code, late.json()["message"]) == (200, "Event already processed")


async def test_without_a_signature_the_answer_says_that_it_is_missing(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    answer = await quiet_client.post(STRIPE, content=event_json())
    assert (answer.status_code, answer.json()) == (400, {"detail": "Missing Stripe signature header"})
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == 0


@pytest.mark.parametrize(
    ("secret", "age", "spoil"),
    [
        ("whsec_of_someone_else", 0, None),
        (SECRET, 310, None),
        (SECRET, -310, None),
        (SECRET, 0, lambda header: header.replace("v1=", "v0=")),
        (SECRET, 0, lambda header: header[:-1]),
        (SECRET, 0, lambda header: "t=,v1="),
        (SECRET, 0, lambda header: "x" * 10_000),
    ],
    ids=["another secret", "too old", "too new", "no v1", "cut off", "empty", "long nonsense"],
)
async def test_a_signature_that_proves_nothing_is_invalid_and_the_answer_does_not_say_why(
    secret: str, age: int, spoil: Callable[[str], str] | None, quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    headers = signed(event_json("evt_1"), secret, time.time() - age)
    body = event_json("evt_1")
    headers["Stripe-Signature"] = sign(body, secret, int(time.time()) - age)
    if spoil:
        headers["Stripe-Signature"] = spoil(headers["Stripe-Signature"])
    answer = await quiet_client.post(STRIPE, content=body, headers=headers)
    assert (answer.status_code, answer.json()) == (400, {"detail": "Invalid signature"})
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == 0


@pytest.mark.parametrize("age", [290, -290])
async def test_a_clock_that_is_off_by_less_than_five_minutes_does_no_harm(
    age: int, quiet_client: httpx.AsyncClient
) -> None:
    body = event_json()
    answer = await quiet_client.post(STRIPE, content=body, headers=signed(body, at=time.time() - age))
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not JSON",
        b"[]",
        b'{"object":"event","type":"x"}',
        b'{"object":"event","id":"evt_1"}',
        b'{"object":"customer","id":"evt_1","type":"x"}',
        b'{"object":"event","id":"evt_1","type":"x"',
    ],
)
async def test_what_stripe_signed_but_is_no_event_is_an_invalid_payload(
    body: bytes, quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    answer = await deliver(quiet_client, body)
    assert (answer.status_code, answer.json()) == (400, {"detail": "Invalid payload"})
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == 0


async def test_a_body_of_the_limit_is_taken_and_one_byte_more_is_not(
    database_url: str, settings: MakeSettings, db: Connection
) -> None:
    async with running_client(create_app(settings(KAMIYO_MAX_BODY_BYTES=5000))) as client:
        room = 5000 - len(event_json("evt_1", note=""))
        assert (await deliver(client, event_json("evt_1", note="x" * room))).status_code == 200
        answer = await deliver(client, event_json("evt_2", note="x" * (room + 1)))
        assert (answer.status_code, answer.json()) == (413, {"detail": "Payload too large"})
        assert await db.fetchval("SELECT array_agg(event_id) FROM webhook_events") == ["evt_1"]


async def test_the_limit_is_a_mebibyte_unless_set(quiet_client: httpx.AsyncClient) -> None:
    room = 1_048_576 - len(event_json("evt_1", note=""))
    assert (await deliver(quiet_client, event_json("evt_1", note="x" * room))).status_code == 200
    assert (await deliver(quiet_client, event_json("evt_2", note="x" * (room + 1)))).status_code == 413


async def test_of_a_body_that_has_no_length_no_more_is_read_than_the_limit(quiet_client: httpx.AsyncClient) -> None:
    read = 0

    async def long() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 65_536
            yield b"x" * 65_536

    answer = await quiet_client.post(STRIPE, content=long(), headers={"Stripe-Signature": "t=1,v1=00"})
    assert answer.status_code == 413
    assert read <= 1_048_576 + 2 * 65_536


def test_a_body_that_says_it_is_too_long_is_refused_unread_and_the_connection_closed(server: Served) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            f"POST {STRIPE} HTTP/1.1\r\nHost: kamiyo\r\nStripe-Signature: t=1,v1=00\r\n"
            "Content-Length: 1048577\r\n\r\n".encode()
        )
        # Not a byte of the body was sent, and still there is an answer, and then the end.
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()
    assert answer.endswith(b'{"detail":"Payload too large"}')


async def test_a_body_that_trickles_is_given_up(
    quiet_client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "BODY_SECONDS", 0.05)

    async def trickling() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    answer = await quiet_client.post(STRIPE, content=trickling(), headers={"Stripe-Signature": "t=1,v1=00"})
    assert (answer.status_code, answer.json()) == (408, {"detail": "Request body came too slowly"})
    assert answer.headers["connection"] == "close"


async def test_a_body_of_which_nothing_comes_is_given_up_as_well(
    quiet_client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "BODY_SECONDS", 0.05)

    async def silent() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    answer = await quiet_client.post(STRIPE, content=silent(), headers={"Stripe-Signature": "t=1,v1=00"})
    assert (answer.status_code, answer.json()) == (408, {"detail": "Request body came too slowly"})


async def test_a_client_that_leaves_before_its_body_is_complete_gets_no_answer_and_leaves_nothing(
    database_url: str, settings: MakeSettings, db: Connection
) -> None:
    app = create_app(settings(KAMIYO_WORKER=False))
    body = event_json("evt_1")
    headers = [(b"stripe-signature", sign(body, SECRET, int(time.time())).encode())]
    messages = [{"type": "http.request", "body": body, "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": STRIPE,
        "headers": headers,
        "query_string": b"",
        "root_path": "",
    }
    async with app.router.lifespan_context(app):
        await app(scope, receive, send)
    assert sent == []
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == 0


async def test_while_no_secret_is_configured_stripe_is_told_to_come_again(
    database_url: str, settings: MakeSettings
) -> None:
    async with running_client(create_app(settings(STRIPE_WEBHOOK_SECRET=""))) as client:
        answer = await deliver(client, event_json())
    assert (answer.status_code, answer.json()) == (503, {"detail": "Webhook secret not configured"})
    assert int(answer.headers["retry-after"]) > 0


async def test_while_the_database_is_away_stripe_is_told_to_come_again_and_health_is_unhealthy(
    settings: MakeSettings,
) -> None:
    url = "postgresql://nobody@/nothing?host=/nonexistent"
    away = settings_for(url, KAMIYO_COMMIT_TIMEOUT=0.3, KAMIYO_SHUTDOWN_GRACE=0.1)
    async with running_client(create_app(away)) as client:
        answer = await deliver(client, event_json())
        assert (answer.status_code, answer.json()) == (503, {"detail": "Database unavailable"})
        assert int(answer.headers["retry-after"]) > 0
        health = await client.get(f"{PREFIX}/health")
        assert (health.status_code, health.json()["status"], health.json()["webhook_system"]) == (
            503,
            "unhealthy",
            "down",
        )
        for method, path in ADMIN_CALLS:
            refused = await client.request(method, PREFIX + path, headers=ADMIN)
            assert (refused.status_code, refused.json()) == (503, {"detail": "Database unavailable"}), path
            assert int(refused.headers["retry-after"]) > 0
        assert "webhook_database_up 0.0" in (await client.get("/metrics")).text


async def test_when_the_database_is_taken_away_every_call_says_so_and_none_is_an_error_of_ours(
    new_database: NewDatabase, postgres: str
) -> None:
    url = new_database()
    async with running_client(create_app(settings_for(url))) as client:
        assert (await deliver(client, event_json("evt_1"))).status_code == 200
        other = await database.connect(postgres, application="test")
        await other.execute(f"DROP DATABASE {urlsplit(url).path[1:]} WITH (FORCE)")
        await other.close()

        # At most one call meets the connection that was cut; each of them is answered, and none with a 2xx.
        for _ in range(3):
            answer = await deliver(client, event_json())
            assert (answer.status_code, answer.json()) == (503, {"detail": "Database unavailable"})
            assert (await client.get(f"{PREFIX}/health")).status_code == 503
            assert (await client.get(f"{PREFIX}/events", headers=ADMIN)).status_code == 503


async def test_before_the_application_has_started_the_answer_is_503(settings: MakeSettings) -> None:
    app = create_app(settings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://kamiyo") as client:
        answer = await deliver(client, event_json())
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
        assert (await client.get(f"{PREFIX}/health")).status_code == 503
        assert (await client.get(f"{PREFIX}/events", headers=ADMIN)).status_code == 503


@pytest.mark.parametrize(
    ("event_type", "obj"),
    [
        ("charge.succeeded", {"id": "ch_1", "object": "charge"}),
        ("invoice.upcoming", {"object": "invoice", "customer": "cus_1"}),
        ("something.stripe.invents.tomorrow", {"id": "x_1", "object": "x"}),
        ("customer.updated", {"object": "customer"}),
        ("charge.succeeded", {}),
    ],
)
async def test_what_nobody_asked_for_is_stored_and_ends_ignored(
    event_type: str, obj: dict[str, Any], client: httpx.AsyncClient, db: Connection
) -> None:
    answer = await deliver(client, event_json("evt_1", event_type, obj))
    assert (answer.status_code, answer.json()["message"]) == (200, "Event received")
    row = await settled(db, "evt_1")
    assert (row["status"], row["outcome"]) == ("processed", "ignored")


async def test_an_event_that_a_foreign_object_is_in_is_ignored_by_the_billing_tables(
    client: httpx.AsyncClient, db: Connection
) -> None:
    await deliver(client, event_json("evt_1", "customer.updated", {"id": "prod_1", "object": "product", "created": 1}))
    assert (await settled(db, "evt_1"))["outcome"] == "ignored"
    assert await db.fetchval("SELECT count(*) FROM billing.customers") == 0


async def test_any_of_several_secrets_may_have_signed(database_url: str, settings: MakeSettings) -> None:
    app = create_app(settings(STRIPE_WEBHOOK_SECRET="whsec_new, whsec_old"))
    async with running_client(app) as client:
        for secret, status in (
            ("whsec_new", 200),
            ("whsec_old", 200),
            ("whsec_new, whsec_old", 400),
            (SECRET, 400),
        ):
            body = event_json()
            answer = await client.post(STRIPE, content=body, headers=signed(body, secret))
            assert answer.status_code == status


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
async def test_only_post_is_received(method: str, quiet_client: httpx.AsyncClient) -> None:
    answer = await quiet_client.request(method, STRIPE)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


# ── GET /health ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_new_system_is_healthy_in_the_guides_own_words(quiet_client: httpx.AsyncClient) -> None:
    answer = await quiet_client.get(f"{PREFIX}/health")
    assert answer.status_code == 200
    assert list(answer.json().items()) == [
        ("status", "healthy"),
        ("webhook_system", "operational"),
        ("events_last_24h", 0),
        ("failed_events_last_24h", 0),
        ("supported_event_types", 10),
    ]


@pytest.mark.parametrize(
    ("failed", "of", "status", "code"),
    [
        (0, 10, "healthy", 200),
        (1, 10, "healthy", 200),
        (2, 19, "degraded", 200),
        (2, 10, "degraded", 200),
        (3, 14, "unhealthy", 503),
        (1, 1, "unhealthy", 503),
    ],
)
async def test_health_goes_by_the_share_of_the_last_24_hours_that_failed(
    failed: int, of: int, status: str, code: int, quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    for n in range(of):
        await put(db, status="failed" if n < failed else "processed")
    # Longer ago than a day: none of today's business.
    for _ in range(20):
        await put(db, status="failed", age=timedelta(hours=25))
    answer = await quiet_client.get(f"{PREFIX}/health")
    said = answer.json()
    assert (said["status"], answer.status_code) == (status, code)
    assert (said["events_last_24h"], said["failed_events_last_24h"]) == (of, failed)
    assert said["webhook_system"] == ("operational" if status == "healthy" else "degraded")


@pytest.mark.parametrize(("waited", "status"), [(290, "healthy"), (310, "degraded")])
async def test_health_is_degraded_while_an_event_has_waited_for_more_than_five_minutes(
    waited: int, status: str, quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    await put(db, status="pending", age=timedelta(seconds=waited))
    assert (await quiet_client.get(f"{PREFIX}/health")).json()["status"] == status


async def test_an_event_that_waits_for_its_next_try_is_not_late(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    for _ in range(10):
        await put(db)
    await put(db, status="failed", age=timedelta(hours=1), next_try_at=datetime.now(UTC) + timedelta(minutes=30))
    assert (await quiet_client.get(f"{PREFIX}/health")).json()["status"] == "healthy"


# ── GET /live and /ready ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_process_is_ready_while_it_can_verify_and_commit(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    # Even when everything fails: another process would not do better, and Stripe's deliveries must come in.
    await put(db, status="failed")
    answer = await quiet_client.get(f"{PREFIX}/ready")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
    assert (await quiet_client.get(f"{PREFIX}/live")).json() == {"status": "alive"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"STRIPE_WEBHOOK_SECRET": ""}, "Webhook secret not configured"),
        ({"DATABASE_URL": "postgresql://nobody@/nothing?host=/nonexistent"}, "Database unavailable"),
    ],
    ids=["no secret", "no database"],
)
async def test_a_process_that_cannot_take_deliveries_is_alive_and_not_ready(
    changes: dict[str, str], said: str, database_url: str, settings: MakeSettings
) -> None:
    app = create_app(settings(KAMIYO_WORKER=False, KAMIYO_SHUTDOWN_GRACE=0.1, **changes))
    async with running_client(app) as client:
        answer = await client.get(f"{PREFIX}/ready")
        assert (answer.status_code, answer.json()) == (503, {"detail": said})
        assert (await client.get(f"{PREFIX}/live")).status_code == 200


# ── GET /supported-events ─────────────────────────────────────────────────────────────────────────────────


async def test_the_ten_of_the_guide_are_supported_and_what_handlers_add(
    quiet_client: httpx.AsyncClient,
) -> None:
    answer = await quiet_client.get(f"{PREFIX}/supported-events")
    assert answer.json() == {"status": "success", "supported_events": list(GUIDE_TYPES), "count": 10}
    handlers.on("invoice.paid")(noop)
    answer = await quiet_client.get(f"{PREFIX}/supported-events")
    assert answer.json()["supported_events"] == [*GUIDE_TYPES, "invoice.paid"]
    assert answer.json()["count"] == 11
    assert (await quiet_client.get(f"{PREFIX}/health")).json()["supported_event_types"] == 11


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


# ── POST /events/{event_id}/retry ─────────────────────────────────────────────────────────────────────────


async def test_a_dead_event_runs_again_with_five_new_tries(client: httpx.AsyncClient, db: Connection) -> None:
    repaired = False

    @handlers.on("order.shipped")
    async def failing(event: Event, db: Connection) -> None:
        if not repaired:
            raise handlers.Bury("out of order")

    await deliver(client, event_json("evt_1", "order.shipped"))
    await settled(db, "evt_1", "failed")
    repaired = True
    answer = await client.post(f"{PREFIX}/events/evt_1/retry", headers=ADMIN)
    assert answer.status_code == 200
    assert answer.json() == {"status": "success", "message": "Event queued for retry", "event_id": "evt_1"}
    row = await settled(db, "evt_1", "processed")
    assert (row["outcome"], row["attempts"]) == ("handled", 1)
    assert await db.fetchval("SELECT action || ' ' || count FROM webhook_audit") == "retry 1"


@pytest.mark.parametrize("status", ["pending", "processing", "processed"])
async def test_only_a_failed_event_is_run_again(status: str, quiet_client: httpx.AsyncClient, db: Connection) -> None:
    await put(db, "evt_1", status=status)
    answer = await quiet_client.post(f"{PREFIX}/events/evt_1/retry", headers=ADMIN)
    assert (answer.status_code, answer.json()) == (409, {"detail": "Event is not failed"})
    assert await db.fetchval("SELECT status FROM webhook_events") == status
    assert await db.fetchval("SELECT count(*) FROM webhook_audit") == 0


# ── POST /events/replay ───────────────────────────────────────────────────────────────────────────────────


async def test_a_replay_is_counted_first_then_done_and_written_down(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    for n in range(4):
        await put(db, f"evt_f{n}", "invoice.paid" if n else "charge.failed", status="failed")
    await put(db, "evt_ok", "invoice.paid")

    async def replay(**params: Any) -> Any:
        answer = await quiet_client.post(f"{PREFIX}/events/replay", params=params, headers=ADMIN)
        assert answer.status_code == 200
        return answer.json()

    dry = await replay(type="invoice.paid", dry_run="true")
    assert dry == {"status": "success", "dry_run": True, "matched_count": 3, "replayed_count": 0}
    assert await db.fetchval("SELECT count(*) FROM webhook_events WHERE status = 'failed'") == 4
    assert await db.fetchval("SELECT count(*) FROM webhook_audit") == 0

    done = await replay(type="invoice.paid")
    assert done == {"status": "success", "dry_run": False, "matched_count": 3, "replayed_count": 3}
    rows = await db.fetch("SELECT event_id, status, attempts FROM webhook_events ORDER BY event_id")
    assert [tuple(row) for row in rows] == [
        ("evt_f0", "failed", 0),
        *((f"evt_f{n}", "pending", 0) for n in (1, 2, 3)),
        ("evt_ok", "processed", 0),
    ]
    action, filters, count = tuple(*await db.fetch("SELECT action, filters, count FROM webhook_audit"))
    assert (action, json.loads(filters), count) == ("replay", {"status": "failed", "type": "invoice.paid"}, 3)

    assert (await replay(status="processed"))["replayed_count"] == 1
    assert await db.fetchval("SELECT status FROM webhook_events WHERE event_id = 'evt_ok'") == "pending"


async def test_a_replay_of_more_than_one_chunk_takes_each_once(
    quiet_client: httpx.AsyncClient, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "CHUNK", 3)
    for _ in range(10):
        await put(db, status="processed")
    answer = await quiet_client.post(f"{PREFIX}/events/replay", params={"status": "processed"}, headers=ADMIN)
    assert answer.json()["replayed_count"] == 10


async def test_a_replay_can_go_by_the_cause_of_the_failure(quiet_client: httpx.AsyncClient, db: Connection) -> None:
    for event_id, fingerprint in (("evt_1", "aaaa"), ("evt_2", "bbbb"), ("evt_3", "aaaa")):
        await put(db, event_id, status="failed")
        await db.execute(
            "INSERT INTO webhook_failures "
            "(event_id, event_type, retry_count, error_type, error_message, fingerprint) "
            "VALUES ($1, 'x', 1, 'E', 'e', $2)",
            *(event_id, fingerprint),
        )
    answer = await quiet_client.post(f"{PREFIX}/events/replay", params={"fingerprint": "aaaa"}, headers=ADMIN)
    assert answer.json()["replayed_count"] == 2
    assert await db.fetchval("SELECT status FROM webhook_events WHERE event_id = 'evt_2'") == "failed"


async def test_a_replay_of_the_dead_leaves_those_alone_that_run_again_by_themselves(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    await put(db, "evt_dead", status="failed")
    await put(db, "evt_retrying", status="failed", next_try_at=datetime.now(UTC) + timedelta(hours=1))
    for status, left in (("dead", ["evt_retrying"]), ("retrying", [])):
        answer = await quiet_client.post(f"{PREFIX}/events/replay", params={"status": status}, headers=ADMIN)
        assert answer.json()["replayed_count"] == 1
        failed = await db.fetch("SELECT event_id FROM webhook_events WHERE status = 'failed'")
        assert [event_id for (event_id,) in failed] == left
    audited = await db.fetch("SELECT filters FROM webhook_audit ORDER BY id")
    assert [json.loads(filters) for (filters,) in audited] == [{"status": "dead"}, {"status": "retrying"}]


@pytest.mark.parametrize("status", ["pending", "unread", "processing", "anything"])
async def test_a_replay_of_what_is_not_finished_is_refused(status: str, quiet_client: httpx.AsyncClient) -> None:
    answer = await quiet_client.post(f"{PREFIX}/events/replay", params={"status": status}, headers=ADMIN)
    assert answer.status_code == 422


# ── POST /cleanup ─────────────────────────────────────────────────────────────────────────────────────────


async def test_cleanup_removes_old_processed_events_and_never_touches_any_other(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    for status in ("pending", "processing", "processed", "failed"):
        await put(db, f"evt_old_{status}", status=status, age=timedelta(days=31))
        await put(db, f"evt_new_{status}", status=status, age=timedelta(days=29))
    answer = await quiet_client.post(f"{PREFIX}/cleanup", headers=ADMIN)
    assert answer.json() == {"status": "success", "deleted_count": 1, "older_than_days": 30}
    left = {event_id for (event_id,) in await db.fetch("SELECT event_id FROM webhook_events")}
    assert "evt_old_processed" not in left
    assert len(left) == 7
    answer = await quiet_client.post(f"{PREFIX}/cleanup", params={"days": 1}, headers=ADMIN)
    assert answer.json() == {"status": "success", "deleted_count": 1, "older_than_days": 1}
    rows = await db.fetch("SELECT action, filters, count FROM webhook_audit ORDER BY id")
    assert [(row["action"], json.loads(row["filters"]), row["count"]) for row in rows] == [
        ("cleanup", {"days": 30}, 1),
        ("cleanup", {"days": 1}, 1),
    ]


async def test_cleanup_takes_the_bodies_along_and_a_late_copy_is_still_a_duplicate(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    body = event_json("evt_1")
    await deliver(quiet_client, body)
    # Both carry the moment of the commit; the body's names its partition.
    await db.execute("UPDATE webhook_events SET created_at = created_at - interval '1 day'")
    await db.execute("UPDATE webhook_payloads SET created_at = created_at - interval '1 day'")
    await quiet_client.post(f"{PREFIX}/cleanup", params={"days": 1}, headers=ADMIN)
    assert await db.fetchval("SELECT count(*) FROM webhook_payloads") == 0
    assert (await deliver(quiet_client, body)).json()["message"] == "Event already processed"
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == 0


@pytest.mark.parametrize(
    "reason", ["deadlock_detected", "serialization_failure", "lock_not_available", "query_canceled"]
)
async def test_a_call_that_postgresql_ends_for_the_sake_of_others_is_answered_503_and_goes_well_the_next_time(
    reason: str, quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    await put(db, "evt_1", age=timedelta(days=31))
    await db.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION USING ERRCODE = '{reason}'; END $$;"
        "CREATE TRIGGER refuse BEFORE DELETE ON webhook_events FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    try:
        answer = await quiet_client.post(f"{PREFIX}/cleanup", headers=ADMIN)
    finally:
        await db.execute("DROP FUNCTION refuse CASCADE")
    assert (answer.status_code, answer.json()) == (503, {"detail": "Database unavailable"})
    answer = await quiet_client.post(f"{PREFIX}/cleanup", headers=ADMIN)
    assert answer.json()["deleted_count"] == 1


@pytest.mark.parametrize("days", ["0", "-1", "3651", "x"])
async def test_cleanup_of_everything_at_once_cannot_be_asked_for(days: str, quiet_client: httpx.AsyncClient) -> None:
    answer = await quiet_client.post(f"{PREFIX}/cleanup", params={"days": days}, headers=ADMIN)
    assert answer.status_code == 422


# ── X-Admin-Key ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_penalty(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that wrong keys would have had to wait, which they do not."""
    waits: list[float] = []

    class Clock:
        @staticmethod
        async def sleep(seconds: float) -> None:
            waits.append(seconds)

    monkeypatch.setattr(doorkeeper, "asyncio", Clock)
    return waits


KEYS = [{}, {"X-Admin-Key": ""}, {"X-Admin-Key": "wrong"}, {"X-Admin-Key": ADMIN_KEY + "x"}]


@pytest.mark.parametrize("headers", KEYS, ids=["none", "empty", "wrong", "longer"])
async def test_without_the_key_no_operators_call_is_answered(
    headers: dict[str, str], quiet_client: httpx.AsyncClient, db: Connection, no_penalty: list[float]
) -> None:
    await put(db, "evt_1", "invoice.paid", status="failed", age=timedelta(days=40))
    for method, path in ADMIN_CALLS:
        # Wrong parameters too: who may not ask learns nothing of what could be asked.
        for params in ({}, {"days": "x", "limit": "x", "status": "x"}):
            answer = await quiet_client.request(method, PREFIX + path, headers=headers, params=params)
            assert (answer.status_code, answer.json()) == (401, {"detail": "Invalid admin API key"}), path
            assert "invoice.paid" not in answer.text
    assert await db.fetchval("SELECT status FROM webhook_events") == "failed"


@pytest.mark.parametrize("headers", KEYS, ids=["none", "empty", "wrong", "longer"])
async def test_while_no_key_is_set_the_door_is_shut_and_not_open(
    headers: dict[str, str], database_url: str, settings: MakeSettings
) -> None:
    async with running_client(create_app(settings(ADMIN_API_KEY="", KAMIYO_WORKER=False))) as client:
        for method, path in ADMIN_CALLS:
            answer = await client.request(method, PREFIX + path, headers=headers)
            assert (answer.status_code, answer.json()) == (503, {"detail": "Admin API key not configured"})


async def test_every_operators_call_is_guarded(quiet_client: httpx.AsyncClient) -> None:
    paths = (await quiet_client.get("/openapi.json")).json()["paths"]
    open_to_all = {
        *(f"{PREFIX}/{name}" for name in ("stripe", "eventbridge", "eventgrid")),
        *(f"{PREFIX}/{name}" for name in ("health", "live", "ready", "supported-events")),
        "/metrics",
    }
    guarded = {
        (method.upper(), path)
        for path, methods in paths.items()
        for method, call in methods.items()
        if any(parameter["name"].lower() == "x-admin-key" for parameter in call.get("parameters", []))
    }
    assert {path for _, path in guarded} == set(paths) - open_to_all
    assert guarded == {(method, PREFIX + path.replace("evt_1", "{event_id}")) for method, path in ADMIN_CALLS}


async def test_the_key_is_compared_in_constant_time(
    quiet_client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    honest = hmac.compare_digest

    def noting(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return honest(one, other)

    monkeypatch.setattr(hmac, "compare_digest", noting)
    await quiet_client.get(f"{PREFIX}/events", headers={"X-Admin-Key": "wrong"})
    await quiet_client.get(f"{PREFIX}/events", headers=ADMIN)
    # Each twice: as it is typed into a form, and as a header carries it.
    assert compared == [(ADMIN_KEY.encode(), b"wrong")] * 2 + [(ADMIN_KEY.encode(), ADMIN_KEY.encode())] * 2


async def test_guessing_gets_slower_and_slower_and_the_right_key_never_waits(
    quiet_client: httpx.AsyncClient, no_penalty: list[float]
) -> None:
    for _ in range(12):
        await quiet_client.get(f"{PREFIX}/events", headers={"X-Admin-Key": "wrong"})
    assert no_penalty == sorted(no_penalty)
    assert (len(no_penalty), no_penalty[-1]) == (12, 5)
    assert no_penalty[0] < 0.1
    assert (await quiet_client.get(f"{PREFIX}/events", headers=ADMIN)).status_code == 200
    assert len(no_penalty) == 12


async def test_what_operators_see_is_kept_by_no_cache_and_shown_in_no_frame(
    quiet_client: httpx.AsyncClient,
) -> None:
    for method, path in ADMIN_CALLS:
        answer = await quiet_client.request(method, PREFIX + path, headers=ADMIN)
        assert answer.headers["cache-control"] == "no-store", path
        assert answer.headers["x-content-type-options"] == "nosniff", path
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"], path


# ── The root ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_metrics_are_at_the_root_in_prometheus_text(quiet_client: httpx.AsyncClient) -> None:
    answer = await quiet_client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "# TYPE webhook_events_total counter" in answer.text
    assert "# TYPE webhook_processing_duration_seconds histogram" in answer.text


async def test_metrics_can_be_turned_off(database_url: str, settings: MakeSettings) -> None:
    async with running_client(create_app(settings(KAMIYO_METRICS=False))) as client:
        assert (await client.get("/metrics")).status_code == 404


async def test_the_documentation_has_the_summary_the_models_and_the_errors_of_every_call(
    quiet_client: httpx.AsyncClient,
) -> None:
    assert (await quiet_client.get("/docs")).status_code == 200
    document = (await quiet_client.get("/openapi.json")).json()
    assert document["info"]["title"] == "Kamiyo API"
    errors = {
        f"{PREFIX}/stripe": {"400", "408", "413", "503"},
        f"{PREFIX}/health": {"503"},
        f"{PREFIX}/ready": {"503"},
        f"{PREFIX}/live": set(),
        f"{PREFIX}/events/{{event_id}}": {"401", "404", "503"},
        f"{PREFIX}/events/{{event_id}}/retry": {"401", "404", "409", "503"},
        f"{PREFIX}/supported-events": set(),
        "/metrics": set(),
    }
    of_roads = {"400", "401", "408", "413", "503"}
    errors |= {f"{PREFIX}/eventbridge": of_roads, f"{PREFIX}/eventgrid": of_roads}
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            assert call["summary"] and call["description"] and call["tags"], path
            answers = call["responses"]
            if method == "options":
                assert {"403", "503"} <= set(answers), path
                continue
            assert errors.get(path, {"401", "503"}) <= set(answers), path
            for status, answer in answers.items():
                [content] = answer["content"].values()
                if path != "/metrics":
                    assert "$ref" in content["schema"], (path, status)
                assert answer["description"], (path, status)


# ── The seams of the guide ────────────────────────────────────────────────────────────────────────────────

FULL_EXAMPLE = """\
from fastapi import FastAPI
from api.webhooks.routes import router as webhook_router

app = FastAPI(title="Kamiyo API")

# Include webhook routes
app.include_router(webhook_router)

# Your other routes...
"""


def test_the_guides_full_example_is_a_whole_integration(
    database_url: str, tmp_path: Any, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "their_app.py").write_text(
        FULL_EXAMPLE + '\n@app.get("/theirs")\ndef theirs() -> str:\n    return "ok"\n'
    )
    with (
        serving(database_url, application="their_app:app", folder=tmp_path) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        body = event_json("evt_1")
        assert client.post(STRIPE, content=body, headers=signed(body)).json()["message"] == "Event received"
        assert client.get(f"{PREFIX}/health").json()["events_last_24h"] == 1
        assert client.get("/theirs").json() == "ok"
        assert "webhook_received_total" in client.get("/metrics").text


def test_api_main_is_the_kamiyo_api(server: Served) -> None:
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/openapi.json").json()["info"]["title"] == "Kamiyo API"
        health = client.get(f"{PREFIX}/health")
        assert (health.status_code, health.json()["status"]) == (200, "healthy")


async def test_the_router_brings_its_own_lifespan_beside_the_hosts(
    database_url: str, settings: MakeSettings, db: Connection
) -> None:
    handlers.on("order.shipped")(noop)
    host = FastAPI()
    host.include_router(create_router(settings()))
    async with running_client(host) as client:
        await deliver(client, event_json("evt_1", "order.shipped"))
        assert (await settled(db, "evt_1"))["outcome"] == "handled"
    # The second start of one application, as with a reloading test client, is as good as the first.
    async with running_client(host) as client:
        await deliver(client, event_json("evt_2", "order.shipped"))
        assert (await settled(db, "evt_2"))["outcome"] == "handled"
    # A session is on the list for a moment after its client has said goodbye.
    await until(
        lambda: db.fetchval(
            "SELECT count(*) = 0 FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name LIKE 'kamiyo%'"
        )
    )


@pytest.mark.parametrize("routers", ["the same", "another"])
async def test_a_router_that_is_included_twice_starts_one_system_and_answers_at_both_places(
    routers: str, database_url: str, settings: MakeSettings, db: Connection, log: Log
) -> None:
    first = create_router(settings())
    second = first if routers == "the same" else create_router(settings())
    host = FastAPI()
    host.include_router(first)
    host.include_router(second, prefix="/pay")
    for turn in range(2):
        async with running_client(host) as client:
            for place in ("", "/pay"):
                body = event_json(f"evt_{turn}{place.removeprefix('/')}")
                answer = await client.post(f"{place}{STRIPE}", content=body, headers=signed(body))
                assert answer.json()["message"] == "Event received"
                assert (await client.get(f"{place}{PREFIX}/ready")).status_code == 200
    assert [line["event"] for line in log() if line["event"] in ("started", "stopped")] == 2 * ["started", "stopped"]
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == 4


async def test_routers_with_different_settings_have_a_system_each(
    database_url: str, settings: MakeSettings, log: Log
) -> None:
    host = FastAPI()
    host.include_router(create_router(settings()))
    host.include_router(create_router(settings(STRIPE_WEBHOOK_SECRET="whsec_other")), prefix="/other")
    async with running_client(host) as client:
        for place, secret in (("", SECRET), ("/other", "whsec_other")):
            body = event_json()
            assert (await client.post(f"{place}{STRIPE}", content=body, headers=signed(body, secret))).is_success
            assert not (
                await client.post(f"{place}{STRIPE}", content=body, headers=signed(body, "whsec_no"))
            ).is_success
    assert len([line for line in log() if line["event"] == "started"]) == 2
