"""Whatever is asked, and whatever is sent: an answer of the contract, no error of ours, and nothing written.

The documented calls are asked everything that schemathesis thinks of, over a socket; the receiving call gets
any bytes with any headers in any pieces.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance

from kamiyo import database, handlers
from kamiyo.database import Connection
from kamiyo.handlers import GUIDE_TYPES
from kamiyo.signature import sign
from kamiyo.web import create_app
from tests.conftest import (
    ADMIN,
    PREFIX,
    ROAD_KEY,
    ROOT,
    SECRET,
    NewDatabase,
    Served,
    deliver,
    event_json,
    fresh_id,
    noop,
    rows_written,
    run_apart,
    serving,
    settings_for,
    signed,
    until,
)

STRIPE = f"{PREFIX}/stripe"
OBJECTS = [json.loads(path.read_text()) for path in sorted(Path(ROOT, "kamiyo/simulator/objects").glob("*.json"))]

document = schemathesis.openapi.from_dict(create_app(settings_for(None)).openapi())


# ── The documented calls ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def fuzzed(new_database: NewDatabase) -> Iterator[tuple[Served, str]]:
    """A server for this file alone: what is asked of it here may clean up and replay whatever it likes."""
    url = new_database()
    twin = "whsec_of_the_twin"
    with serving(url, KAMIYO_WORKER="false", KAMIYO_LOG_LEVEL="error", STRIPE_SHADOW_WEBHOOK_SECRET=twin) as served:
        yield served, url


async def _events_in(url: str) -> int:
    db = await database.connect(url, application="test")
    try:
        return int(await db.fetchval("SELECT count(*) FROM webhook_events"))
    finally:
        await db.close()


@document.parametrize()
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_documented_call_keeps_to_its_document_whatever_is_asked(
    case: "schemathesis.Case[Any]", fuzzed: tuple[Served, str]
) -> None:
    served, _ = fuzzed
    # An id that the case itself made up for the header would only be told that it is wrong.
    case.headers["X-Admin-Key"] = ADMIN["X-Admin-Key"]
    case.headers["X-Api-Key"] = ROAD_KEY
    answer = case.call(base_url=served.url, timeout=20)
    # Data that fits the schema is refused all the same where nothing proves that it is Stripe's.
    case.validate_response(answer, excluded_checks=[positive_data_acceptance])


def test_and_nothing_of_it_was_stored(fuzzed: tuple[Served, str]) -> None:
    assert run_apart(_events_in(fuzzed[1])) == 0


@given(st.binary(max_size=2000))
@example(b"GET / HTTP/9.9\r\n\r\n")
@example(b"POST /api/v1/webhooks/stripe HTTP/1.1\r\nHost: k\r\nContent-Length: -1\r\n\r\n")
@example(b"POST /api/v1/webhooks/stripe HTTP/1.1\r\nHost: k\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
@hypothesis_settings(max_examples=25)
def test_a_server_survives_whatever_comes_in_by_its_socket(fuzzed: tuple[Served, str], noise: bytes) -> None:
    served, _ = fuzzed
    host, port = served.url.removeprefix("http://").split(":")
    with (
        contextlib.suppress(ConnectionError),
        socket.create_connection((host, int(port)), timeout=20) as connection,
    ):
        connection.sendall(noise)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65_536):
            pass
    assert httpx.get(f"{served.url}{PREFIX}/health").status_code == 200


# ── The receiving call ────────────────────────────────────────────────────────────────────────────────────

ANSWERS = {
    (400, b'{"detail":"Missing Stripe signature header"}'),
    (400, b'{"detail":"Invalid signature"}'),
}
forged_headers = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda secret, at: sign(b"{}", secret, at).encode(),
        st.sampled_from([SECRET, "whsec_wrong"]),
        st.integers(0, 2**40),
    ),
    st.from_regex(rb"\At=[0-9]{1,12}(,v[01]=[0-9a-f]{0,64}){0,20}\Z"),
)
names = st.from_regex(rb"\A[a-z0-9-]{1,20}\Z") | st.sampled_from([b"content-length", b"content-type", b"x-admin-key"])


@given(
    parts=st.lists(st.binary(max_size=300), max_size=4),
    signature=st.none() | forged_headers,
    headers=st.lists(st.tuples(names, st.binary(max_size=40)), max_size=4),
)
@example(parts=[b"{}"], signature=sign(b"{}", SECRET, 1).encode(), headers=[])
@example(parts=[b""], signature=b"", headers=[(b"content-length", b"\xb2")])
@hypothesis_settings(max_examples=300)
async def test_any_bytes_with_any_headers_are_refused_in_the_words_of_the_contract_and_nothing_is_written(
    quiet_client: httpx.AsyncClient,
    db: Connection,
    parts: list[bytes],
    signature: bytes | None,
    headers: list[tuple[bytes, bytes]],
) -> None:
    given_headers = [(name, value) for name, value in headers if name != b"stripe-signature"]
    if signature is not None:
        given_headers.insert(len(given_headers) // 2, (b"stripe-signature", signature))
    pieces: list[dict[str, Any]] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    pieces.append({"type": "http.request", "body": b"", "more_body": False})
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return pieces.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    transport = quiet_client._transport
    assert isinstance(transport, httpx.ASGITransport)
    scope = {"type": "http", "method": "POST", "path": STRIPE, "headers": given_headers, "query_string": b""}
    await transport.app({**scope, "root_path": ""}, receive, send)
    status, body = sent[0]["status"], sent[1]["body"]
    too_long = any(n == b"content-length" and v.isdigit() and int(v[:12]) > 1_048_576 for n, v in given_headers)
    assert (status, body) in ANSWERS or (too_long and status == 413)
    assert await rows_written(db) == {}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()))
@hypothesis_settings(max_examples=150)
async def test_whatever_stripe_signs_that_is_no_event_is_an_invalid_payload(
    quiet_client: httpx.AsyncClient, db: Connection, body: bytes
) -> None:
    answer = await deliver(quiet_client, body)
    assert (answer.status_code, answer.content) == (400, b'{"detail":"Invalid payload"}')
    assert await rows_written(db) == {}


@st.composite
def odd_objects(draw: st.DrawFn) -> dict[str, Any]:
    """One of Stripe's objects with some of its values replaced by anything."""
    subject = dict(draw(st.sampled_from(OBJECTS)))
    for name in draw(st.lists(st.sampled_from(sorted(subject)), max_size=4)):
        subject[name] = draw(json_values)
    # Customers of their own, so that the examples do not wait for one another.
    if draw(st.booleans()):
        subject["id"] = fresh_id("obj")
    return subject


