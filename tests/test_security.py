"""What an outsider cannot do, and what nobody gets to read.

Canaries: values that must never leave the database and its signed-in readers. They are planted wherever a real system
has the real thing, everything is made to happen, and all that the system emits is searched for them.
"""

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from kamiyo import database, on
from kamiyo.alerts import Alerts
from kamiyo.database import Connection
from kamiyo.errors import DatabaseUnavailable
from kamiyo.event import Event
from kamiyo.signature import sign
from kamiyo.web import create_app
from tests.conftest import (
    ADMIN,
    PREFIX,
    ROOT,
    SECRET,
    Log,
    MakeSettings,
    deliver,
    event_json,
    fresh_id,
    rows_written,
    running_client,
    settled,
    signed,
    tracked,
    until,
    workers_held,
)
from tests.test_alerts import Channel, channel

__all__ = ["channel"]

CANARIES = {
    "signing secret": "whsec_canary_5f2c8a",
    "admin key": "canary-admin-key-91b7",
    "Stripe key": "sk_test_canary_77ab",
    "e-mail": "canary.jane@example.com",
    "name": "Canary Quillfeather",
    "card": "9973",
    "metadata": "canary-payload-value",
    "password": "canary-database-password",
}


def customer() -> dict[str, Any]:
    return {
        "id": fresh_id("cus"),
        "object": "customer",
        "email": CANARIES["e-mail"],
        "name": CANARIES["name"],
        "metadata": {"note": CANARIES["metadata"]},
        "created": 1,
    }


def card(owner: str) -> dict[str, Any]:
    return {
        "id": fresh_id("pm"),
        "object": "payment_method",
        "type": "card",
        "customer": owner,
        "card": {"brand": "visa", "last4": CANARIES["card"], "exp_month": 1, "exp_year": 2030},
        "billing_details": {"email": CANARIES["e-mail"], "name": CANARIES["name"]},
    }


async def test_no_canary_is_in_a_log_line_a_metric_an_alert_or_an_answer_that_is_not_an_operators(
    db: Connection, database_url: str, settings: MakeSettings, log: Log, channel: Channel
) -> None:
    @on("customer.updated")
    async def quotes_the_customer(event: Event, connection: Connection) -> None:
        raise ValueError(f"cannot write to {event.object['email']}: {event.object}")

    @on("payment_method.attached")
    async def quotes_in_sql(event: Event, connection: Connection) -> None:
        await connection.execute("SELECT $1::text::int", event.object["billing_details"]["email"])

    emitted: list[str] = []
    changed = settings(
        STRIPE_WEBHOOK_SECRET=f"{CANARIES['signing secret']},{SECRET}",
        ADMIN_API_KEY=CANARIES["admin key"],
        STRIPE_SECRET_KEY=CANARIES["Stripe key"],
        KAMIYO_RECONCILE=False,
        ALERT_URLS=channel.url,
    )
    async with running_client(create_app(changed)) as client:
        jane = customer()
        ids = []
        for kind, thing in (
            ("customer.created", jane),
            ("customer.updated", jane),
            ("payment_method.attached", card(str(jane["id"]))),
            ("customer.updated", {**jane, "balance": CANARIES["metadata"]}),  # not a number
        ):
            ids.append(fresh_id())
            body = event_json(ids[-1], kind, thing)
            emitted.append((await deliver(client, body)).text)
            emitted.append((await deliver(client, body)).text)
        for event_id in ids:
            await settled(db, event_id)
        body = event_json(None, "customer.created", jane)
        for headers in (
            {},
            signed(body, "whsec_wrong"),
            signed(body, at=time.time() - 4000),
            {"Stripe-Signature": "v1"},
        ):
            emitted.append((await client.post(f"{PREFIX}/stripe", content=body, headers=headers)).text)
        emitted.append((await deliver(client, body[:-1])).text)
        emitted.append((await deliver(client, body + b" " * 2_000_000)).text)
        for key in (None, CANARIES["admin key"] + "x", CANARIES["admin key"][:-1], "\xff"):
            asked = {"X-Admin-Key": key.encode("latin-1")} if key else {}
            emitted.append((await client.get(f"{PREFIX}/events", headers=asked)).text)  # type: ignore[arg-type]  # bytes
        for path in ("/health", "/supported-events", "/events/failed/list?limit=x", "/nowhere"):
            emitted.append((await client.get(f"{PREFIX}{path}")).text)
        emitted.append((await client.get("/metrics")).text)
        emitted.append((await client.get("/openapi.json")).text)
        async with workers_held(db):
            await db.execute("UPDATE webhook_events SET attempts = 5, next_try_at = NULL WHERE status = 'failed'")
        pool = await database.open_pool(database_url, size=2, application="alerts", idle_limit=60)
        async with pool.acquire() as own:
            await Alerts(pool, changed).look(own)
        await pool.close()

        async def told() -> bool:
            return bool(channel.heard)

        await until(told)  # by this look, or by the application's own where that was at it

    emitted += [json.dumps(message) for message in channel.heard] + [json.dumps(line) for line in log()]
    assert any("try_failed" in line for line in emitted), [line["event"] for line in log()]
    assert any("webhook_events_total" in page for page in emitted)
    # Digits stand for themselves only where no others are beside them: a moment may have the four of a card in it.
    found = {what for what, canary in CANARIES.items() if any(re.search(rf"(?<!\d){canary}(?!\d)", e) for e in emitted)}
    assert found == set()


