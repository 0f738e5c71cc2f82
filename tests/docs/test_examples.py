"""Applications that the documents show run as printed: the guide's steps, and docs/handlers.md as a whole."""

import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from kamiyo import database, settings
from kamiyo.database import Connection
from kamiyo.web import create_app
from tests.conftest import (
    ADMIN_KEY,
    DEADLINE,
    PREFIX,
    ROOT,
    SECRET,
    NewDatabase,
    deliver,
    event_json,
    running_client,
    settings_for,
    settled,
    signed,
)
from tests.docs.conftest import ACCOUNTS, GUIDE, HANDLERS, README, ROADS, Block, blocks, named, psql

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
