"""The database under test: made once for a run, brought back to what it was before each test.

Every function of `Database` blocks, and works on a thread and an event loop of its own: it may be called from plain
tests and, for the few milliseconds it takes, from async ones.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from kamiyo import database
from kamiyo.database import Connection, load_queries
from kamiyo.errors import KamiyoError
from kamiyo.postgres import temporary_postgres

_SQL = load_queries("testing/testing.sql")

#: What the environment says while a test uses the database. Nobody outside is asked or told.
SECRET = "whsec_of_the_tests"  # noqa: S105 - it guards nothing
ADMIN_KEY = "admin_key_of_the_tests"

#: Tables of the application under test: SQL, an .sql file, a callable that takes the address, or several of them.
Schema: TypeAlias = "str | Path | Callable[[str], object] | Sequence[Schema]"

_T = TypeVar("_T")


class KitError(KamiyoError):
    """The kit is used in a way that cannot work; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of an event: `dead`, or else processed with this `outcome` (projected, handled, ignored).

    `tries` is how many it took. Of a dead one `error` is the last error, with its traceback.
    """

    event_id: str
    event_type: str
    dead: bool
    outcome: str | None
    tries: int
    error: str | None = None


@dataclass(frozen=True)
class Database:
    """A PostgreSQL database with Kamiyo's tables and those of the application under test."""

    url: str

    def execute(self, sql: str, *args: Any) -> str:
        """Run a statement with parameters `$1`…, or several without; return PostgreSQL's word for it (`INSERT 0 1`)."""
        return self._with(lambda db: db.execute(sql, *args))

    def fetch(self, sql: str, *args: Any) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        return [tuple(row) for row in self._with(lambda db: db.fetch(sql, *args))]

    def fetchval(self, sql: str, *args: Any) -> Any:
        """The first column of the first row, None where there is no row."""
        return self._with(lambda db: db.fetchval(sql, *args))

    def settle(self, *, within: float = 30.0) -> list[Settled]:
        """Wait until every event is processed or dead; return what became of each, in order of arrival.

        Tries that wait for their time do not keep anybody waiting: once nothing else is left to do, the time passes.
        So an event that fails every time is dead after five tries, here and now. The application must be running.
        Raises AssertionError when something is still unsettled after `within` seconds.
        """
        return self._with(lambda db: settle(db, within))

    def keep(self, name: str) -> None:
        """Remember what every table and sequence holds at this moment, under a name."""
        self._with(lambda db: db.execute(_SQL["keep"], name))

    def bring_back(self, name: str) -> None:
        """Make every table and sequence hold what was kept under that name. Raises KitError when a table is locked."""
        try:
            self._with(lambda db: db.execute(_SQL["bring_back"], name))
        except asyncpg.LockNotAvailableError:
            raise KitError(
                "A table of the database under test is locked, so it cannot be cleaned. A session that a test opened "
                "is still in a transaction: commit it, roll it back, or close it before the test ends."
            ) from None

    def _with(self, work: Callable[["asyncpg.Connection[asyncpg.Record]"], Coroutine[Any, Any, _T]]) -> _T:
        async def run() -> _T:
            db = await database.connect(self.url, application="kamiyo testing")
            try:
                return await work(db)
            finally:
                await db.close()

        return apart(run())


def apart(work: Coroutine[Any, Any, _T]) -> _T:
    """Run `work` to its end on a thread and a loop of its own: the caller may have a loop, or be anyone's."""
    __tracebackhide__ = True
    with ThreadPoolExecutor(1, "kamiyo-testing") as thread:
        try:
            return thread.submit(asyncio.run, work).result()
        except (AssertionError, KitError) as error:
            # They are for whoever wrote the test: how the kit came to them is noise.
            raise error.with_traceback(None) from None


async def settle(db: Connection, within: float) -> list[Settled]:
    """See `Database.settle`."""
    try:
        async with asyncio.timeout(within):
            await _at_rest(db)
    except TimeoutError:
        left = [f"{event_id} ({kind}) is {status}" for event_id, kind, status in await db.fetch(_SQL["waiting"])]
        raise AssertionError(f"still not settled after {within:g} s: {', '.join(left)}. Is a worker running?") from None
    return [_settled(row) for row in await db.fetch(_SQL["settled"])]


