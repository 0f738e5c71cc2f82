"""Stories of alerts: a real Apprise plugin posts to a real HTTP receiver on this machine."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from kamiyo import database, inbox
from kamiyo.alerts import Alerts, Incident, Signatures, find
from kamiyo.database import Connection
from kamiyo.event import Event, parse
from kamiyo.handlers import Bury, Registry
from kamiyo.worker import Worker
from tests.conftest import Log, MakeSettings, days_ahead_missing, event_json, fresh_id, until


@dataclass
class Channel:
    """A receiver of Apprise's `json://` notifications; `answers` is the HTTP status it gives."""

    port: int = 0
    answers: int = 200
    heard: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"json://127.0.0.1:{self.port}/token-of-the-channel"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        if self.answers == 200:
            self.heard.append(body)
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % self.answers)
        await writer.drain()
        writer.close()

    def titles(self) -> list[str]:
        return [message["title"] for message in self.heard]


@pytest.fixture
async def channel() -> AsyncIterator[Channel]:
    told = Channel()
    server = await asyncio.start_server(told.serve, "127.0.0.1", 0)
    told.port = server.sockets[0].getsockname()[1]
    async with server:
        yield told


@contextlib.asynccontextmanager
async def alerts(url: str, settings: MakeSettings, channel: Channel) -> AsyncIterator[Alerts]:
    pool = await database.open_pool(url, size=4, application="alerts", idle_limit=60)
    changed = settings(ALERT_URLS=channel.url, KAMIYO_PUBLIC_URL="https://api.example.com")
    try:
        yield Alerts(pool, changed)
    finally:
        await pool.close()


async def bury(db: Connection, url: str, settings: MakeSettings, event_id: str) -> None:
    """Store an event whose handler gives up at once, and run it."""
    refusing = Registry()

    @refusing.on("invoice.paid")
    async def refuse(event: Event, connection: Connection) -> None:
        raise Bury("no account for jane@example.com")

    await inbox.put(db, [parse(event_json(event_id, "invoice.paid"), received=time.time())])
    pool = await database.open_pool(url, size=4, application="worker", idle_limit=60)
    try:
        async with pool.acquire() as own:
            assert await Worker(pool, url, settings(), refusing).run_once(own) == 1
    finally:
        await pool.close()


async def test_a_dead_event_is_told_once_by_many_processes_and_told_over_when_it_was_mended(
    db: Connection, database_url: str, settings: MakeSettings, channel: Channel
) -> None:
    event_id = fresh_id()
    await bury(db, database_url, settings, event_id)
    async with (
        alerts(database_url, settings, channel) as one,
        alerts(database_url, settings, channel) as other,
        one.pool.acquire() as first,
        other.pool.acquire() as second,
    ):
        await asyncio.gather(one.look(first), other.look(second))
        await one.look(first)
        await other.look(second)
        assert channel.titles() == ["Kamiyo: An event is dead: Bury"]
        [message] = channel.heard
        assert event_id in message["message"]
        assert "https://api.example.com/api/v1/webhooks/dashboard/failures/" in message["message"]
        assert "jane@example.com" not in json.dumps(message)

        await inbox.retry(db, event_id)
        pool = one.pool
        async with pool.acquire() as own:
            assert await Worker(pool, database_url, settings(), Registry()).run_once(own) == 1
        await other.look(second)
        await one.look(first)
        assert channel.titles()[1:] == ["Kamiyo: Over: An event is dead: Bury"]
    assert await db.fetchval("SELECT count(*) FROM webhook_incidents") == 0


async def test_events_that_die_of_one_cause_are_one_incident(
    db: Connection, database_url: str, settings: MakeSettings, channel: Channel
) -> None:
    for _ in range(3):
        await bury(db, database_url, settings, fresh_id())
    async with alerts(database_url, settings, channel) as one, one.pool.acquire() as own:
        await one.look(own)
        await bury(db, database_url, settings, fresh_id())
        await one.look(own)
    assert channel.titles() == ["Kamiyo: 3 events are dead: Bury"]


async def test_a_channel_that_is_down_is_told_later_and_nothing_else_suffers(
    db: Connection, database_url: str, settings: MakeSettings, channel: Channel
) -> None:
    channel.answers = 500
    await bury(db, database_url, settings, fresh_id())
    async with alerts(database_url, settings, channel) as one, one.pool.acquire() as own:
        await one.look(own)
        assert await db.fetchval("SELECT misses FROM webhook_incidents WHERE next_try_at > now()") == 1
        channel.answers = 200
        await one.look(own)
        assert channel.heard == []  # not before its time
        await db.execute("UPDATE webhook_incidents SET next_try_at = now()")
        await one.look(own)
    assert channel.titles() == ["Kamiyo: An event is dead: Bury"]


