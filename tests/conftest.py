"""What every story needs: a real PostgreSQL with clean tables, an application on it, Stripe's deliveries.

One PostgreSQL serves the whole run: an embedded one that is thrown away, or the one that
`KAMIYO_TEST_DATABASE_URL` names (its user must be allowed to create databases; nothing but the tests' own
databases is touched). One migrated database serves all stories that use `database_url`, `db`, `app`, `client`
or `server`: its tables are emptied before each story. A story that changes the schema, or takes the database
away, asks `new_database` for one of its own.
"""

import asyncio
import contextlib
import io
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from fastapi._compat import v2
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from pydantic import TypeAdapter

from kamiyo import database, handlers, telemetry
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.postgres import temporary_postgres
from kamiyo.settings import Settings
from kamiyo.signature import sign
from kamiyo.web import create_app, doorkeeper

ROOT = Path(__file__).resolve().parent.parent

SECRET = "whsec_test"
ADMIN_KEY = "admin_key_of_the_tests"
#: What EventBridge and Event Grid show to a server of the tests.
ROAD_KEY = "key of the other roads"
ADMIN = {"X-Admin-Key": ADMIN_KEY}
PREFIX = "/api/v1/webhooks"

#: Seconds after which a wait for something that should happen is a failure. Generous: a busy machine is no
#: defect.
DEADLINE = 60.0

_T = TypeVar("_T")

MakeSettings: TypeAlias = Callable[..., Settings]
NewDatabase: TypeAlias = Callable[..., str]
Log: TypeAlias = Callable[[], list[dict[str, Any]]]

# Hypothesis times each example, and a machine that is busy with something else is not a defect of ours.
# Fixtures of one test are shared by its examples on purpose: each example makes events of its own.
# In CI the examples are the same each time: what a change is judged by must not depend on a draw.
hypothesis_settings.register_profile(
    "kamiyo",
    derandomize=os.environ.get("CI") == "true",
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
hypothesis_settings.load_profile("kamiyo")


def examples(count: int) -> hypothesis_settings:
    """So many examples of a law; with `make properties` many times as many."""
    return hypothesis_settings(max_examples=count * int(os.environ.get("KAMIYO_THOROUGHNESS", "1")))


# ── What costs most ───────────────────────────────────────────────────────────────────────────────────────


def _shared_between_applications() -> None:
    """Let FastAPI make each validator once.

    A story makes an application of its own, and FastAPI makes 250 validators for each of them: more work than the
    rest of the story. What one does is decided by its type, so one for all applications does the same.
    """
    made: dict[tuple[Any, ...], tuple[TypeAdapter[Any], Any, Any]] = {}

    def adapter(told: Any, *, config: Any = None) -> TypeAdapter[Any]:
        key = (told.__origin__, repr(told.__metadata__), id(config))
        if key not in made:
            # With what it was made of: so no other's address becomes part of a key that is known.
            made[key] = TypeAdapter(told, config=config), told, config
        return made[key][0]

    cast(Any, v2).TypeAdapter = adapter


_shared_between_applications()


def tracked() -> list[str]:
    """The names of the files that the repository holds; skips the test where this is not a checkout."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if not git.stdout:
        pytest.skip("not a checkout: there is no list of what the repository holds")
    return git.stdout.splitlines()


# ── What nobody may read ──────────────────────────────────────────────────────────────────────────────────

# Secrets that every story has, and the customer of Stripe's own examples. What is planted on purpose, and looked for
# in answers, metrics and alerts as well, is in test_security.py.
_CANARIES = (SECRET, ADMIN_KEY, "jenny@example.com", "Jenny Rosen")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a story in which anything was written to standard output or error, by whatever process, with a canary."""
    report = yield
    if report.when == "teardown" and report.passed:
        emitted = report.capstdout + report.capstderr
        leaked = [canary for canary in _CANARIES if canary in emitted]
        if leaked:
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} wrote {leaked} to its log or its output"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the failure of every story that was told once more, however that went: it is a race to be mended."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.section(f"FAILED BEFORE IT WAS TOLD AGAIN: {report.nodeid}", yellow=True)
        terminalreporter.line(str(report.longrepr))


# ── What Stripe sends ─────────────────────────────────────────────────────────────────────────────────────


def event_json(
    event_id: str | None = None,
    event_type: str = "charge.succeeded",
    obj: dict[str, Any] | None = None,
    *,
    created: int | None = None,
    previous: dict[str, Any] | None = None,
    **envelope: Any,
) -> bytes:
    """A snapshot event as Stripe words it; the id is a fresh one unless given."""
    data: dict[str, Any] = {"object": {"id": "ch_1", "object": "charge"} if obj is None else obj}
    if previous is not None:
        data["previous_attributes"] = previous
    return json.dumps(
        {
            "id": event_id or fresh_id(),
            "object": "event",
            "api_version": "2026-10-28.endive",
            "created": int(time.time()) if created is None else created,
            "livemode": False,
            "type": event_type,
            "data": data,
            **envelope,
        }
    ).encode()


