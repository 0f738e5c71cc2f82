"""The dashboard's first page: what needs a person, how it goes, and what nobody can decide."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from kamiyo import inbox
from kamiyo.alerts import Incident
from kamiyo.database import Connection
from kamiyo.web.dashboard import attention, queries
from kamiyo.web.dashboard.queries import RANGES
from tests.conftest import PREFIX, event_json, until
from tests.dashboard.conftest import BASE, links, live_part, page, put, put_dead, words


async def test_an_empty_system_says_how_to_get_the_first_event(quiet_desk: httpx.AsyncClient) -> None:
    text = words(await page(quiet_desk))
    assert "Ready" in text and "kamiyo trigger --story signup" in text
    assert "No event has come in yet" in text


async def test_what_needs_a_person_comes_first_with_its_causes_and_a_way_to_retry_each(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    for _ in range(3):
        await put_dead(db, "aaa")
    await put_dead(db, "bbb")
    text = await page(quiet_desk)
    said = words(live_part(text))
    assert said.index("Needs you now") < said.index("4 events are dead") < said.index("How it goes")
    assert "shop.errors.Oops billing.py:41 in grant" in said
    assert "no such plan" in said and "3 dead" in said and "1 dead" in said
    assert links(text, f"{BASE}/failures/aaa/retry") and links(text, f"{BASE}/failures/bbb/retry")
    assert re.search(r'<span id="dead">4</span>', text)


async def test_when_nothing_is_wrong_it_says_so(quiet_desk: httpx.AsyncClient, db: Connection) -> None:
    await put(db)
    text = words(await page(quiet_desk))
    assert "All is well" in text and "Nothing needs you" in text


async def test_the_pictures_show_what_came_in_what_failed_how_long_it_took_and_what_waits(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    # In one moment, so that all of them are in one step of each picture.
    together: dict[str, Any] = {"created_at": datetime.now(UTC)}
    for _ in range(6):
        await put(db, processing_us=4000, **together)
    for _ in range(2):
        await put(db, status="failed", **together)
    await put(db, status="pending", processed_at=None, **together)
    # The server took its look at this minute when it started.
    await until(lambda: db.fetchval("UPDATE webhook_backlog_by_minute SET waiting = 1 RETURNING waiting"))
    for name in RANGES:
        text = await page(quiet_desk, f"?range={name}")
        figures = re.findall(r'<span class="picture-title">(\w+ ?\w*)</span>\s*<span class="figure">(.*?)</span>', text)
        assert figures == [
            ("Throughput", "9"),
            ("Failure rate", "25\N{NARROW NO-BREAK SPACE}%"),
            ("Latency", "4.0 ms"),
            ("Backlog", "1"),
        ]
        assert text.count('<svg class="chart"') == 4
        assert text.count('class="hit"') == 4 * RANGES[name].steps
        assert "1 waiting, 0 to be tried again" in text
        assert re.search(r"<title>[^<]*· 9 received, 2 failed</title>", text)
        assert f'data-live="{RANGES[name].every}"' in text
        # The same as numbers, for whoever sees no picture.
        assert re.search(r'<td class="right">9</td><td class="right">6</td><td class="right">2</td>', text)


async def test_an_older_event_is_in_the_range_it_belongs_to_and_in_no_shorter_one(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    await put(db, age=timedelta(hours=3))
    await put(db, age=timedelta(days=3))
    counts = {}
    for name in RANGES:
        found = re.search(r'Throughput</span>\s*<span class="figure">(\d+)', await page(quiet_desk, f"?range={name}"))
        assert found is not None
        counts[name] = int(found[1])
    assert counts == {"1h": 0, "24h": 1, "7d": 2}


async def test_folded_and_fresh_counts_add_up_to_the_same_picture(db: Connection) -> None:
    now = datetime.now(UTC)
    await put(db, created_at=now - timedelta(minutes=10))
    fresh = {name: await queries.steps(db, chosen, now) for name, chosen in RANGES.items()}
    await inbox.fold_counts(db)
    await put(db, created_at=now - timedelta(minutes=10))
    for name, chosen in RANGES.items():
        steps = await queries.steps(db, chosen, now)
        assert [step.at for step in steps] == [step.at for step in fresh[name]]
        assert [step.received for step in steps] == [2 * step.received for step in fresh[name]]
        assert sum(step.received for step in steps) == 2


async def test_the_backlog_is_written_down_once_a_minute_by_a_server_that_runs(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    await until(lambda: db.fetchval("SELECT count(*) FROM webhook_backlog_by_minute"))
    await db.execute("DELETE FROM webhook_backlog_by_minute")
    await put(db, status="pending", processed_at=None, age=timedelta(seconds=90))
    await put(db, status="failed", next_try_at=datetime.now(UTC) + timedelta(minutes=5))
    await put(db, status="failed")
    await db.execute("INSERT INTO webhook_backlog_by_minute VALUES (now() - interval '9 days', 7, 7, 7)")
    async with db.transaction():  # of one moment: between two of them a minute may end
        await queries.sample_backlog(db)
        await queries.sample_backlog(db)
    [row] = await db.fetch("SELECT * FROM webhook_backlog_by_minute")
    assert (row["waiting"], row["retrying"]) == (1, 1)
    assert 89 < row["oldest_due_seconds"] < 120
    await db.execute("DELETE FROM webhook_backlog_by_minute")


async def test_the_script_gets_only_the_part_that_changes(quiet_desk: httpx.AsyncClient, db: Connection) -> None:
    await put_dead(db)
    answer = await quiet_desk.get(BASE, headers={"X-Fragment": "live"})
    assert answer.text.startswith('<div id="live"')
    assert "<html" not in answer.text and "1 event is dead" in answer.text
    assert 'data-dead="1"' in answer.text


STANDING: dict[str, Any] = {
    "waiting": 0,
    "retrying": 0,
    "next_retry_at": None,
    "oldest_event_id": None,
    "oldest_due_seconds": 0.0,
    "unread": 0,
    "oldest_unread_seconds": 0.0,
    "circuit_opened_at": None,
    "lanes_held": 0,
    "now": datetime(2026, 11, 23, 3, 0, tzinfo=UTC),
}


def told(**facts: Any) -> list[tuple[str, str]]:
    """Tone and title of what attention makes of these facts; all else is well."""
    names = ("dead", "groups", "undecided", "secret_set", "day", "incidents")
    other = {name: facts.pop(name) for name in names if name in facts}
    values: dict[str, Any] = {
        "dead": 0,
        "groups": [],
        "undecided": 0,
        "incidents": [],
        "secret_set": True,
        "day": {"received": 100, "failed": 0},
        **other,
    }
    found = attention.concerns(standing=STANDING | facts, **values)
    return [(concern.tone, concern.title) for concern in found]


def test_every_kind_of_trouble_has_its_sentence_and_the_worst_comes_first() -> None:
    assert told() == []
    assert told(secret_set=False) == [("bad", "No event can come in")]
    assert told(oldest_due_seconds=59.0) == []
    late = {"oldest_due_seconds": 90.0, "oldest_event_id": "evt_1", "waiting": 3}
    assert told(**late) == [("bad", "Nothing is being processed")]
    assert told(**late, lanes_held=2) == [("warn", "Processing is behind")]
    assert told(**late | {"oldest_due_seconds": 301.0}, lanes_held=2) == [("bad", "Processing is behind")]
    assert told(dead=1) == [("bad", "1 event is dead")]
    thin = "\N{NARROW NO-BREAK SPACE}"
    assert told(dead=99_999) == [("bad", f"10{thin}000+ events are dead")]
    assert told(day={"received": 10, "failed": 1}) == []
    assert told(day={"received": 100, "failed": 11}) == [("bad", f"11{thin}% of the last 24 hours failed")]
    assert told(undecided=2) == [("warn", "2 billing rows are undecided")]
    assert told(retrying=1) == [("calm", "1 failed event is tried again by itself")]
    away = {"circuit_opened_at": STANDING["now"] - timedelta(minutes=2), "unread": 1}
    assert told(**away) == [("calm", "Stripe's API has not answered for 2 min")]
    assert told(unread=3, oldest_unread_seconds=59.0) == []
    assert told(unread=3, oldest_unread_seconds=61.0) == [("calm", "Reading from Stripe is behind")]
    overdue = Incident("reads_overdue", "Events wait to be read from Stripe", "…", "/events?status=unread")
    assert told(**away, incidents=[overdue]) == [("warn", "Events wait to be read from Stripe")], "said once"
    everything = told(dead=1, retrying=2, undecided=1, day={"received": 10, "failed": 5})
    assert [tone for tone, _ in everything] == ["bad", "warn", "warn", "calm"]


def test_what_an_alert_would_tell_the_page_tells_too_and_what_it_says_in_more_words_only_once() -> None:
    silence = Incident("silence", "No events come any more", "…", "/")
    refused = Incident("bad_signatures", "Deliveries are refused", "…", "/")
    died = Incident("event_died:abc", "An event is dead", "…", "/failures/abc")
    overdue = Incident("overdue", "Events wait too long", "…", "/events?status=pending")
    assert told(incidents=[silence, died, overdue, refused], dead=1) == [
        ("bad", "1 event is dead"),
        ("bad", "Deliveries are refused"),
        ("warn", "No events come any more"),
    ]


def test_many_types_that_fail_at_once_are_one_concern() -> None:
    rates = [Incident(f"failure_rate:type.{n}", f"type.{n} fails often", "…", "/failures") for n in range(3)]
    assert told(incidents=rates) == [("warn", "3 types of events fail often")]
    assert told(incidents=rates[:1]) == [("warn", "type.0 fails often")]


async def test_deliveries_that_are_refused_are_on_the_first_page(quiet_desk: httpx.AsyncClient) -> None:
    for _ in range(12):
        await quiet_desk.post(f"{PREFIX}/stripe", content=event_json(), headers={"Stripe-Signature": "t=1,v1=00"})
    assert "Deliveries are refused: their signature does not fit" in words(await page(quiet_desk))


async def test_a_circuit_that_nobody_tries_any_more_is_not_told(quiet_desk: httpx.AsyncClient, db: Connection) -> None:
    await put(db)
    await db.execute("INSERT INTO webhook_api_budget DEFAULT VALUES ON CONFLICT DO NOTHING")
    opened = "UPDATE webhook_api_budget SET refusals = 3, opened_at = now() - interval '1 hour', open_until = now() "
    await db.execute(f"{opened} + interval '1 minute'")
    assert "Stripe's API has not answered for 60 min" in words(await page(quiet_desk))
    assert (await inbox.queue(db))["circuit_open"] == 1
    # Since then nobody has asked: the key was taken out.
    await db.execute(f"{opened} - interval '6 minutes'")
    assert "Nothing needs you" in words(await page(quiet_desk))
    assert (await inbox.queue(db))["circuit_open"] == 0


async def test_rows_that_nothing_decides_are_listed_with_the_event_that_made_them(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    assert "Every row is decided" in await page(quiet_desk, "/undecided")
    await put(db)
    await db.execute(
        "INSERT INTO billing.invoices (id, livemode, customer, last_webhook_event_id, last_event_rank, order_evidence) "
        "VALUES ('in_1', true, 'cus_1', 'evt_9', 1, 'undecided')"
    )
    assert "1 billing row is undecided" in words(await page(quiet_desk))
    said = words(await page(quiet_desk, "/undecided"))
    assert "invoice in_1 cus_1 evt_9" in said