async def at_rest(db: Connection, within: float) -> None:
    """Wait until nothing is in line or in work, letting no time pass. Raises AssertionError after `within` seconds."""
    try:
        async with asyncio.timeout(within):
            await _look_until(db, lambda standing: not standing["unfinished"])
    except TimeoutError:
        raise AssertionError(f"an event is still in line or in work after {within:g} s") from None


async def _at_rest(db: Connection) -> None:
    while True:
        standing = await _look_until(db, lambda standing: not standing["unfinished"])
        wait = standing["next_try_in"]
        if wait is None:
            return
        await db.execute(_SQL["let_time_pass"], max(wait, 0.0))
        await db.execute(_SQL["wake"])
        # The one whose time has come is taken; looked at too early, it would seem to have waited for nothing.
        await asyncio.sleep(0.002)


async def _look_until(db: Connection, enough: Callable[[asyncpg.Record], bool]) -> asyncpg.Record:
    looks = 0
    while True:
        standing = await db.fetchrow(_SQL["standing"])
        if standing is None or enough(standing):
            return standing  # type: ignore[return-value]  # an aggregate without GROUP BY has exactly one row
        looks += 1
        if looks % 20 == 0:
            # What a worker that died held is found by whoever looks; a worker looks by itself every two seconds.
            await db.execute(_SQL["wake"])
        await asyncio.sleep(0.003)


def _settled(row: asyncpg.Record) -> Settled:
    error = f"{row['error_type']}: {row['error_message']}\n{row['traceback']}" if row["dead"] else None
    return Settled(row["event_id"], row["event_type"], row["dead"], row["outcome"], row["attempts"], error)


# ── Made once, in use for a test ────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def embedded() -> Iterator[str]:
    """A PostgreSQL for the run, thrown away at the end, so nothing of it has to survive a power cut."""
    with temporary_postgres({"fsync": "off", "full_page_writes": "off"}) as server:
        yield server.url


@contextlib.contextmanager
def made(server_url: str, schema: Schema) -> Iterator[Database]:
    """A database on that server, with Kamiyo's tables and then those of `schema`; dropped at the end."""
    name = f"kamiyo_test_{secrets.token_hex(6)}"
    server = Database(server_url)
    if not server.fetchval(_SQL["may_prepare"]):
        raise KitError("The role of KAMIYO_TEST_DATABASE_URL must be a superuser: only one may set triggers aside.")
    server.execute(server.fetchval(_SQL["create_database"], name))
    try:
        made = Database(urlunsplit(urlsplit(server_url)._replace(path=f"/{name}")))
        made._with(database.migrate)
        _apply(schema, made)
        made.execute(_SQL["prepare"])
        made.keep("clean")
        yield made
    finally:
        server.execute(server.fetchval(_SQL["drop_database"], name))


def _apply(schema: Schema, made: Database) -> None:
    if isinstance(schema, str):
        made.execute(schema)
    elif isinstance(schema, Path):
        made.execute(schema.read_text(encoding="utf-8"))
    elif callable(schema):
        schema(made.url)
    else:
        for part in schema:
            _apply(part, made)


def environment(database: Database) -> dict[str, str]:
    """The variables an application under test is started with."""
    stripe = ("STRIPE_SECRET_KEY", "STRIPE_SECRET_KEYS")
    people = ("ALERT_URLS", "DISCORD_WEBHOOK_URL", "SLACK_WEBHOOK_URL")
    return {
        "DATABASE_URL": database.url,
        "STRIPE_WEBHOOK_SECRET": SECRET,
        "ADMIN_API_KEY": ADMIN_KEY,
        "KAMIYO_WORKER": "true",
        "KAMIYO_WATCHDOG": "false",
        "KAMIYO_LOG_LEVEL": "warning",
        "KAMIYO_TRACES": "false",
        **dict.fromkeys((*stripe, *people), ""),
    }


_in_use: list[Database] = []


@contextlib.contextmanager
def in_use(database: Database) -> Iterator[None]:
    """Clean the database, and let `deliver` use it while the block runs."""
    database.bring_back("clean")
    _in_use.append(database)
    try:
        yield
    finally:
        _in_use.remove(database)


def current() -> Database:
    """The database of the test that runs. Raises KitError when it asked for none."""
    __tracebackhide__ = True
    if not _in_use:
        raise KitError("This needs the fixture kamiyo_database: name it among the arguments of your test.")
    return _in_use[-1]