async def test_a_database_that_cannot_be_reached_is_said_without_its_password() -> None:
    url = f"postgresql://kamiyo:{CANARIES['password']}@127.0.0.1:1/kamiyo"
    with pytest.raises(DatabaseUnavailable) as away:
        await database.connect(url, application="test")
    assert CANARIES["password"] not in str(away.value)


async def test_the_forged_the_replayed_and_the_oversized_write_nothing(
    client: httpx.AsyncClient, db: Connection
) -> None:
    body = event_json(None, "customer.created", customer())
    now = int(time.time())
    before = await rows_written(db)
    forged = {"Stripe-Signature": sign(body, "whsec_another", now)}
    altered = {"Stripe-Signature": sign(body + b" ", SECRET, now)}
    replayed = {"Stripe-Signature": sign(body, SECRET, now - 301)}
    early = {"Stripe-Signature": sign(body, SECRET, now + 310)}
    for headers in (forged, altered, replayed, early, {}):
        assert (await client.post(f"{PREFIX}/stripe", content=body, headers=headers)).status_code == 400
    long = body + b" " * 1_048_577
    assert (await client.post(f"{PREFIX}/stripe", content=long, headers=signed(long))).status_code == 413
    assert await rows_written(db) == before


@pytest.mark.parametrize(("environment", "status"), [("production", 503), ("development", 200)])
async def test_who_has_read_the_guide_can_sign_nothing_and_is_no_operator_in_production(
    environment: str, status: int, database_url: str, settings: MakeSettings, log: Log
) -> None:
    printed = {"STRIPE_WEBHOOK_SECRET": "whsec_...", "ADMIN_API_KEY": "your_secure_admin_key_here"}
    async with running_client(create_app(settings(**printed, KAMIYO_ENV=environment))) as client:
        body = event_json()
        forged = await client.post(
            f"{PREFIX}/stripe", content=body, headers=signed(body, printed["STRIPE_WEBHOOK_SECRET"])
        )
        assert forged.status_code == status, forged.text
        asked = await client.get(f"{PREFIX}/statistics", headers={"X-Admin-Key": printed["ADMIN_API_KEY"]})
        assert asked.status_code == status, asked.text
        signing_in = {"key": printed["ADMIN_API_KEY"], "next": ""}
        assert ((await client.post("/dashboard/sign-in", data=signing_in)).status_code == 303) == (status == 200)
    doubted = {line["variable"]: line["reason"] for line in log() if line["event"] == "setting_doubtful"}
    for variable in printed:
        assert ("taken as not set" in doubted[variable]) == (status == 503)


async def test_wrong_admin_keys_are_answered_later_each_time_and_the_right_one_never(
    client: httpx.AsyncClient, log: Log
) -> None:
    async def ask(key: str) -> tuple[int, float]:
        began = time.perf_counter()
        reply = await client.get(f"{PREFIX}/statistics", headers={"X-Admin-Key": key})
        return reply.status_code, time.perf_counter() - began

    guesses = [await ask("guess") for _ in range(7)]
    assert {status for status, _ in guesses} == {401}
    # Only the least is asserted: what a busy machine adds to a wait is no part of it.
    assert all(took >= 0.99 * 0.01 * 2**slips for slips, (_, took) in enumerate(guesses))
    guess = asyncio.create_task(ask("guess"))
    assert (await ask(ADMIN["X-Admin-Key"]))[0] == 200
    assert not guess.done(), "the right key does not wait for the wrong one"
    assert (await guess)[0] == 401


async def test_every_answer_of_an_operators_call_is_kept_from_caches_frames_and_sniffers(
    client: httpx.AsyncClient,
) -> None:
    for path in ("/statistics", "/events", "/events/failed/list", "/events/evt_unknown", "/health"):
        reply = await client.get(f"{PREFIX}{path}", headers=ADMIN)
        assert reply.headers["Cache-Control"] == "no-store", path
        assert reply.headers["X-Content-Type-Options"] == "nosniff", path
        assert reply.headers["X-Frame-Options"] == "DENY", path
        assert "default-src 'none'" in reply.headers["Content-Security-Policy"], path
    refused = await client.post(f"{PREFIX}/stripe", content=b"{}")
    assert refused.headers["X-Content-Type-Options"] == "nosniff"


async def test_every_page_of_the_application_tells_a_browser_to_do_nothing_unexpected(
    quiet_client: httpx.AsyncClient,
) -> None:
    described = (await quiet_client.get("/openapi.json")).json()["paths"]
    pages = {path.replace("{event_id}", "evt_1") for path, calls in described.items() if "get" in calls}
    pages |= {"/", "/docs", "/redoc", "/openapi.json", "/nowhere", "/dashboard", f"{PREFIX}/dashboard/events"}
    for page in pages:
        reply = await quiet_client.get(page)
        assert reply.headers["X-Content-Type-Options"] == "nosniff", page
        assert reply.headers["X-Frame-Options"] == "DENY", page
        assert reply.headers["Referrer-Policy"] == "no-referrer", page
        policy = reply.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ") and "frame-ancestors 'none'" in policy, page
        assert len(reply.headers.get_list("Content-Security-Policy")) == 1, page


def test_no_secret_is_in_the_repository() -> None:
    live = re.compile(r"\b(?:sk|rk)_live_[0-9a-zA-Z]{16,}|whsec_[0-9a-zA-Z]{32,}")
    found = [name for name in tracked() if (text := _text(ROOT / name)) and live.search(text)]
    assert found == []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
