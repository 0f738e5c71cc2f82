"""How the questions of the dashboard's pages, and of the alerts, are answered: by an index, and two at a time."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kamiyo import alerts, database, inbox
from kamiyo.database import Connection
from kamiyo.web import create_app
from kamiyo.web.dashboard import queries
from kamiyo.web.dashboard.queries import STATES, Search
from tests.conftest import DEADLINE, MakeSettings, NewDatabase, run_apart, running_client
from tests.dashboard.conftest import BASE, sign_in


@pytest.fixture(scope="module")
def ledger_url(new_database: NewDatabase) -> str:
    """A database with 20 000 events: enough that PostgreSQL chooses as it would among ten million."""
    url = new_database()

    async def fill() -> None:
        db = await database.connect(url, application="tests")
        await db.execute("""
            INSERT INTO webhook_events (event_id, event_type, stripe_created, created_at, lane, status, outcome,
                processed_at, failed_at, next_try_at, object_type, object_id, customer, account)
            SELECT 'evt_' || n, 'type.' || n % 12, t, t, 1,
                   CASE WHEN n % 100 = 0 THEN 'failed' WHEN n % 997 = 0 THEN 'pending' ELSE 'processed' END,
                   CASE WHEN n % 100 <> 0 AND n % 997 <> 0 THEN 'projected' END,
                   t, CASE WHEN n % 100 = 0 THEN t END,
                   CASE WHEN n % 300 = 0 OR n % 997 = 0 AND n % 100 <> 0 THEN t END,
                   'invoice', 'in_' || n / 5, 'cus_' || n % 700,
                   CASE WHEN n % 50 = 0 THEN 'acct_' || n % 1000 ELSE '' END
            FROM (SELECT n, now() - n * interval '1 minute' AS t FROM generate_series(1, 20000) AS n) AS events;
            INSERT INTO webhook_failures (event_id, event_type, retry_count, error_type, error_message, fingerprint)
            SELECT event_id, event_type, n, 'Oops', 'no', 'f' || length(event_id) FROM webhook_events,
                   generate_series(1, 5) AS n WHERE failed_at IS NOT NULL;
            INSERT INTO billing.customers (id, livemode, last_webhook_event_id, last_event_rank)
            SELECT 'cus_' || n, true, 'evt_1', 1 FROM generate_series(1, 20000) AS n;
            INSERT INTO billing.invoices (id, livemode, customer, last_webhook_event_id, last_event_rank)
            SELECT 'in_' || n, true, 'cus_' || n % 700, 'evt_1', 1 FROM generate_series(1, 20000) AS n;
            INSERT INTO billing.subscriptions (id, livemode, customer, last_webhook_event_id, last_event_rank)
            SELECT 'sub_' || n, true, 'cus_' || n % 700, 'evt_1', 1 FROM generate_series(1, 20000) AS n;
            INSERT INTO billing.payment_methods (id, livemode, customer, last_webhook_event_id, last_event_rank)
            SELECT 'pm_' || n, true, 'cus_' || n % 700, 'evt_1', 1 FROM generate_series(1, 20000) AS n;
            SELECT webhook_fold_counts();
        """)
        await db.execute("VACUUM ANALYZE")
        await db.close()

    run_apart(fill())
    return url


@pytest.fixture
async def ledger(ledger_url: str) -> AsyncIterator[Connection]:
    """A connection to the large ledger."""
    db = await database.connect(ledger_url, application="tests")
    yield db
    await db.close()


def position() -> tuple[datetime, int]:
    return datetime.now(UTC) - timedelta(days=10), 5


SEARCHES = [
    Search(),
    *(Search(status=state) for state in STATES),
    Search(type="type.3"),
    Search(type="type.none"),
    Search(customer="cus_5"),
    Search(object="in_5"),
    Search(account="acct_50"),
    Search(account="acct_none"),
    Search(account=""),
    Search(context="acct_50/acct_5"),
    Search(customer="cus_5", account="", livemode=True),
    Search(status="failed", type="type.4"),
    Search(status="dead", customer="cus_5"),
    Search(status="dead", type="type.4"),
    Search(status="pending", type="type.4"),
    Search(since=position()[0], until=position()[0] + timedelta(days=1)),
    Search(type="type.3", since=position()[0]),
]


async def plan(db: Connection, name: str, *values: Any) -> str:
    """How PostgreSQL answers a question of the dashboard, as text."""
    async with db.transaction(readonly=True):
        await queries.limit(db, 5)
        whose, _, question = name.rpartition(": ")
        query = {"": queries._SQL, "alerts": alerts._SQL, "inbox": inbox._SQL}[whose][question]
        if question in ("list", "newer_events"):
            query = inbox.of_unfinished(query, values[0])
        return "\n".join(line for (line,) in await db.fetch("EXPLAIN " + query, *values))


def narrowed(search: Search) -> str:
    """What the search is narrowed to, without its moments: a name that every process gives alike."""
    by = {name: value for name, value in asdict(search).items() if value}
    return " ".join(name if isinstance(value, datetime) else f"{name}={value}" for name, value in by.items())


@pytest.mark.parametrize("search", SEARCHES, ids=narrowed)
async def test_a_page_of_events_is_found_by_an_index_whatever_it_is_narrowed_to(
    search: Search, ledger: Connection
) -> None:
    for name, at in (("inbox: list", (None, None)), ("inbox: list", position()), ("newer_events", position())):
        found = await plan(ledger, name, *search.values(), *at, queries.PAGE + 1)
        # What is not finished is little here, and what is little may be read from end to end.
        assert not re.search(r"Seq Scan on webhook(?!_unfinished)", found), found
        assert "Scan" in found


_QUESTIONS: list[tuple[str, tuple[Any, ...]]] = [
    ("dead", (queries.MOST_COUNTED,)),
    ("standing", (queries.MOST_COUNTED,)),
    ("groups", (queries.MOST_GROUPED, False)),
    ("groups", (2000, True)),
    ("failed_counts", (queries.MOST_GROUPED,)),
    ("group_example", ("f8",)),
    ("found", ("evt_77", "evt_77\U0010ffff", 10)),
    ("found", ("cus_77", "cus_77\x01", 10)),
    ("around_customer", ("cus_5", *position(), 5, "", False)),
    ("around_object", ("in_5", *position(), 5, "", False)),
    ("earlier_of_object", ("in_5", "", False, position()[0], "evt_1")),
    ("whose_customer", ("cus_5",)),
    ("customer", ("cus_5", "", False)),
    ("subscriptions", ("cus_5", "", False, 25)),
    ("invoices", ("cus_5", "", False, 25)),
    ("payment_methods", ("cus_5", "", False, 25)),
    ("timeline", ("cus_5", "", False, *position(), 31)),
    ("undecided", (100,)),
    ("now_customers", ("cus_5", "", True)),
    ("now_subscriptions", ("sub_5", "", True)),
    ("now_invoices", ("in_5", "", True)),
    ("now_payment_methods", ("pm_5", "", True)),
    ("mirrored", ("in_5", "invoice", "", True)),
    ("group_events", ("f8", queries.PAGE)),
    ("replay_outcome", ("f8", position()[0], queries.MOST_FOLLOWED)),
    ("traffic_by_minute", (position()[0], 60)),
    ("traffic_by_hour", (position()[0], 3600)),
    ("types", (position()[0], 12)),
    ("day", ()),
    ("known_types", ()),
    ("alerts: dead", ()),
    ("alerts: failure_rates", ()),
    ("alerts: overdue", ()),
    ("alerts: reads_overdue", ()),
    ("alerts: never_came", ()),
    ("alerts: silence", ()),
    ("alerts: to_tell", ()),
]

#: Questions to small tables of their own, and statements that are none.
_SMALL = {
    *("newer_events", "limits"),  # asked above, and a setting
    *("backlog", "sample_backlog", "by_hand", "begin_replay", "tell_replay", "end_replay", "replay"),
    *(f"alerts: {name}" for name in ("alone", "open", "close", "close_bursts", "forget_untold")),
    *(f"alerts: {name}" for name in ("told", "told_over", "missed", "stripe_refuses")),
}


@pytest.mark.parametrize(
    ("name", "values"),
    _QUESTIONS,
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_every_other_question_is_answered_by_an_index_too(
    name: str, values: tuple[Any, ...], ledger: Connection
) -> None:
    found = await plan(ledger, name, *values)
    for table in ("webhook_events", "webhook_payloads", "customers", "subscriptions", "invoices", "payment_methods"):
        assert not re.search(rf"Seq Scan on {table}\b", found), found


def test_no_question_of_the_pages_or_of_the_alerts_is_left_out() -> None:
    every = {*queries._SQL, *(f"alerts: {name}" for name in alerts._SQL)}
    assert every == {name for name, _ in _QUESTIONS} | _SMALL


async def test_the_first_page_reads_a_few_thousand_events_at_most_however_many_there_are(ledger: Connection) -> None:
    # 20 000 stand for ten million: nothing of the first page grows with them but what is failed or waits, and that
    # is counted to a bound.
    for name, values in (("standing", (queries.MOST_COUNTED,)), ("dead", (queries.MOST_COUNTED,))):
        async with ledger.transaction(readonly=True):
            await queries.limit(ledger, 5)
            explained = await ledger.fetchval("EXPLAIN (ANALYZE, FORMAT JSON) " + queries._SQL[name], *values)
        read: list[float] = []

        def collect(node: dict[str, Any], read: list[float] = read) -> None:
            if node.get("Relation Name") in ("webhook_events", "webhook_unfinished"):
                read.append(node["Actual Rows"] * node["Actual Loops"])
            for child in node.get("Plans", []):
                collect(child)

        collect(json.loads(explained)[0]["Plan"])
        assert read and max(read) <= 1000, explained


async def test_questions_are_asked_two_at_a_time_so_that_receiving_keeps_its_connections(
    database_url: str, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, most = 0, 0
    two_ask = asyncio.Event()
    known_types = queries.known_types

    async def counted(db: Connection) -> list[str]:
        nonlocal together, most
        together += 1
        most = max(most, together)
        if together == 2:
            two_ask.set()
        async with asyncio.timeout(DEADLINE):
            await two_ask.wait()
        # The time of a slow question, spent in PostgreSQL, so that all who may ask at a time do.
        await db.execute("SELECT pg_sleep(0.01)")
        together -= 1
        return await known_types(db)

    monkeypatch.setattr(queries, "known_types", counted)
    async with running_client(create_app(settings(KAMIYO_WORKER=False))) as client:
        await sign_in(client)
        answers = await asyncio.gather(*(client.get(f"{BASE}/events") for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert most == 2