async def test_an_event_that_nobody_takes_for_five_minutes_is_an_incident(db: Connection) -> None:
    event_id = fresh_id()
    await inbox.put(db, [parse(event_json(event_id, "customer.created"), received=time.time())])
    assert await find(db) == []
    await db.execute("UPDATE webhook_events SET next_try_at = now() - interval '6 minutes'")
    [incident] = await find(db)
    assert incident.key == "overdue"
    assert event_id in incident.body
    assert "Is a worker running" in incident.body


async def test_days_ahead_that_no_worker_makes_are_an_incident(db: Connection) -> None:
    assert await find(db) == []
    async with days_ahead_missing(db):
        [incident] = await find(db)
    assert incident.key == "maintenance"
    assert "for 5 days more" in incident.body and "worker_failed" in incident.body


async def test_a_type_that_fails_often_is_an_incident(db: Connection) -> None:
    bodies = [event_json(fresh_id(), "invoice.paid") for _ in range(10)]
    await inbox.put(db, [parse(body, received=time.time()) for body in bodies])
    await db.execute(
        """UPDATE webhook_events SET status = 'failed', failed_at = now(), next_try_at = now() + interval '1 hour'
           WHERE event_id IN (SELECT event_id FROM webhook_events LIMIT 5)"""
    )
    await db.execute(
        """UPDATE webhook_events SET status = 'processed', outcome = 'handled', next_try_at = NULL
           WHERE status = 'pending'"""
    )
    assert [incident.key for incident in await find(db)] == ["failure_rate:invoice.paid"]


async def test_silence_is_an_incident_only_where_there_used_to_be_traffic(db: Connection) -> None:
    assert await find(db) == []
    await db.execute(
        """INSERT INTO webhook_counts_by_hour
           SELECT date_trunc('hour', now()) - n * interval '1 hour', 'invoice.paid', 5, 5, 0, 0
           FROM generate_series(6, 100) AS n"""
    )
    [incident] = await find(db)
    assert incident.key == "silence"
    await db.execute("DELETE FROM webhook_counts_by_hour WHERE hour > now() - interval '90 hours'")
    assert await find(db) == []


_WRONG = {
    "Events wait too long": (
        "UPDATE webhook_events SET next_try_at = now() - interval '6 minutes'",
        "UPDATE webhook_events SET next_try_at = now() + interval '1 hour'",
    ),
    "invoice.paid fails often": (
        "UPDATE webhook_events SET status = 'failed', failed_at = now(), next_try_at = now() + interval '1 hour'",
        "UPDATE webhook_events SET status = 'processed', outcome = 'handled', failed_at = NULL, next_try_at = NULL",
    ),
    "Stripe had events that never arrived": (
        "INSERT INTO webhook_reconciliation (run, missed, finished_at, heard_at) VALUES (1, 7, now(), now())",
        "UPDATE webhook_reconciliation SET missed = 0, finished_at = now(), heard_at = now()",
    ),
    "No events come any more": (
        """DELETE FROM webhook_events; DELETE FROM webhook_count_changes;
           INSERT INTO webhook_counts_by_hour
           SELECT date_trunc('hour', now()) - n * interval '1 hour', 'invoice.paid', 5, 5, 0, 0
           FROM generate_series(6, 100) AS n""",
        "DELETE FROM webhook_counts_by_hour",
    ),
}


@pytest.mark.parametrize("title", _WRONG)
async def test_whatever_is_wrong_is_told_once_with_the_page_that_helps_and_told_over(
    title: str, db: Connection, database_url: str, settings: MakeSettings, channel: Channel
) -> None:
    begin, end = _WRONG[title]
    await inbox.put(db, [parse(event_json(fresh_id(), "invoice.paid"), received=time.time()) for _ in range(6)])
    await db.execute(begin)
    async with alerts(database_url, settings, channel) as one, one.pool.acquire() as own:
        await one.look(own)
        await one.look(own)
        assert channel.titles() == [f"Kamiyo: {title}"]
        [told] = [message["message"] for message in channel.heard]
        assert "https://api.example.com/api/v1/webhooks/dashboard/" in told and "Since 20" in told
        await db.execute(end)
        await one.look(own)
        await one.look(own)
    assert channel.titles()[1:] == [f"Kamiyo: Over: {title}"]