def fresh_id(prefix: str = "evt") -> str:
    """An id nobody has used yet."""
    return f"{prefix}_{secrets.token_hex(8)}"


def signed(body: bytes, secret: str = SECRET, at: float | None = None) -> dict[str, str]:
    """The headers Stripe would send with `body`, signed at `at` (now)."""
    return {
        "Content-Type": "application/json; charset=utf-8",
        "Stripe-Signature": sign(body, secret, int(time.time() if at is None else at)),
    }


async def noop(event: Event, db: Connection) -> None:
    """A handler that does nothing. An event with a handler is left to the workers."""


async def deliver(client: httpx.AsyncClient, body: bytes) -> httpx.Response:
    """Post `body` to the receiving call, rightly signed."""
    return await client.post(f"{PREFIX}/stripe", content=body, headers=signed(body))


# ── Waiting: for a row, never for a second ────────────────────────────────────────────────────────────────


async def until(ask: Callable[[], Awaitable[_T]], *, within: float = DEADLINE) -> _T:
    """The first true answer of `ask`. Fails with the last answer when there is none `within` seconds.

    The one place that looks again and again: nothing tells a test when another process has committed.
    """
    last: Any = None  # what `ask` returned
    try:
        async with asyncio.timeout(within):
            while not (last := await ask()):  # noqa: ASYNC110 - another process's commit sets no event here
                await asyncio.sleep(0.005)
    except TimeoutError:
        pytest.fail(f"still {last!r} after {within:g} s")
    return last


async def settled(
    db: Connection, event_id: str, status: str | None = None, *, within: float = DEADLINE
) -> asyncpg.Record:
    """The row of the event once it is processed or failed (or once it has `status`)."""
    wanted = [status] if status else ["processed", "failed"]

    async def ask() -> asyncpg.Record | None:
        return await db.fetchrow(
            "SELECT * FROM webhook_events WHERE event_id = $1 AND status = ANY ($2)", event_id, wanted
        )

    row = await until(ask, within=within)
    assert row is not None
    return row


# ── The database ──────────────────────────────────────────────────────────────────────────────────────────


