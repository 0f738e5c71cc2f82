"""The plans of the queries that run all the time: each has an index, and none reads the whole ledger.

On a ledger of 20,000 events PostgreSQL already chooses what it would choose on ten million. With ten events it
would rightly read them all, so no other test can see an index go missing.
"""

import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from kamiyo import database, inbox, projections
from kamiyo.database import Connection, load_queries
from kamiyo.handlers import Registry
from kamiyo.inbox import Filters, Outcome, Settled
from kamiyo.projections import THIN_ENDS
from kamiyo.receive import ready_to_project
from tests.conftest import NewDatabase, event_json, run_apart
from tests.turns import NOW, example, read

EVENTS = 20_000
#: What one key of test mode can read.
REACH: tuple[list[str], list[str], list[str]] = (["f"], [], [])
BIG = ("webhook_events", "webhook_payloads", "webhook_failures", "billing")

_SQL = load_queries("inbox.sql")
_DASHBOARD = load_queries("web/dashboard/dashboard.sql")

# A tenth of a percent waits, as much is dead; bodies lie in all nine days that have a table.
_FILL = f"""
INSERT INTO webhook_events (
    event_id, event_type, stripe_created, created_at, lane, object_type, object_id, customer, account,
    status, outcome, processed_at, next_try_at, failed_at, attempts
)
SELECT 'evt_' || n, (ARRAY['invoice.paid', 'customer.updated', 'charge.succeeded', 'payout.paid'])[n % 4 + 1],
       now() - n * interval '1 second', now() - interval '1 day' + (n % 9) * interval '1 day',
       n % 5000, 'invoice', 'in_' || n % 10000, 'cus_' || n % 5000,
       CASE WHEN n % 100 = 0 THEN 'acct_1' ELSE '' END,
       CASE WHEN n % 1000 = 0 THEN 'pending' WHEN n % 1000 = 1 THEN 'failed' ELSE 'processed' END,
       CASE WHEN n % 1000 > 1 THEN 'ignored' END, CASE WHEN n % 1000 > 1 THEN now() END,
       CASE WHEN n % 1000 = 0 THEN now() END, CASE WHEN n % 1000 = 1 THEN now() END, 1
FROM generate_series(1, {EVENTS}) AS n;
INSERT INTO webhook_payloads (seq, created_at, body)
SELECT seq, created_at, convert_to(repeat(event_id, 20), 'UTF8') FROM webhook_events;
INSERT INTO webhook_failures (event_id, event_type, retry_count, error_type, error_message, fingerprint)
SELECT event_id, event_type, 5, 'ValueError', 'no', 'f' || seq % 10 FROM webhook_events WHERE seq % 10 = 1;
INSERT INTO billing.customers (id, livemode, last_webhook_event_id, last_event_rank)
SELECT 'cus_' || n, false, 'evt_' || n, n FROM generate_series(1, {EVENTS}) AS n;
"""  # noqa: S608 - a number of our own


# Much was unfinished once, and is no more: a table of one page would rightly be read from end to end.
_LONGER_DAYS = f"""
INSERT INTO webhook_unfinished SELECT now(), -n, now(), 1, false, 'was_' || n FROM generate_series(1, {EVENTS}) AS n;
DELETE FROM webhook_unfinished WHERE seq < 0;
"""  # noqa: S608 - a number of our own


@pytest.fixture(scope="module")
def filled(new_database: NewDatabase) -> Iterator[str]:
    """The address of a database with a ledger of some size, freshly analysed."""
    url = new_database()

    async def fill() -> None:
        db = await asyncpg.connect(url)
        await db.execute(_FILL)
        await db.execute(_LONGER_DAYS)
        await db.execute("VACUUM (ANALYZE, TRUNCATE false)")
        await db.close()

    run_apart(fill())
    yield url


@pytest.fixture
async def ledger(filled: str) -> AsyncIterator[Connection]:
    """A connection to it, in a transaction that is undone."""
    db = await database.connect(filled, application="test")
    transaction = db.transaction()
    await transaction.start()
    yield db
    await transaction.rollback()
    # Rows that were undone are dead, and in the indexes; the next test's plans would be of a ledger full of them.
    await db.execute("VACUUM (ANALYZE, TRUNCATE false, INDEX_CLEANUP true) webhook_events, webhook_unfinished")
    await db.close()


