"""`POST /stripe`: what is taken and what is refused, with which answer, and what is stored of it."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from kamiyo import database, handlers
from kamiyo.database import Connection
from kamiyo.signature import sign
from kamiyo.web import create_app, webhooks
from tests.conftest import (
    ADMIN,
    PREFIX,
    SECRET,
    MakeSettings,
    NewDatabase,
    Served,
    deliver,
    event_json,
    noop,
    running_client,
    settings_for,
    settled,
    signed,
)
from tests.contract.conftest import ADMIN_CALLS, STRIPE


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