def run_apart(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end on a thread of its own: for fixtures that outlive a test's event loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def with_database(url: str, name: str) -> str:
    """The same server's address, with another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of this run's PostgreSQL; whatever the tests did not make there is someone else's."""
    given = os.environ.get("KAMIYO_TEST_DATABASE_URL")
    if given:
        yield given
        return
    # Nothing here survives the run, so nothing has to survive a power cut. What a killed server leaves behind
    # is tested with servers of their own.
    with temporary_postgres({"fsync": "off", "full_page_writes": "off"}) as server:
        yield server.url


@pytest.fixture(scope="session")
def new_database(postgres: str) -> Iterator[NewDatabase]:
    """`new_database(migrated=True)` makes a database and returns its address; none outlives the run."""
    made: list[str] = []

    def make(*, migrated: bool = True) -> str:
        name = f"kamiyo_test_{os.getpid()}_{len(made)}"
        made.append(name)
        run_apart(_execute(postgres, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)", f"CREATE DATABASE {name}"))
        url = with_database(postgres, name)
        if migrated:
            run_apart(_migrate(url))
        return url

    yield make
    if "KAMIYO_TEST_DATABASE_URL" in os.environ:  # otherwise the whole server goes
        run_apart(_execute(postgres, *(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)" for name in made)))


async def _execute(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def _migrate(url: str) -> None:
    connection = await database.connect(url, application="tests")
    try:
        await database.migrate(connection)
        # Some tables have a row from the beginning; after each story they get it back.
        await connection.execute("CREATE SCHEMA seed")
        for table in await _tables(connection):
            if await connection.fetchval(f"SELECT EXISTS (SELECT FROM {table})"):  # noqa: S608 - quoted names
                await connection.execute(f"CREATE TABLE seed.{table.split('.')[-1]} AS TABLE {table}")
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def _shared_database(new_database: NewDatabase) -> str:
    return new_database()


@pytest.fixture
async def database_url(_shared_database: str) -> str:
    """The address of a migrated database whose tables are empty."""
    connection = await asyncpg.connect(_shared_database)
    try:
        # A story that failed may have left a session behind, with locks and with a will of its own.
        await connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        await connection.execute(await _emptying(connection))
    finally:
        await connection.close()
    return _shared_database


async def _tables(connection: Connection, *, seeded: bool | None = None) -> list[str]:
    # The ledger's triggers write to webhook_count_changes when it is emptied, so that one is last.
    rows = await connection.fetch(
        "SELECT format('%I.%I', nspname, relname) FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace "
        "WHERE relkind IN ('r', 'p') AND NOT relispartition AND nspname IN ('public', 'billing') "
        "AND relname <> 'webhook_migrations' "
        "AND ($1::bool IS NULL OR $1 = (to_regclass('seed.' || quote_ident(relname)) IS NOT NULL)) "
        "ORDER BY relname = 'webhook_count_changes'",
        seeded,
    )
    return [name for (name,) in rows]


async def _emptying(connection: Connection) -> str:
    # DELETE, because the tables are small: 0.5 ms, where TRUNCATE takes 43 and a template database 170.
    empty = [f"DELETE FROM {table}" for table in await _tables(connection)]  # noqa: S608 - quoted names
    fill = [
        f"INSERT INTO {table} OVERRIDING SYSTEM VALUE TABLE seed.{table.split('.')[-1]}"
        for table in await _tables(connection, seeded=True)
    ]
    return ";".join(empty + fill)


async def rows_written(connection: Connection) -> dict[str, int]:
    """How many rows each of Kamiyo's tables has that has any: {} says that nothing was written.

    Not of the table that the clock writes to: how the queue stood, once a minute.
    """
    tables = set(await _tables(connection, seeded=False)) - {"public.webhook_backlog_by_minute"}
    counts = {
        table: await connection.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608 - names out of the catalogue
        for table in tables
    }
    return {table: count for table, count in counts.items() if count}


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Connection]:
    """A connection to the clean database, to arrange and to look."""
    connection = await database.connect(database_url, application="test")
    yield connection
    await connection.close()


@contextlib.asynccontextmanager
async def workers_held(db: Connection) -> AsyncIterator[None]:
    """No worker writes the ledger meanwhile: to write several of its rows beside one may be a deadlock."""
    async with db.transaction():
        await db.execute("LOCK TABLE webhook_events IN EXCLUSIVE MODE")
        yield


@contextlib.asynccontextmanager
async def locks_waited_for(db: Connection) -> AsyncIterator[None]:
    """A delivery waits for a lock as long as it takes meanwhile, and not for a quarter of a second: on a busy machine a
    story may need longer than that to come to its point."""
    kept = await db.fetchval(
        "SELECT split_part(option, '=', 2) FROM pg_proc, unnest(proconfig) AS option "
        "WHERE proname = 'webhook_receive' AND option LIKE 'lock_timeout=%'"
    )
    await db.execute("ALTER FUNCTION webhook_receive SET lock_timeout = 0")
    try:
        yield
    finally:
        await db.execute(f"ALTER FUNCTION webhook_receive SET lock_timeout = '{kept}'")


@contextlib.asynccontextmanager
async def days_ahead_missing(db: Connection) -> AsyncIterator[None]:
    """Meanwhile and for `db` alone, bodies have tables as far ahead as after a day or two without maintenance."""
    transaction = db.transaction()
    await transaction.start()
    try:
        for days in (6, 7):
            day = await db.fetchval("SELECT to_char(now() AT TIME ZONE 'UTC' + $1, 'YYYYMMDD')", timedelta(days=days))
            await db.execute(f"DROP TABLE IF EXISTS webhook_payloads_{day}")
        yield
    finally:
        await transaction.rollback()


# Out of the table of locks, for that shows each moment also within a transaction, which pg_stat_activity does not.
_WAITING_FOR_LOCKS = """
SELECT count(DISTINCT pid) FROM pg_locks AS waiting WHERE NOT granted AND EXISTS (
    SELECT FROM pg_locks AS any_of_its WHERE any_of_its.pid = waiting.pid
    AND any_of_its.database = (SELECT oid FROM pg_database WHERE datname = current_database())
)
"""


async def waiting_for_locks(db: Connection) -> int:
    """How many sessions of this database wait for a lock. One server may serve other stories meanwhile: theirs do not
    count."""
    return int(await db.fetchval(_WAITING_FOR_LOCKS))


# ── The application ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def _nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Handlers, the log's stream and the environment are the process's: no story finds another's."""
    for field in Settings.model_fields.values():
        monkeypatch.delenv(str(field.validation_alias), raising=False)
    handlers.registry.clear()
    # Types that another story's handlers gave a label.
    monkeypatch.setattr(telemetry, "_labelled", set(telemetry.KNOWN_TYPES))
    telemetry.configure_logging(level="debug", log_format="json")
    yield
    handlers.registry.clear()


@pytest.fixture
def no_penalty(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that wrong keys would have had to wait, which they do not."""
    waits: list[float] = []

    class Clock:
        @staticmethod
        async def sleep(seconds: float) -> None:
            waits.append(seconds)

    # The doorkeeper's alone: others in the application wait as well, and they have to.
    monkeypatch.setattr(doorkeeper, "asyncio", Clock)
    return waits


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """`log()` is every line this process has logged since the story asked for it."""
    stream = io.StringIO()
    # Of telemetry alone: pytest puts its own standard error back between the phases of a test.
    monkeypatch.setattr(telemetry, "sys", SimpleNamespace(stderr=stream))
    telemetry.configure_logging(level="debug", log_format="json")
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.fixture
def settings(_shared_database: str) -> MakeSettings:
    """`settings(KAMIYO_WORKER=False)`: the tests' settings with these changed, by the variables' names."""

    def make(**changes: Any) -> Settings:
        return settings_for(_shared_database, **changes)

    return make


def settings_for(url: str | None, **changes: Any) -> Settings:
    """Settings for the database at `url`, with known secrets, and nothing from the environment or `.env`."""
    values: dict[str, Any] = {
        "STRIPE_WEBHOOK_SECRET": SECRET,
        "ADMIN_API_KEY": ADMIN_KEY,
        "DATABASE_URL": url,
        "KAMIYO_FIRST_RETRY_DELAY": 0.01,
        "KAMIYO_SHUTDOWN_GRACE": 5,
        "KAMIYO_LOG_LEVEL": "debug",
        "KAMIYO_LOG_FORMAT": "json",
        **changes,
    }
    return Settings(**{"_env_file": None, **values})


@contextlib.asynccontextmanager
async def running_client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `app`, while its lifespan runs. What the application does not catch is raised here."""
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://kamiyo") as client,
    ):
        yield client


@pytest.fixture
def app(database_url: str, settings: MakeSettings) -> FastAPI:
    """The Kamiyo API on the clean database, not started."""
    return create_app(settings())


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the running application, worker included."""
    async with running_client(app) as client:
        yield client


@pytest.fixture
async def quiet_client(database_url: str, settings: MakeSettings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that receives and shows, but has no worker: events stay as they are put."""
    async with running_client(create_app(settings(KAMIYO_WORKER=False))) as client:
        yield client


# ── A server with a socket ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Served:
    """A running server process: its address, and the process."""

    url: str
    process: "subprocess.Popen[bytes]"


# The socket is bound and listening before the process begins: a client's connection waits in it until the
# server is ready, and breaks when the server ends, so that nobody has to guess when to come. The protocol is the
# one that `kamiyo serve` uses.
_SERVE = (
    "import socket, sys, uvicorn; "
    "door = socket.socket(fileno=int(sys.argv[1])); "
    "uvicorn.Server(uvicorn.Config(sys.argv[2], http='kamiyo.web.wire:WireProtocol', access_log=False)).run([door])"
)


@contextlib.contextmanager
def serving(
    url: str, *, application: str = "api.main:app", folder: Path | None = None, **variables: str
) -> Iterator[Served]:
    """An application in a process of its own, on a free port of the loopback, for the database at `url`.

    `folder` is where the process runs (an empty one, without a .env), `variables` go into its environment.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("KAMIYO_", "PROMETHEUS_"))},
        "STRIPE_WEBHOOK_SECRET": SECRET,
        "ADMIN_API_KEY": ADMIN_KEY,
        "KAMIYO_EVENTBRIDGE_KEY": ROAD_KEY,
        "KAMIYO_EVENTGRID_KEY": ROAD_KEY,
        "DATABASE_URL": url,
        "KAMIYO_FIRST_RETRY_DELAY": "0.01",
        "KAMIYO_SHUTDOWN_GRACE": "5",
        **variables,
    }
    with contextlib.ExitStack() as stack:
        home = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kamiyo-served-")))
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
        port = listening.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(listening.fileno()), application],
            pass_fds=[listening.fileno()],
            env=environment | {"PYTHONPATH": f"{home}:{ROOT}"},
            cwd=home,
        )
        stack.callback(_end, process)
        listening.close()
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as probe:
            ask = f"GET {PREFIX}/supported-events HTTP/1.1\r\nHost: kamiyo\r\nConnection: close\r\n\r\n"
            probe.sendall(ask.encode())
            assert probe.recv(12) == b"HTTP/1.1 200", "the server did not start"
        yield Served(f"http://127.0.0.1:{port}", process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(DEADLINE)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def server(database_url: str) -> Iterator[Served]:
    """The Kamiyo API in a process of its own, with a socket, on the clean database."""
    with serving(database_url) as served:
        yield served
