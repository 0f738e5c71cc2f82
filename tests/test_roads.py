"""Stories of the other roads: events that Amazon EventBridge and Azure Event Grid carry, without Stripe's signature."""

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kamiyo import envelope
from kamiyo.database import Connection
from kamiyo.envelope import Validation
from kamiyo.errors import PayloadError
from kamiyo.web import create_app
from tests.conftest import (
    PREFIX,
    Log,
    MakeSettings,
    deliver,
    event_json,
    fresh_id,
    rows_written,
    running_client,
    settled,
)

BRIDGE, GRID = f"{PREFIX}/eventbridge", f"{PREFIX}/eventgrid"
KEY, NEXT_KEY = "the key of the road", "the key after the next rotation"
SHOWN = {"X-Api-Key": KEY, "Content-Type": "application/json"}


@pytest.fixture
async def roads(database_url: str, settings: MakeSettings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that both roads may come to."""
    keys = f"{KEY}, {NEXT_KEY}"
    changes = {"KAMIYO_EVENTBRIDGE_KEY": keys, "KAMIYO_EVENTGRID_KEY": keys, "KAMIYO_MAX_BODY_BYTES": 100_000}
    async with running_client(create_app(settings(**changes))) as client:
        yield client


def customer(event_id: str | None = None, name: str = "Ada", **envelope_fields: Any) -> bytes:
    made = {"id": "cus_1", "object": "customer", "name": name, "created": 1}
    return event_json(event_id, "customer.created", made, **envelope_fields)


def bridged(event: bytes, **changes: Any) -> bytes:
    """As EventBridge sends it; the event's bytes stay what they are."""
    around = {
        **{"version": "0", "id": "d7b7c5a4-0000-4000-8000-000000000000", "detail-type": "customer.created"},
        **{"source": "aws.partner/stripe.com/ed_1", "account": "123456789012", "region": "eu-north-1"},
        **{"time": "2026-11-20T12:00:00Z", "resources": [], **changes},
    }
    return json.dumps(around).encode()[:-1] + b',"detail":' + event + b"}"


def clouded(event: bytes) -> bytes:
    """As Event Grid sends it in the CloudEvents schema."""
    around = {
        **{"specversion": "1.0", "id": fresh_id("ce"), "type": "com.stripe.customer.created"},
        **{"source": "/subscriptions/1/partnerTopics/stripe", "time": "2026-11-20T12:00:00Z"},
    }
    return json.dumps(around).encode()[:-1] + b',"data":' + event + b"}"


def gridded(event: bytes) -> bytes:
    """As Event Grid sends it in its own schema."""
    around = {
        **{"id": fresh_id("eg"), "topic": "/subscriptions/1", "subject": "x", "eventType": "customer.created"},
        **{"eventTime": "2026-11-20T12:00:00Z", "dataVersion": "1", "metadataVersion": "1"},
    }
    return json.dumps(around).encode()[:-1] + b',"data":' + event + b"}"


# ── Amazon EventBridge ────────────────────────────────────────────────────────────────────────────────────


async def test_an_event_that_eventbridge_carries_is_an_event_like_any_other(
    roads: httpx.AsyncClient, db: Connection
) -> None:
    # Written as nobody here would write it: what is stored is what came.
    event = customer("evt_1", account="acct_1").replace(b'"name": "Ada"', b'"name" :\n"A\\u0064a", "n": 1.50')
    answer = await roads.post(BRIDGE, content=bridged(event), headers=SHOWN)
    received = {"event_id": "evt_1", "event_type": "customer.created", "status": "success"}
    assert (answer.status_code, answer.json()) == (200, {**received, "message": "Event received"})
    row = await settled(db, "evt_1", "processed")
    assert (row["source"], row["account"]) == ("eventbridge", "acct_1")
    assert await db.fetchval("SELECT body FROM webhook_payloads") == event
    assert await db.fetchval("SELECT name FROM billing.customers WHERE account = 'acct_1'") == "Ada"

    # The same event by Stripe's own road, and by the other one: it counts once.
    assert (await deliver(roads, event)).json()["message"] == "Event already processed"
    again = await roads.post(GRID, content=clouded(event), headers=SHOWN)
    assert again.json()["events"] == [{**received, "message": "Event already processed"}]
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == 1


async def test_an_input_transformer_may_send_the_event_alone_and_rotation_has_two_keys(
    roads: httpx.AsyncClient, db: Connection
) -> None:
    thin = {
        "id": "evt_thin",
        "object": "v2.core.event",
        "type": "v1.customer.created",
        "created": "2026-11-20T12:00:00Z",
    }
    for body in (customer("evt_1"), bridged(json.dumps({**thin, "context": "acct_p/acct_1"}).encode())):
        answer = await roads.post(BRIDGE, content=body, headers={"X-Api-Key": NEXT_KEY})
        assert answer.status_code == 200, answer.text
    rows = await db.fetch("SELECT event_id, account, context FROM webhook_events ORDER BY event_id")
    assert [tuple(row) for row in rows] == [("evt_1", "", ""), ("evt_thin", "acct_1", "acct_p/acct_1")]


# ── Azure Event Grid ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("schema", [clouded, gridded])
async def test_events_that_event_grid_carries_are_committed_before_the_answer_one_or_many(
    schema: Any, roads: httpx.AsyncClient, db: Connection
) -> None:
    first, second, third = (customer(f"evt_{n}", name=f"Ada {n}") for n in range(3))
    alone = await roads.post(GRID, content=schema(first), headers=SHOWN)
    assert (alone.status_code, alone.json()["count"]) == (200, 1)
    many = await roads.post(GRID, content=b" [" + schema(second) + b",\n" + schema(third) + b"]", headers=SHOWN)
    assert [event["event_id"] for event in many.json()["events"]] == ["evt_1", "evt_2"]
    rows = await db.fetch("SELECT event_id, source FROM webhook_events ORDER BY event_id")
    assert [tuple(row) for row in rows] == [(f"evt_{n}", "eventgrid") for n in range(3)]
    bodies = await db.fetch("SELECT body FROM webhook_payloads ORDER BY seq")
    assert {body for (body,) in bodies} == {first, second, third}


async def test_bytes_in_base64_are_taken_and_a_bare_event_too(roads: httpx.AsyncClient, db: Connection) -> None:
    inside = customer("evt_1")
    packed = {
        "specversion": "1.0",
        "id": "1",
        "type": "x",
        "source": "x",
        "data_base64": base64.b64encode(inside).decode(),
    }
    body = b"[" + json.dumps(packed).encode() + b"," + customer("evt_2") + b"]"
    assert (await roads.post(GRID, content=body, headers=SHOWN)).status_code == 200
    assert (
        await db.fetchval("SELECT body FROM webhook_payloads WHERE seq = (SELECT min(seq) FROM webhook_events)")
        == inside
    )
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == 2


async def test_one_that_is_no_event_takes_none_of_its_neighbours_down(roads: httpx.AsyncClient, db: Connection) -> None:
    # Event Grid does not deliver again what was answered 400: the others must be stored by then.
    batch = b"[" + b",".join([clouded(customer("evt_1")), clouded(b'{"x":1}'), clouded(customer("evt_2"))]) + b"]"
    answer = await roads.post(GRID, content=batch, headers=SHOWN)
    assert (answer.status_code, answer.json()) == (400, {"detail": "Invalid payload"})
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == 2


async def test_a_batch_larger_than_what_may_wait_for_its_commit_comes_in_all_the_same(
    database_url: str, settings: MakeSettings, db: Connection
) -> None:
    # Delivered again it would be no smaller, so it must not be too much the first time.
    batch = b"[" + b",".join(clouded(customer(f"evt_{n}")) for n in range(12)) + b"]"
    small = settings(KAMIYO_EVENTGRID_KEY=KEY, KAMIYO_MAX_WAITING=5)
    async with running_client(create_app(small)) as client:
        answer = await client.post(GRID, content=batch, headers=SHOWN)
        assert (answer.status_code, answer.json()["count"]) == (200, 12)
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == 12


async def test_event_grid_asks_whether_this_is_the_place_in_either_of_its_two_ways(
    roads: httpx.AsyncClient, db: Connection
) -> None:
    asked = {"WebHook-Request-Origin": "eventgrid.azure.net", "WebHook-Request-Rate": "120"}
    leave = await roads.options(GRID, headers=asked)
    assert leave.status_code == 200
    assert leave.headers["WebHook-Allowed-Origin"] == "eventgrid.azure.net"
    assert (leave.headers["WebHook-Allowed-Rate"], leave.headers["Allow"]) == ("*", "POST")
    for stranger in ({}, {"WebHook-Request-Origin": "eventgrid.azure.net.example.com"}, {"Origin": "x"}):
        refused = await roads.options(GRID, headers=stranger)
        assert refused.status_code == 403 and "WebHook-Allowed-Origin" not in refused.headers

    code = "512d38b6-c7b8-40c8-89fe-f46f9e9622b6"
    question: list[dict[str, Any]] = [
        {
            **{"id": "1", "topic": "/subscriptions/1", "subject": "", "eventTime": "2026-11-20T12:00:00Z"},
            **{"eventType": "Microsoft.EventGrid.SubscriptionValidationEvent", "dataVersion": "1"},
            "data": {"validationCode": code, "validationUrl": "https://x"},
        }
    ]
    header = {"aeg-event-type": "SubscriptionValidation"}
    for headers in (header, header | SHOWN):
        answer = await roads.post(GRID, json=question, headers=headers)
        assert (answer.status_code, answer.json()) == (200, {"validationResponse": code})
    # To ask lets nobody in: not with a wrong key, and not with something else than the question.
    for body, headers in (
        (json.dumps(question).encode(), header | {"X-Api-Key": "wrong"}),
        (json.dumps(question).encode(), {}),
        (clouded(customer()), header),
        (json.dumps([{**question[0], "eventType": "x", "data": {}}]).encode(), header),
    ):
        assert (await roads.post(GRID, content=body, headers=headers)).status_code == 401
    long = await roads.post(GRID, content=b" " * 20_000 + json.dumps(question).encode(), headers=header)
    assert long.status_code == 413
    assert await rows_written(db) == {}


# ── The door ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("road", [BRIDGE, GRID])
async def test_nothing_comes_in_without_the_key_and_nothing_of_a_refusal_is_written(
    road: str, roads: httpx.AsyncClient, db: Connection, log: Log
) -> None:
    event = customer()
    for headers in (
        {},
        {"X-Api-Key": ""},
        {"X-Api-Key": KEY[:-1]},
        {"X-Api-Key": KEY + "x"},
        {"X-Api-Key": f"{KEY}, {NEXT_KEY}"},
    ):
        answer = await roads.post(road, content=event, headers=headers)
        assert (answer.status_code, answer.json()) == (401, {"detail": "Invalid API key"})
    # Not in the address either: addresses are written down by every proxy.
    assert (await roads.post(f"{road}?key={KEY}&x-api-key={KEY}", content=event)).status_code == 401
    signed_by_stripe = await roads.post(road, content=event, headers={"Stripe-Signature": "t=1,v1=0"})
    assert signed_by_stripe.status_code == 401
    for body in (
        b"",
        b"[]",
        b"{}",
        b"nonsense",
        b'{"detail":null}',
        b'{"detail":"evt_1"}',
        b"\xff",
        b"1",
        bridged(b"[]"),
    ):
        answer = await roads.post(road, content=body, headers=SHOWN)
        assert (answer.status_code, answer.json()) == (400, {"detail": "Invalid payload"}), body
    for body in (b" " * 100_001, b"[" * 100_000):
        answer = await roads.post(road, content=body, headers=SHOWN)
        assert answer.status_code == (413 if len(body) > 100_000 else 400)

    async def in_pieces() -> AsyncIterator[bytes]:
        for _ in range(12):
            yield b" " * 10_000

    endless = await roads.post(road, content=in_pieces(), headers=SHOWN)
    assert (endless.status_code, endless.headers["connection"]) == (413, "close")
    assert await rows_written(db) == {}
    reasons = {line["reason"] for line in log() if line["event"] == "delivery_rejected"}
    assert reasons == {"api_key", "payload", "too_large"}
    assert KEY not in json.dumps(log()) and "Ada" not in json.dumps(log())


async def test_a_road_without_a_key_is_shut_and_the_roads_alone_make_a_process_ready(
    database_url: str, settings: MakeSettings, db: Connection
) -> None:
    async with running_client(create_app(settings(STRIPE_WEBHOOK_SECRET=""))) as client:
        for call in (client.post(BRIDGE, headers=SHOWN), client.post(GRID, headers=SHOWN), client.options(GRID)):
            answer = await call
            assert (answer.status_code, answer.json()) == (503, {"detail": "API key not configured"})
            assert int(answer.headers["Retry-After"]) > 0
        question = {"aeg-event-type": "SubscriptionValidation"}
        assert (await client.post(GRID, content=b"[]", headers=question)).status_code == 503
        assert (await client.get(f"{PREFIX}/ready")).status_code == 503
    alone = settings(STRIPE_WEBHOOK_SECRET="", KAMIYO_EVENTBRIDGE_KEY=KEY)
    async with running_client(create_app(alone)) as client:
        assert (await client.get(f"{PREFIX}/ready")).status_code == 200
        assert (await client.post(BRIDGE, content=customer(), headers=SHOWN)).status_code == 200
        assert (await deliver(client, customer())).status_code == 503


async def test_before_the_start_and_without_a_database_the_roads_are_told_to_come_again(settings: MakeSettings) -> None:
    nowhere = settings(
        DATABASE_URL="postgresql://nobody@127.0.0.1:1/none",
        KAMIYO_EVENTBRIDGE_KEY=KEY,
        KAMIYO_EVENTGRID_KEY=KEY,
        KAMIYO_COMMIT_TIMEOUT=0.2,
    )
    app = create_app(nowhere)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://kamiyo") as early:
        assert (await early.post(BRIDGE, content=customer(), headers=SHOWN)).status_code == 503
        assert (await early.options(GRID)).status_code == 503
    async with running_client(app) as client:
        for road, body in ((BRIDGE, bridged(customer())), (GRID, b"[" + clouded(customer()) + b"]")):
            answer = await client.post(road, content=body, headers=SHOWN)
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")


# ── Whatever is in the envelope ───────────────────────────────────────────────────────────────────────────

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
fields = st.sampled_from(["detail", "data", "data_base64", "specversion", "eventType", "id", "type", "object", "x"])
envelopes = st.dictionaries(
    fields, json_values | st.just("Microsoft.EventGrid.SubscriptionValidationEvent"), max_size=6
)
bodies = st.one_of(
    st.binary(max_size=300),
    (json_values | envelopes | st.lists(envelopes, max_size=3)).map(json.dumps).map(str.encode),
    st.text(alphabet='{}[]",:\\ud8detailx01 ', max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
)


@given(bodies)
@example(b'{"detail":{"id":"evt_1","type":"x","name":"\\ud800"},"z":"\\udfff"}')
@example(b'[{"specversion":"1.0","data":{"name":"\\ud800"}}]')
@example(b'[{"specversion":"1.0","data_base64":"%%%"}]')
@example(b'[{"eventType":"Microsoft.EventGrid.SubscriptionValidationEvent","data":7}]')
@example(b'{"detail":' + b"[" * 5000)
@example(b"[" * 5000 + b"]" * 5000)
@example(b'{"data":' + b"9" * 5000 + b',"specversion":"\\ud800"}')
@hypothesis_settings(max_examples=150)
def test_any_bytes_are_events_to_be_tried_or_an_invalid_payload(body: bytes) -> None:
    for unwrap in (envelope.from_eventbridge, envelope.from_eventgrid):
        try:
            found = unwrap(body)
        except PayloadError:
            continue
        if isinstance(found, Validation):
            assert 0 < len(found.code) <= 255
        else:
            assert found, "something is always carried"


@given(st.lists(json_values.map(lambda value: json.dumps(value, indent=1)), min_size=1, max_size=5), st.booleans())
def test_what_was_put_into_an_envelope_comes_out_of_it_byte_for_byte(inside: list[str], grids_own: bool) -> None:
    events = [text.encode() for text in inside]
    assert envelope.from_eventbridge(bridged(events[0])) == events[0]
    wrap = gridded if grids_own else clouded
    assert envelope.from_eventgrid(b"[" + b", ".join(map(wrap, events)) + b"]") == events
    assert envelope.from_eventgrid(wrap(events[0])) == events[:1]


@given(bodies)
@hypothesis_settings(max_examples=30)
@example(b'{"detail":{"id":"evt_1","type":"x","name":"\\ud800"}}')
async def test_any_bytes_get_an_answer_of_the_contract(roads: httpx.AsyncClient, body: bytes) -> None:
    for road in (BRIDGE, GRID):
        answer = await roads.post(road, content=body, headers=SHOWN)
        assert answer.status_code in (200, 400)
        assert answer.status_code == 200 or answer.json() == {"detail": "Invalid payload"}