async def test_a_database_that_is_away_is_told_by_whoever_sees_it_and_told_over(
    db: Connection, database_url: str, settings: MakeSettings, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamiyo.alerts._AWAY_SECONDS", 0.0)
    monkeypatch.setattr("kamiyo.alerts._LOOK_EVERY_SECONDS", 0.02)
    async with alerts(database_url, settings, channel) as one:
        here = one.pool
        nowhere = await database.open_pool("postgresql://127.0.0.1:9/x", size=4, application="alerts", idle_limit=60)
        one.pool = nowhere
        running = asyncio.create_task(one.run())
        await until(lambda: _has_heard(channel, "Kamiyo: the database is away"))
        one.pool = here
        await until(lambda: _has_heard(channel, "Kamiyo: the database is back"))
        running.cancel()
        await nowhere.close()
    assert channel.titles() == ["Kamiyo: the database is away", "Kamiyo: the database is back"]


async def test_an_error_that_nobody_thought_of_ends_one_look_and_not_the_watch(
    db: Connection,
    database_url: str,
    settings: MakeSettings,
    channel: Channel,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kamiyo.alerts._LOOK_EVERY_SECONDS", 0.02)
    looks = iter(range(2))

    async def stumbles_twice(db: Connection) -> list[Incident]:
        for _ in looks:
            raise KeyError("jenny@example.com")
        return await find(db)

    monkeypatch.setattr("kamiyo.alerts.find", stumbles_twice)
    await bury(db, database_url, settings, fresh_id())
    async with alerts(database_url, settings, channel) as one:
        running = asyncio.create_task(one.run())
        await until(lambda: _told_or_ended(channel, running))
        assert not running.done()
        running.cancel()
    told = [(line["error"], line["level"]) for line in log() if line["event"] == "alerts_failed"]
    assert told == [("KeyError", "error")] * 2
    assert "jenny@example.com" not in str(log())


async def _told_or_ended(channel: Channel, running: "asyncio.Task[None]") -> bool:
    return running.done() or bool(channel.titles())


async def _has_heard(channel: Channel, title: str) -> bool:
    return title in channel.titles()


async def test_discord_and_slack_are_told_at_the_addresses_that_people_have(
    db: Connection, database_url: str, settings: MakeSettings, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Apprise's own plugins, their services' hosts replaced by one of this machine.
    await bury(db, database_url, settings, fresh_id())
    both = settings(
        DISCORD_WEBHOOK_URL="https://discord.com/api/webhooks/4174216298/JHMHI8qBe7bk2ZwO5U711o3dV_js",
        SLACK_WEBHOOK_URL="https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ",
    )
    pool = await database.open_pool(database_url, size=4, application="alerts", idle_limit=60)
    one = Alerts(pool, both)
    here = f"http://127.0.0.1:{channel.port}"
    discord, slack = list(one._channels)
    monkeypatch.setattr(type(discord), "notify_url", here)
    monkeypatch.setattr(type(slack), "webhook_url", here)
    async with pool.acquire() as own:
        await one.look(own)
    await pool.close()
    said = sorted(json.dumps(message) for message in channel.heard)
    assert len(said) == 2 and all("An event is dead: Bury" in text for text in said)


LIVE, TEST = b'{\n  "id": "evt_1",\n  "livemode": true\n}', b'{\n  "id": "evt_1",\n  "livemode": false\n}'


@pytest.mark.parametrize(
    ("refused", "reason", "accepted", "said"),
    [
        (b'{"id":"evt_1","livemode":true}', "no_match", None, "altered on the way"),
        (TEST, "no_match", LIVE, "of the other mode: all of them are test events"),
        (TEST, "no_match", None, "stripe listen"),
        (LIVE, "no_match", None, "not this endpoint's"),
        (LIVE, "no_match", LIVE, "a second endpoint"),
        (LIVE, "too_old", LIVE, "clock"),
    ],
)
def test_a_burst_of_bad_signatures_says_what_is_likely_behind_it(
    refused: bytes, reason: str, accepted: bytes | None, said: str
) -> None:
    signatures = Signatures()
    for _ in range(9):
        signatures.refused(reason, refused)
    if accepted:
        signatures.accepted(accepted)
    assert signatures.incident() is None, "nine in five minutes are no burst yet"
    signatures.refused(reason, refused)
    incident = signatures.incident()
    assert incident is not None
    assert said in incident.body


async def test_a_burst_is_told_and_told_over(
    db: Connection, database_url: str, settings: MakeSettings, channel: Channel
) -> None:
    async with alerts(database_url, settings, channel) as one, one.pool.acquire() as own:
        for _ in range(10):
            one.signatures.refused("no_match", LIVE)
        await one.look(own)
        assert channel.titles() == ["Kamiyo: Deliveries are refused: their signature does not fit"]
        one.signatures = Signatures()
        await one.look(own)
        assert len(channel.heard) == 1
        await db.execute("UPDATE webhook_incidents SET seen_at = now() - interval '6 minutes'")
        await one.look(own)
    assert channel.titles()[1].startswith("Kamiyo: Over:")