odd_types = st.sampled_from([*GUIDE_TYPES, "invoice.paid", "invoice.voided", "customer.updated"]) | st.text(
    min_size=1, max_size=30
)


@given(
    event_type=odd_types.filter(lambda name: "\0" not in name),
    subject=odd_objects(),
    previous=st.none() | st.dictionaries(st.sampled_from(["customer", "status", "items"]), json_values, max_size=3),
    created=st.integers(-1, 2**40) | json_values,
)
@hypothesis_settings(max_examples=70)
async def test_whatever_event_stripe_signs_is_stored_settled_and_can_be_looked_at(
    client: httpx.AsyncClient,
    db: Connection,
    event_type: str,
    subject: dict[str, Any],
    previous: dict[str, Any] | None,
    created: Any,
) -> None:
    # Half of the ten go by the workers, half are projected on arrival.
    handlers.on(*GUIDE_TYPES[::2])(noop)
    event_id = fresh_id()
    body = event_json(event_id, event_type, subject, previous=previous)
    body = json.dumps({**json.loads(body), "created": created}).encode()
    answer = await deliver(client, body)
    assert (answer.status_code, answer.json()["message"]) == (200, "Event received")

    async def tried() -> Any:
        return await db.fetchrow("SELECT * FROM webhook_events WHERE event_id = $1 AND attempts > 0", event_id)

    row = await until(tried)
    if row["status"] == "failed":
        error = await db.fetchval("SELECT error_type FROM webhook_failures WHERE event_id = $1 LIMIT 1", event_id)
        assert error == "kamiyo.projections.ProjectionError"
    for path in (f"/events/{event_id}", "/events", "/events/failed/list", "/statistics"):
        assert (await client.get(PREFIX + path, headers=ADMIN)).status_code == 200, path
    shown = (await client.get(f"{PREFIX}/events/{event_id}", headers=ADMIN)).content
    assert body in shown
    assert await db.fetchval("SELECT payload FROM webhook_event_payloads WHERE event_id = $1", event_id)


async def test_a_signature_is_no_key_to_the_operators_calls(quiet_client: httpx.AsyncClient) -> None:
    body = event_json(at=time.time())
    for path in ("/events/replay", "/cleanup"):
        answer = await quiet_client.post(PREFIX + path, content=body, headers=signed(body))
        assert answer.status_code == 401
