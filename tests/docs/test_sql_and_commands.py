"""SQL and commands do what the documents say of them, as printed; and the role that is granted the least is enough."""

import asyncio
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import pytest

from kamiyo import handlers
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
    running_client,
    settings_for,
    settled,
    until,
    waiting_for_locks,
)
from tests.docs.conftest import (
    ACCOUNTS,
    DEPLOY,
    GUIDE,
    HANDLERS,
    MAINTENANCE,
    OPERATIONS,
    README,
    Block,
    blocks,
    postgres_program,
    psql,
)
from tests.turns import NOW, example, put, work_off, worker_on

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