@contextlib.asynccontextmanager
async def ledger_changed(new_database: NewDatabase, change: str, *values: Any) -> AsyncIterator[Connection]:
    """A ledger of its own: what ANALYZE finds and what an index has grown to, no rollback takes back."""
    db = await database.connect(new_database(), application="test")
    await db.execute(_FILL)
    await db.execute(change, *values)
    await db.execute("VACUUM ANALYZE")
    yield db
    await db.close()


#: PostgreSQL plans a statement for its parameters, or once for all of them. Either must do.
modes = pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])


async def plan(db: Connection, sql: str, *values: Any, mode: str) -> list[dict[str, Any]]:
    """The nodes of the plan that `sql` is run by, and run they are."""
    await db.execute(f"SET LOCAL plan_cache_mode = {mode}")
    await db.execute(f"PREPARE asked AS {sql}")
    try:
        literals = ", ".join([await db.fetchval("SELECT quote_nullable($1::text)", _text(value)) for value in values])
        execute = f"EXECUTE asked({literals})" if values else "EXECUTE asked"
        [root] = json.loads(await db.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {execute}"))
    finally:
        await db.execute("DEALLOCATE asked")
    return list(_nodes(root["Plan"]))


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        return "{" + ",".join(value) + "}"
    if isinstance(value, datetime):
        return value.isoformat()
    return None if value is None else str(value)


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", []):
        yield from _nodes(child)


def scanned(nodes: list[dict[str, Any]]) -> set[str]:
    """Tables that are read from end to end."""
    return {
        node["Relation Name"]
        for node in nodes
        if node["Node Type"] == "Seq Scan" and node["Relation Name"].startswith(BIG) and node["Actual Loops"]
    }


def indexes(nodes: list[dict[str, Any]]) -> set[str]:
    return {node["Index Name"] for node in nodes if "Index Name" in node and node["Actual Loops"]}


def partitions(nodes: list[dict[str, Any]]) -> set[str]:
    """Days of bodies that were looked into."""
    names = {node["Relation Name"] for node in nodes if "Relation Name" in node and node["Actual Loops"]}
    return {name for name in names if name.startswith("webhook_payloads")}


def rows_read(nodes: list[dict[str, Any]], index: str) -> int:
    """Rows that came out of an index, those a filter then threw away included."""
    return sum(
        (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
        for node in nodes
        if node.get("Index Name") == index
    )


# ── The worker's turn ───────────────────────────────────────────────────────────────────────────────────────


async def reads_so_far(db: Connection) -> dict[str, tuple[int, int, int]]:
    """Of each table, in this transaction: scans from end to end, scans of its indexes, rows found by them."""
    rows = await db.fetch("SELECT relname, seq_scan, idx_scan, idx_tup_fetch FROM pg_stat_xact_user_tables")
    return {row["relname"]: (row["seq_scan"], row["idx_scan"] or 0, row["idx_tup_fetch"] or 0) for row in rows}


async def reads_since(db: Connection, before: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
    """The same, for what was read after `before`."""
    now, none = await reads_so_far(db), (0, 0, 0)
    return {
        name: (s - was[0], i - was[1], f - was[2]) for name, (s, i, f) in now.items() if (was := before.get(name, none))
    }


async def test_a_question_about_all_payloads_is_not_shared_out_where_postgresql_would(ledger: Connection) -> None:
    for setting in ("parallel_setup_cost", "parallel_tuple_cost", "min_parallel_table_scan_size"):
        await ledger.execute(f"SET LOCAL {setting} = 0")
    assert "Gather" in await ledger.fetchval("EXPLAIN (FORMAT JSON) SELECT body FROM webhook_payloads")
    assert "Gather" not in await ledger.fetchval("EXPLAIN (FORMAT JSON) SELECT payload FROM webhook_event_payloads")
    # None of these bodies is JSON: each is caught, which PostgreSQL up to 16 refuses to do in shared work.
    unread = await ledger.fetchval("SELECT count(*) FROM webhook_event_payloads WHERE payload IS NULL")
    assert unread == EVENTS


async def test_claiming_looks_up_what_is_due_and_each_body_in_the_day_it_lies_in(ledger: Connection) -> None:
    # Those whose numbers are apart by a multiple of nine lie in one day.
    await ledger.execute(
        "UPDATE webhook_events SET next_try_at = NULL, failed_at = NULL, status = 'processed', outcome = 'ignored', "
        "processed_at = now() WHERE next_try_at IS NOT NULL AND event_id NOT IN ('evt_9000', 'evt_18000')"
    )
    before = await reads_so_far(ledger)
    _, batch = await inbox.claim(ledger, 10)
    assert {claimed.event.id for claimed in batch} == {"evt_9000", "evt_18000"}
    read = await reads_since(ledger, before)
    assert not {name for name, (scans, _, _) in read.items() if scans and name.startswith(BIG)}
    assert read["webhook_events"][2] <= EVENTS // 1000 + 10 * len(batch)
    assert len([name for name, (_, scans, _) in read.items() if scans and name.startswith("webhook_payloads_")]) == 1
    await inbox.unlock(ledger)


async def test_neither_a_claim_nor_settling_writes_an_index_of_the_ledger(db: Connection) -> None:
    # Whoever has a snapshot keeps what it sees, and so the room that settling needs: 120 of 200, with one held. Here
    # that can only be autovacuum, which looks at some other table for a moment; so it is done three times.
    shares = [await in_place_of_a_turn(db, turn) for turn in range(3)]
    # The last rows of a page may find it full.
    assert max(shares) >= 180, "the new version of a row is on the old one's page"
    assert await db.fetchval("SELECT count(*) FROM webhook_unfinished") == 0


async def in_place_of_a_turn(db: Connection, turn: int) -> int:
    """Of the 200 new versions that a claim of 100 events and their settling make, how many write no index."""
    ids = [f"{turn}_{n}" for n in range(100)]
    bodies = [event_json(f"evt_{name}", "customer.updated", example("customer", id=f"cus_{name}")) for name in ids]
    await inbox.put(db, [read(body) for body in bodies])
    before = await db.fetchrow(_REWRITTEN) or (0, 0)
    number, batch = await inbox.claim(db, 200)
    await inbox.succeed(db, number, [Settled(c.event.id, Outcome.projected, 1, 1) for c in batch])
    await inbox.unlock(db)
    after = await db.fetchrow(_REWRITTEN) or (0, 0)
    assert after[0] - before[0] == 200
    return int(after[1] - before[1])


async def test_a_claim_amid_a_long_backlog_does_not_pass_what_is_done_though_somebodys_snapshot_keeps_it(
    new_database: NewDatabase,
) -> None:
    url = new_database()
    db, holder = [await database.connect(url, application="test") for _ in range(2)]
    await db.execute(_FILL)
    await db.execute(
        "UPDATE webhook_events SET status = 'pending', outcome = NULL, processed_at = NULL, failed_at = NULL, "
        "next_try_at = now() - make_interval(secs => seq)"
    )
    await db.execute("VACUUM ANALYZE")
    async with holder.transaction(isolation="repeatable_read"):
        assert await holder.fetchval("SELECT count(*) FROM webhook_unfinished") == EVENTS
        await db.execute(
            "UPDATE webhook_events SET status = 'processed', outcome = 'ignored', processed_at = now(), "
            "next_try_at = NULL WHERE seq > 1000"
        )
        async with db.transaction():
            pages = [await db.fetchval(_QUEUE_PAGES)]
            taken = await inbox.claim_since(db, None, 10)
            pages.append(await db.fetchval(_QUEUE_PAGES))
            assert len((await inbox.claim_since(db, taken.first_due, 10)).events) == 10
            pages.append(await db.fetchval(_QUEUE_PAGES))
    from_the_beginning, from_where_it_begins = pages[1] - pages[0], pages[2] - pages[1]
    assert from_the_beginning > 100 > 20 > from_where_it_begins
    await db.close()
    await holder.close()


# Looks at a page of the queue that this session has not reported yet; dead rows' pages included.
_QUEUE_PAGES = """
SELECT sum(pg_stat_get_xact_blocks_fetched(oid))::bigint FROM pg_class WHERE starts_with(relname, 'webhook_unfinished')
"""


# What this session has written and not reported yet is the one, what it has reported the other.
_REWRITTEN = """
SELECT x.n_tup_upd + s.n_tup_upd, x.n_tup_hot_upd + s.n_tup_hot_upd
FROM pg_stat_xact_user_tables AS x JOIN pg_stat_user_tables AS s USING (relid) WHERE x.relname = 'webhook_events'
"""


async def test_plans_that_a_session_made_while_there_was_little_are_right_when_there_is_much(
    new_database: NewDatabase,
) -> None:
    db = await database.connect(new_database(), application="test")
    customer = example("customer", id="cus_7")

    async def receive(*bodies: bytes) -> inbox.Stored:
        arrivals, rows = ready_to_project([read(body) for body in bodies], Registry())
        return await inbox.put_projected(db, arrivals, rows, microseconds=1)

    def told(event_id: str, turn: int) -> bytes:
        return event_json(event_id, "customer.updated", customer, created=NOW + turn)

    await db.execute("ALTER TABLE webhook_events SET (autovacuum_enabled = false)")
    await db.execute("VACUUM ANALYZE")  # so that PostgreSQL knows how little there is
    for turn in range(7):  # past the five times that PostgreSQL plans anew by itself
        await inbox.claim(db, 10)
        await inbox.unlock(db)
        # New, known, and of one second with another: every statement of the function.
        await receive(told(f"evt_first_{turn}", turn))
        await receive(told(f"evt_first_{turn}", turn), told(f"evt_next_{turn}", turn))
    # Not TRUNCATE, which would make PostgreSQL plan again.
    await db.execute("DELETE FROM billing.customers; DELETE FROM webhook_payloads; DELETE FROM webhook_events")
    await db.execute(_FILL)
    await db.execute("INSERT INTO webhook_tombstones SELECT 'gone_' || n, now() FROM generate_series(1, 20000) AS n")

    # In one transaction: at the end of one PostgreSQL may hand these numbers over, about once a second, and begin anew.
    async with db.transaction():
        before = await reads_so_far(db)
        _, batch = await inbox.claim(db, 10)
        assert len(batch) == 10
        known = (await receive(told("evt_7", 8), told("gone_7", 8), told("evt_second", 8), told("evt_third", 8))).known
        assert known == {"evt_7": "processed", "gone_7": "processed"}
        found = await reads_since(db, before)
        assert not {
            name for name, (scans, _, _) in found.items() if scans and name.startswith((*BIG, "webhook_tomb", "cust"))
        }
        await db.fetch("SELECT max(processing_us) FROM webhook_events")
        assert (await reads_since(db, before))["webhook_events"][0] == 1, "it would be seen"
    await db.close()


async def test_events_that_wait_to_be_read_are_in_nobodys_way_and_found_at_once(ledger: Connection) -> None:
    await ledger.execute(
        "UPDATE webhook_events SET status = 'pending', outcome = NULL, processed_at = NULL, read_due_at = now(), "
        "read_try_at = now(), next_try_at = now() + interval '1 hour' WHERE seq % 4 = 3 AND status = 'processed'"
    )
    before = await reads_so_far(ledger)
    _, batch = await inbox.claim(ledger, 10)
    assert (await reads_since(ledger, before))["webhook_events"][2] <= EVENTS // 1000 + 10 * len(batch)
    await inbox.unlock(ledger)
    reader = load_queries("reader.sql")
    nodes = await plan(ledger, reader["take"], 8, 15, list(THIN_ENDS), *REACH, mode="force_custom_plan")
    assert scanned(nodes) == set()
    assert rows_read(nodes, "webhook_events_read_try") <= 500
    second = int(time.time()) + 100
    nodes = await plan(ledger, reader["ready"], "in_3", "", False, second, "cus_1", 7, mode="force_custom_plan")
    assert scanned(nodes) == set()
    nodes = await plan(ledger, reader["renew"], ["evt_3", "evt_7"], 15, mode="force_custom_plan")
    assert scanned(nodes) == set()
    nodes = await plan(ledger, reader["not_yet_alike"], "", False, "invoice", 60, 600, mode="force_custom_plan")
    assert "webhook_events_read_try" in indexes(nodes)
    # All 5,000 of them, and none twice.
    assert sum(rows_read(nodes, index) for index in indexes(nodes)) <= 2 * 5000
    nodes = await plan(ledger, reader["told"], [], mode="force_custom_plan")
    assert scanned(nodes) == set()
    for query in ("health", "queue"):
        nodes = await plan(ledger, _SQL[query], mode="force_custom_plan")
        assert scanned(nodes) == set()


@modes
async def test_settling_looks_up_each_event(mode: str, ledger: Connection) -> None:
    columns = (["evt_1", "evt_2"], ["handled", "ignored"], ["1", "1"], ["10", "10"])
    nodes = await plan(ledger, _SQL["succeed"], 1, *columns, mode=mode)
    assert (scanned(nodes), indexes(nodes)) == (set(), {"webhook_events_pkey"})
    failure = ("ValueError", "no", "", "f00d")
    nodes = await plan(ledger, _SQL["fail"], "evt_1", 1, 1, 10.0, 10, *failure, mode=mode)
    assert (scanned(nodes), indexes(nodes)) == (set(), {"webhook_events_pkey"})


@modes
async def test_when_to_look_again_is_read_off_the_index_of_what_is_due(mode: str, ledger: Connection) -> None:
    nodes = await plan(ledger, _SQL["next_due"], mode=mode)
    assert (scanned(nodes), indexes(nodes)) == (set(), {"webhook_unfinished_due"})
    assert rows_read(nodes, "webhook_unfinished_due") == 1


@modes
async def test_the_events_of_one_second_are_found_by_their_object(mode: str, ledger: Connection) -> None:
    second = await ledger.fetchval(
        "SELECT extract(epoch FROM stripe_created) FROM webhook_events WHERE event_id = 'evt_7'"
    )
    nodes = await plan(ledger, _SQL["of_second"], "in_7", "", False, int(second), mode=mode)
    assert scanned(nodes) == set()
    assert "webhook_events_object" in indexes(nodes)
    assert rows_read(nodes, "webhook_events_object") <= 1
    assert len(partitions(nodes)) <= 1


@modes
async def test_an_objects_history_is_found_by_its_object(mode: str, ledger: Connection) -> None:
    nodes = await plan(ledger, _SQL["of_object"], "in_7", "", False, mode=mode)
    assert scanned(nodes) == set()
    assert "webhook_events_object" in indexes(nodes)
    assert rows_read(nodes, "webhook_events_object") == 2
    assert len(partitions(nodes)) <= 2


async def test_storing_and_projecting_reads_no_big_table_from_end_to_end(ledger: Connection) -> None:
    async def read_through() -> set[str]:
        found = await ledger.fetch("SELECT relname FROM pg_stat_xact_user_tables WHERE seq_scan > 0")
        return {name for (name,) in found if name.startswith(BIG) or name == "customers"}

    customers = [example("customer", id=f"cus_{number}") for number in range(20)]
    for turn in range(8):  # past the five that PostgreSQL plans anew before it settles on a plan
        bodies = [
            event_json(f"evt_new_{turn}_{one['id']}", "customer.updated", one, created=NOW + turn) for one in customers
        ]
        arrivals, rows = ready_to_project([read(body) for body in bodies], Registry())
        stored = await inbox.put_projected(ledger, arrivals, rows, microseconds=1)
        assert (stored.known, stored.left) == ({}, set())
        await inbox.put(ledger, [read(body.replace(b"evt_new", b"evt_put")) for body in bodies])
        await projections.write(ledger, rows, force=True)
    assert await read_through() == set()
    await ledger.fetch("SELECT max(processing_us) FROM webhook_events")
    assert await read_through() == {"webhook_events"}, "it would be seen"


# ── Looking ─────────────────────────────────────────────────────────────────────────────────────────────────

_SOON = datetime.now(UTC) + timedelta(days=2)
_LISTS: dict[str, tuple[Filters, tuple[datetime, int] | None, str]] = {
    "everything": (Filters(), None, "webhook_events_created_at"),
    "the next page": (Filters(), (_SOON, 100), "webhook_events_created_at"),
    "failed": (Filters(status="failed"), None, ""),
    "dead": (Filters(status="dead"), None, ""),
    "retrying": (Filters(status="retrying"), None, ""),
    "processing": (Filters(status="processing"), None, ""),
    "unread": (Filters(status="unread"), None, ""),
    "failed, next page": (Filters(status="failed"), (_SOON, 100), ""),
    "pending": (Filters(status="pending"), None, ""),
    "pending, next page": (Filters(status="pending"), (_SOON, 100), ""),
    "processed": (Filters(status="processed"), None, "webhook_events_created_at"),
    "a type": (Filters(type="invoice.paid"), None, ""),
    "a type that is rare": (Filters(type="nobody.sends.it"), None, "webhook_events_type"),
    "a customer": (Filters(customer="cus_7"), None, "webhook_events_customer"),
    "an object": (Filters(object_id="in_7"), None, "webhook_events_object"),
    "since": (Filters(since=_SOON), None, "webhook_events_created_at"),
    "until": (Filters(until=_SOON), None, "webhook_events_created_at"),
    "an account": (Filters(account="acct_1"), None, "webhook_events_account"),
    "an account in one mode": (Filters(account="acct_1", livemode=False), None, "webhook_events_account"),
    "a context": (Filters(context="acct_p/acct_1"), None, "webhook_events_context"),
    "a failed one of a customer": (Filters(status="failed", customer="cus_1"), None, ""),
}


@pytest.mark.parametrize("filters", _LISTS)
async def test_the_list_has_an_index_for_each_filter_and_reads_little_more_than_it_shows(
    filters: str, ledger: Connection
) -> None:
    wanted, before, index = _LISTS[filters]
    query = inbox.of_unfinished(_SQL["list"], wanted.status)
    await ledger.execute(inbox.AS_A_LIST)
    nodes = await plan(ledger, query, *wanted.values(), *(before or (None, None)), 20, mode="force_custom_plan")
    assert scanned(nodes) == set()
    used = indexes(nodes) - {"webhook_failures_event"}  # where what is shown has its last error looked up
    assert used == {index} if index else used
    assert sum(rows_read(nodes, one) for one in used) <= 100


@pytest.mark.parametrize("status", ["pending", "retrying", "dead"])
async def test_the_list_of_a_long_backlog_reads_little_more_than_it_shows(
    status: str, new_database: NewDatabase
) -> None:
    change = (
        "UPDATE webhook_events SET outcome = NULL, processed_at = NULL, "
        "status = CASE $1 WHEN 'pending' THEN 'pending' ELSE 'failed' END, "
        "failed_at = CASE WHEN $1 <> 'pending' THEN now() END, next_try_at = CASE WHEN $1 <> 'dead' THEN now() END"
    )
    query = inbox.of_unfinished(_SQL["list"], status)
    async with ledger_changed(new_database, change, status) as ledger, ledger.transaction():
        assert await ledger.fetchval("SELECT count(*) FROM webhook_unfinished") == EVENTS
        await ledger.execute(inbox.AS_A_LIST)
        nodes = await plan(ledger, query, *Filters(status=status).values(), None, None, 20, mode="force_custom_plan")
    assert not any(node["Node Type"] == "Seq Scan" and node["Actual Loops"] for node in nodes)
    assert sum(rows_read(nodes, one) for one in indexes(nodes) - {"webhook_failures_event"}) <= 100


async def test_failed_events_of_one_type_are_found_without_a_look_at_thousands_of_another(
    new_database: NewDatabase,
) -> None:
    change = (
        "UPDATE webhook_events SET outcome = NULL, processed_at = NULL, status = 'failed', failed_at = now(), "
        "next_try_at = NULL WHERE event_type = 'customer.updated'"
    )
    wanted = Filters(status="failed", type="invoice.paid")
    questions: dict[str, tuple[Any, ...]] = {
        _SQL["list"]: (None, None, 20),
        _SQL["replay"]: (None, datetime(2000, 1, 1, tzinfo=UTC), 0, 1000),
    }
    async with ledger_changed(new_database, change) as ledger, ledger.transaction():
        await ledger.execute(inbox.AS_A_LIST)
        for question, rest in questions.items():
            nodes = await plan(ledger, question, *wanted.values(), *rest, mode="force_custom_plan")
            assert scanned(nodes) == set()
            assert sum(rows_read(nodes, one) for one in indexes(nodes)) <= 100


async def test_the_pages_of_a_customer_with_half_of_all_events_read_little_more_than_they_show(
    new_database: NewDatabase,
) -> None:
    change = (
        "UPDATE webhook_events SET customer = 'cus_whale', created_at = created_at - seq * interval '1 ms' "
        "WHERE seq % 2 = 0"
    )
    whale, page = Filters(customer="cus_whale").values(), (datetime.now(UTC) + timedelta(days=2), 100)
    again = Filters(status="processed", customer="cus_whale").values()
    questions: list[tuple[str, tuple[Any, ...]]] = [
        (_SQL["list"], (*whale, None, None, 20)),
        (_SQL["list"], (*whale, *page, 20)),
        (_SQL["replay"], (*again, None, datetime(2000, 1, 1, tzinfo=UTC), 0, 20)),
        (_DASHBOARD["newer_events"], (*whale, *page, 20)),
        (_DASHBOARD["around_customer"], ("cus_whale", *page, 10, "", False)),
        (_DASHBOARD["timeline"], ("cus_whale", "", False, *page, 20)),
        (_DASHBOARD["found"], ("cus_whale", "cus_whalf", 5)),
        (_DASHBOARD["whose_customer"], ("cus_whale",)),  # of 200 events
    ]
    async with ledger_changed(new_database, change) as ledger, ledger.transaction():
        await ledger.execute(inbox.AS_A_LIST)
        for question, values in questions:
            nodes = await plan(ledger, question, *values, mode="force_custom_plan")
            assert "webhook_events" not in scanned(nodes)
            assert 0 < rows_read(nodes, "webhook_events_customer") <= 210, question


@modes
async def test_the_failed_list_is_read_off_the_index_of_failed_events(mode: str, ledger: Connection) -> None:
    nodes = await plan(ledger, _SQL["failed"], 10, mode=mode)
    assert scanned(nodes) == set()
    assert indexes(nodes) == {"webhook_events_failed", "webhook_failures_event"}
    assert rows_read(nodes, "webhook_events_failed") <= 11


@modes
async def test_one_event_is_three_look_ups(mode: str, ledger: Connection) -> None:
    nodes = await plan(ledger, _SQL["event"], "evt_1001", mode=mode)
    assert scanned(nodes) == set()
    assert "webhook_events_pkey" in indexes(nodes)
    assert len(partitions(nodes)) == 1
    nodes = await plan(ledger, _SQL["failures_of"], "evt_1001", mode=mode)
    assert (scanned(nodes), indexes(nodes)) == (set(), {"webhook_failures_event"})


@modes
@pytest.mark.parametrize("query", ["health", "queue"])
async def test_asking_how_things_are_does_not_look_at_the_ledgers_rows(
    query: str, mode: str, ledger: Connection
) -> None:
    nodes = await plan(ledger, _SQL[query], mode=mode)
    assert scanned(nodes) == set()
    assert indexes(nodes) & {"webhook_unfinished_due"} == {"webhook_unfinished_due"}
    assert rows_read(nodes, "webhook_unfinished_due") == 1
    assert rows_read(nodes, "webhook_events_failed") <= EVENTS // 1000


@modes
async def test_statistics_do_not_touch_the_ledger(mode: str, ledger: Connection) -> None:
    nodes = await plan(ledger, _SQL["statistics"], 7, mode=mode)
    assert not {node.get("Relation Name", "") for node in nodes} & {"webhook_events"}


# ── By hand ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_pruning_starts_at_the_old_end_of_the_ledger(ledger: Connection) -> None:
    # A plan for any number would be dearer than one for this number, so PostgreSQL plans each chunk anew.
    nodes = await plan(ledger, _SQL["prune"], datetime.now(UTC), 10, mode="force_custom_plan")
    assert not scanned(nodes) & {"webhook_events"}
    assert "webhook_events_created_at" in indexes(nodes)
    assert rows_read(nodes, "webhook_events_created_at") <= 20


@pytest.mark.parametrize("status", ["failed", "dead"])
@pytest.mark.parametrize("query", ["count_matching", "replay"])
async def test_replaying_what_failed_looks_at_nothing_else(query: str, status: str, ledger: Connection) -> None:
    position = (datetime(2000, 1, 1, tzinfo=UTC), 0, 1000) if query == "replay" else ()
    nodes = await plan(ledger, _SQL[query], *Filters(status=status).values(), None, *position, mode="force_custom_plan")
    assert scanned(nodes) == set()
    assert indexes(nodes) & {"webhook_events_failed", "webhook_events_failed_type"}
    assert sum(rows_read(nodes, index) for index in indexes(nodes) - {"webhook_events_pkey"}) <= EVENTS // 1000
