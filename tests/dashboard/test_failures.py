"""The dashboard's causes of failure, and the replay of all events that one cause holds up."""

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from kamiyo import handlers, inbox
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Bury
from kamiyo.web import create_app
from kamiyo.web.dashboard import background, queries
from tests.conftest import Log, MakeSettings, deliver, event_json, running_client, settled, until
from tests.dashboard.conftest import BASE, links, page, press, put, put_dead, put_failure, sign_in, words


async def test_failures_are_grouped_by_cause_with_count_first_and_last_seen_and_an_example(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    now = datetime.now(UTC)
    for n in range(3):
        event_id = await put(db, status="failed", event_type="invoice.paid", next_try_at=now if n == 0 else None)
        await put_failure(db, event_id, "aaa", created_at=now - timedelta(hours=5 - n), retry_count=1)
        await put_failure(db, event_id, "aaa", created_at=now - timedelta(minutes=5 - n))
    last = await put_dead(db, "bbb", event_type="order.shipped")
    went_through = await put(db)
    await put_failure(db, went_through, "ccc")
    text = await page(quiet_desk, "/failures")
    groups = text.split('<li class="group')[1:]
    first, second = (words("<li " + group) for group in groups)
    assert "shop.errors.Oops billing.py:41 in grant no such plan invoice.paid" in first
    assert "first seen 5 h ago · last 3 min ago · example evt_" in first and "32 dead" in first.replace(" ", "", 1)
    assert f"example {last}" in second and "1dead" in second
    assert "ccc" not in text
    assert "2 causes · 4 events failed now, 3 of them dead" in words(text)


async def test_an_event_counts_for_its_last_cause_alone(quiet_desk: httpx.AsyncClient, db: Connection) -> None:
    event_id = await put_dead(db, "old")
    await put_failure(db, event_id, "new", error_type="Newer")
    groups = await queries.groups(db)
    assert [(group.fingerprint, group.events) for group in groups] == [("new", 1)]
    assert [row["event_id"] for row in await queries.group_events(db, "new")] == [event_id]
    assert await queries.group_events(db, "old") == []
    assert "No event is failed for this reason now" in await page(quiet_desk, "/failures/old")


async def test_without_failures_the_page_says_what_would_be_here(quiet_desk: httpx.AsyncClient) -> None:
    text = words(await page(quiet_desk, "/failures"))
    assert "Nothing is failed" in text and "Nobody has retried" in text


async def test_a_cause_shows_an_example_with_its_traceback_and_the_events_it_holds_up(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    ids = [await put_dead(db) for _ in range(27)]
    text = await page(quiet_desk, "/failures/abc")
    assert "Traceback (most recent call last)" in text and "More than 25 events" in words(text)
    assert len(set(ids) & set(re.findall(r"evt_\w+", text))) == 25
    assert "May I retry these?" in words(text)


@pytest.fixture
async def broken(client: httpx.AsyncClient, db: Connection) -> AsyncIterator[dict[str, Any]]:
    """Seven events that a handler gave up, and the handler's switch: `works`."""
    switch: dict[str, Any] = {"works": False}

    @handlers.on("order.shipped")
    async def ship(event: Event, db: Connection) -> None:
        if not switch["works"]:
            raise Bury("no paper")

    for n in range(7):
        await deliver(client, event_json(f"evt_{n}", "order.shipped", {"id": f"or_{n}", "object": "order"}))
    for n in range(7):
        await settled(db, f"evt_{n}", "failed")
    switch["fingerprint"] = await db.fetchval("SELECT fingerprint FROM webhook_failures LIMIT 1")
    yield switch


async def test_retry_these_counts_first_then_runs_all_of_them_and_shows_how_far_it_is(
    broken: dict[str, Any], desk: httpx.AsyncClient, db: Connection, log: Log
) -> None:
    cause = f"/failures/{broken['fingerprint']}"
    confirm = words(await page(desk, f"{cause}/retry"))
    assert "Retry 7 events?" in confirm and "All 7 are put back in line" in confirm
    assert await db.fetchval("SELECT count(*) FROM webhook_events WHERE status = 'failed'") == 7
    broken["works"] = True
    answer = await press(desk, f"{cause}/retry", f"{cause}/retry")
    assert answer.status_code == 303 and answer.headers["location"].startswith(f"{BASE}/replays/")
    place = answer.headers["location"].removeprefix(BASE)

    async def done() -> bool:
        return "All of them went through" in await page(desk, place)

    await until(done)
    text = words(await page(desk, place))
    assert "Back in line7 of 7" in text.replace(" 7 of", "7 of") and "Processed7 Waiting0 Failed again0" in re.sub(
        r" (\d)", r"\1", text.partition("Processed since")[2]
    )
    assert 'data-live="0"' in await page(desk, place)
    assert await db.fetchval("SELECT count(*) FROM webhook_events WHERE status = 'processed'") == 7
    [row] = await db.fetch("SELECT action, count FROM webhook_audit")
    assert (row["action"], row["count"]) == ("replay", 7)
    assert "Nothing to retry" in await page(desk, f"{cause}/retry")


async def test_those_that_fail_again_are_counted_as_such(
    broken: dict[str, Any], desk: httpx.AsyncClient, db: Connection
) -> None:
    cause = f"/failures/{broken['fingerprint']}"
    answer = await press(desk, f"{cause}/retry", f"{cause}/retry")
    place = answer.headers["location"].removeprefix(BASE)

    # All of them may have failed again before whoever put them back in line has written down that it is done.
    async def done() -> str | None:
        text = words(await page(desk, place))
        return text if "Done, and 7 failed again" in text else None

    text = await until(done)
    assert text is not None and "Those that failed again have new tries of their own" in text
    assert re.search(r"Failed again ?7", text)


async def test_of_a_replay_of_very_many_the_first_are_followed_and_the_page_says_so(
    quiet_desk: httpx.AsyncClient, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        await put_dead(db)
    number = await queries.begin_replay(db, "abc", 5)
    assert "0 of 5" in words(await page(quiet_desk, f"/replays/{number}"))
    monkeypatch.setattr(queries, "MOST_FOLLOWED", 3)
    shown = words(await page(quiet_desk, f"/replays/{number}"))
    assert "0 of the first 3" in shown and "So many that only the first 3 are followed here" in shown


async def test_a_replay_whose_server_is_gone_says_so_and_offers_the_rest(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    for _ in range(3):
        await put_dead(db)
    number = await queries.begin_replay(db, "abc", 5)
    await queries.tell_replay(db, number, 2)
    assert "Putting them back in line…" in await page(quiet_desk, f"/replays/{number}")
    await db.execute(
        "UPDATE webhook_replays SET heard_at = now() - $1::interval", timedelta(seconds=background.SILENT_SECONDS + 5)
    )
    text = await page(quiet_desk, f"/replays/{number}")
    said = words(text)
    assert "Stopped half-way" in said and "2 of 5" in said and "has not been heard of" in said
    assert links(text, f"{BASE}/failures/abc/retry") and 'data-live="0"' in text


async def test_a_replay_that_the_database_stops_says_where_it_stopped(
    quiet_desk: httpx.AsyncClient, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put_dead(db)

    async def refuse(db: Connection, filters: Any, fingerprint: Any, *, progress: Any) -> int:
        progress(1)
        await db.execute("SELECT 1 / 0")
        return 1

    monkeypatch.setattr(inbox, "replay", refuse)
    answer = await press(quiet_desk, "/failures/abc/retry", "/failures/abc/retry")
    place = answer.headers["location"].removeprefix(BASE)

    async def stopped() -> bool:
        return "Stopped half-way" in await page(quiet_desk, place)

    await until(stopped)
    assert "DivisionByZeroError" in await page(quiet_desk, place)


async def test_a_stopping_server_leaves_what_is_back_in_line_there_and_the_rest_failed(
    database_url: str, settings: MakeSettings, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def endless(db: Connection, filters: Any, fingerprint: Any, *, progress: Any) -> int:
        begun.set()
        await asyncio.Event().wait()
        return 0

    await put_dead(db)
    monkeypatch.setattr(inbox, "replay", endless)
    async with running_client(create_app(settings(KAMIYO_WORKER=False))) as client:
        await sign_in(client)
        await press(client, "/failures/abc/retry", "/failures/abc/retry")
        await begun.wait()
    # It came back, and nothing of it hangs on.
    assert await db.fetchval("SELECT finished_at IS NULL FROM webhook_replays")
    assert await db.fetchval("SELECT status FROM webhook_events") == "failed"
