"""What people do wrong on their first day, and whether the program says what happened, to what, and what to do."""

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from bench.chaos.ground import free_ports
from kamiyo import database, inbox
from kamiyo.cli import serve
from kamiyo.database import Connection
from kamiyo.errors import EventUnknown, ForeignTables, RoleRefused, SettingsError
from kamiyo.web import create_app
from kamiyo.web.system import running
from tests.conftest import ADMIN_KEY, ROOT, SECRET, Log, NewDatabase, Served, settings_for, until, with_database


def kamiyo(folder: Path, *words: str, **variables: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command that is run in `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KAMIYO_", "PROMETHEUS_"))}
    done = subprocess.run(
        [sys.executable, "-m", "kamiyo", *words],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), "STRIPE_WEBHOOK_SECRET": SECRET, "ADMIN_API_KEY": ADMIN_KEY, **variables},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


# ── The start ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_port_that_is_taken_is_said_in_one_sentence_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in {"PORT": port, "HOST": "127.0.0.1", "STRIPE_WEBHOOK_SECRET": SECRET}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("ADMIN_API_KEY", ADMIN_KEY)
        monkeypatch.setenv("KAMIYO_WATCHDOG", "false")
        with pytest.raises(SettingsError) as caught:
            serve.serve()
    said = str(caught.value)
    assert said.startswith(f"Cannot listen on 127.0.0.1, port {port}: another program listens there already")
    assert "--port" in said


def test_a_worker_whose_port_for_metrics_is_taken_says_so_in_one_sentence_before_it_starts(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, _, said = kamiyo(tmp_path, "worker", "--metrics-port", port)
    assert (status, "Traceback" in said) == (1, False), said
    assert f"Cannot serve metrics on port {port}: another program listens there already (another worker?)." in said
    assert "--metrics-port" in said
    assert list(tmp_path.iterdir()) == [], "no database of its own was made"


async def test_a_start_that_is_refused_says_why_in_a_sentence_and_shows_no_traceback(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    url = new_database(migrated=False)
    db = await database.connect(url, application="test")
    try:
        await db.execute("CREATE TABLE webhook_events (id int)")
    finally:
        await db.close()
    # Several processes would be started anew without end: the one that starts them refuses by itself.
    with pytest.raises(ForeignTables):
        await serve._require_start(settings_for(url))
    with pytest.raises(SettingsError, match=r"cannot import no\.such"):
        await serve._require_start(settings_for(url, KAMIYO_HANDLERS="no.such"))
    await serve._require_start(settings_for("postgresql://nobody@127.0.0.1:1/none"))  # it may come back

    [port] = free_ports(1)
    status, _, said = await asyncio.to_thread(kamiyo, tmp_path, "serve", PORT=str(port), DATABASE_URL=url)
    assert status == 3
    assert "The database has webhook_events already, which Kamiyo did not make." in said
    assert "Traceback" not in said


async def test_an_application_says_why_it_does_not_start_and_an_error_of_nobodys_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def startup() -> str:
        said: list[str] = []

        async def receive() -> dict[str, str]:
            return {"type": "lifespan.startup"}

        async def send(message: dict[str, str]) -> None:
            said.append(message.get("message", message["type"]))

        with pytest.raises(Exception, match=r"no\.such|zero"):
            await create_app(settings_for(None, KAMIYO_HANDLERS="no.such"))({"type": "lifespan"}, receive, send)  # type: ignore[arg-type]
        return said[0]

    assert await startup() == "KAMIYO_HANDLERS: cannot import no.such: ModuleNotFoundError: No module named 'no'"
    monkeypatch.setattr("kamiyo.web.system.handlers.load", lambda modules: 1 / 0)
    assert (await startup()).startswith("Traceback")


def test_the_greeting_sends_nobody_to_simulate_customers_where_they_are_real(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = {}
    for environment in ("production", "development"):
        serve._say_where_to_look(settings_for(None, KAMIYO_ENV=environment), [])
        said[environment] = capsys.readouterr().out
    assert all("/dashboard   (sign in with ADMIN_API_KEY)" in words for words in said.values())
    assert "trigger" not in said["production"] and "kamiyo doctor" in said["production"]
    assert "trigger --story signup" in said["development"]


def test_the_greeting_hands_on_a_port_that_another_terminal_would_not_know(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def said(port: int) -> str:
        serve._say_where_to_look(settings_for(None, PORT=port), [])
        return capsys.readouterr().out

    assert "export PORT=9000\n" in said(9000) and "export PORT" not in said(8000)
    (tmp_path / ".env").write_text("PORT=9000\n")
    assert "export PORT" not in said(9000)


# ── The database ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_server_without_its_database_says_why_once_and_when_it_is_over(
    new_database: NewDatabase, log: Log
) -> None:
    url = new_database(migrated=False)
    later = f"{urlsplit(url).path[1:]}_later"
    async with running(settings_for(with_database(url, later), KAMIYO_WORKER=False)):

        async def told(name: str) -> list[dict[str, Any]]:
            return [line for line in log() if line["event"] == name]

        [away] = await until(lambda: told("database_away"))
        assert away["error"] == "InvalidCatalogNameError"
        assert away["reason"] == f'InvalidCatalogNameError: database "{later}" does not exist'
        db = await database.connect(url, application="test")
        try:
            await db.execute(f'CREATE DATABASE "{later}"')
            await until(lambda: told("database_back"))
            assert len(await told("database_away")) == 1
        finally:
            await db.execute(f'DROP DATABASE IF EXISTS "{later}" WITH (FORCE)')
            await db.close()


async def test_a_role_that_may_not_is_named_with_its_database_and_what_to_do(new_database: NewDatabase) -> None:
    db = await database.connect(new_database(migrated=False), application="test")
    try:
        await db.execute("DROP ROLE IF EXISTS kamiyo_mistakes_story; CREATE ROLE kamiyo_mistakes_story")
        await db.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC; SET ROLE kamiyo_mistakes_story")
        with pytest.raises(
            RoleRefused, match=r"refuses the role kamiyo_mistakes_story in the database kamiyo_test_.*:"
        ):
            await database.migrate(db)
        await db.execute("RESET ROLE")  # the connection is as it was
        await database.migrate(db)
        await db.execute("SET ROLE kamiyo_mistakes_story")
        with pytest.raises(RoleRefused, match=r"permission denied for table webhook_migrations.*The database role"):
            await database.require_migrations(db)
    finally:
        await db.execute("RESET ROLE; DROP ROLE kamiyo_mistakes_story")
        await db.close()


async def test_a_command_that_the_database_refuses_says_why_and_what_to_do_and_shows_no_traceback(
    database_url: str, db: Connection, tmp_path: Path
) -> None:
    role = "kamiyo_mistakes_reader"
    await db.execute(
        f"DROP ROLE IF EXISTS {role}; CREATE ROLE {role}; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}"
    )
    try:
        for words, session, said in (
            ("cleanup", "default_transaction_read_only=on", "It is a standby, or default_transaction_read_only is on."),
            ("cleanup", f"role={role}", "docs/deploy.md lists under"),
            ("rebuild", "lock_timeout=200", "pg_locks says who"),
            ("rebuild", "statement_timeout=3000", "give the role more time"),
        ):
            async with db.transaction():
                await db.execute("LOCK TABLE webhook_reads")
                url = f"{database_url}{'&' if '?' in database_url else '?'}{session}"
                status, _, told = await asyncio.to_thread(kamiyo, tmp_path, words, DATABASE_URL=url)
            assert (status, "Traceback" in told, said in told) == (1, False, True), f"{words} {session}: {told}"
    finally:
        await db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_command_that_finds_no_database_says_where_it_looked(tmp_path: Path) -> None:
    for words in (("backfill", "all"), ("audit",), ("reconcile",), ("events", "list"), ("rebuild",)):
        nowhere = {"DATABASE_URL": "postgresql://nobody:hunter2@127.0.0.1:1/none", "STRIPE_SECRET_KEY": "sk_test_1"}
        status, _, told = kamiyo(tmp_path, *words, **nowhere)
        assert (status, "Traceback" in told, "hunter2" in told) == (1, False, False), told
        assert "Cannot connect to PostgreSQL: ConnectionRefusedError" in told and "Check DATABASE_URL" in told


async def test_an_event_that_is_not_there_is_named(db: Connection) -> None:
    with pytest.raises(EventUnknown, match="Event not found: evt_nowhere"):
        await inbox.one(db, "evt_nowhere")
    with pytest.raises(EventUnknown, match="Event not found: evt_nowhere"):
        await inbox.retry(db, "evt_nowhere")


# ── The full check ──────────────────────────────────────────────────────────────────────────────────────────────


def check(url: str, **variables: str) -> tuple[int, str]:
    """Exit status and words of `./scripts/test_webhooks.sh`, as printed."""
    environment = {**os.environ, "STRIPE_WEBHOOK_SECRET": SECRET, "ADMIN_API_KEY": ADMIN_KEY, "KAMIYO_SIMULATE": "1"}
    done = subprocess.run(
        ["./scripts/test_webhooks.sh", url],
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_full_check_stops_at_what_is_wrong_here_and_names_it(server: Served) -> None:
    status, said = check(server.url, ADMIN_API_KEY="not-the-servers")
    assert status == 1 and said.count("FAIL") == 1, said
    assert "does not take the ADMIN_API_KEY that is set here" in said

    status, said = check(server.url, STRIPE_WEBHOOK_SECRET="whsec_not-the-servers")
    assert status == 1 and said.count("FAIL") == 1, said
    assert "Invalid signature" in said and "Is STRIPE_WEBHOOK_SECRET here one of the server's?" in said

    status, said = check("--help")
    assert (status, "STRIPE_WEBHOOK_SECRET come from the environment" in said) == (0, True)
    status, said = check("--nonsense")
    assert (status, "takes the address of a server" in said) == (2, True)
