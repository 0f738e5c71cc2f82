"""What anybody may ask: how the system is, what it takes, its metrics; and how it becomes part of an application."""

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from kamiyo import handlers
from kamiyo.database import Connection
from kamiyo.handlers import GUIDE_TYPES
from kamiyo.web import create_app, create_router
from tests.conftest import (
    PREFIX,
    SECRET,
    Log,
    MakeSettings,
    Served,
    deliver,
    event_json,
    noop,
    running_client,
    serving,
    settled,
    signed,
    until,
)
from tests.contract.conftest import STRIPE, put

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
