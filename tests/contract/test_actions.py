"""What operators may have done: a retry, a replay, a cleanup; and the key that each of their calls needs."""

import hmac
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from kamiyo import handlers, inbox
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.web import create_app
from tests.conftest import ADMIN, ADMIN_KEY, PREFIX, MakeSettings, deliver, event_json, running_client, settled
from tests.contract.conftest import ADMIN_CALLS, put

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
