"""PostgreSQL: the pool, the migrations, the notices, and SQL files read into named queries.

The connection `db` is the first argument of everything below a door: whoever opened the transaction owns it.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from kamiyo.errors import DatabaseUnavailable, ForeignTables, MigrationNeeded, RoleRefused

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]
else:
    Connection = asyncpg.Connection
    Pool = asyncpg.Pool

_T = TypeVar("_T")

#: The channel on which storing an event wakes the workers.
CHANNEL = "webhook_events"

MIGRATIONS = Path(__file__).resolve().parent.parent / "database" / "migrations"

# A migration may rewrite a large table, or wait for another process that does.
_MIGRATION_SECONDS = 24 * 3600.0

# The worker asks its listener's session for a sign every five seconds.
_LISTENER_IDLE = "SET idle_session_timeout = '60s'"

#: What asyncpg and the operating system raise when PostgreSQL is away, going away, or refuses to commit now; where two
#: wait for each other, it ends one of them.
UNAVAILABLE: tuple[type[BaseException], ...] = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TransactionRollbackError,
    asyncpg.InternalClientError,
)

#: The same, and whatever else PostgreSQL refuses.
DATABASE_ERRORS: tuple[type[BaseException], ...] = (*UNAVAILABLE, asyncpg.PostgresError)

#: The same, and that the database was given up when it was looked for.
AWAY: tuple[type[BaseException], ...] = (*DATABASE_ERRORS, DatabaseUnavailable)

_CANNOT_CONNECT: tuple[type[BaseException], ...] = (*DATABASE_ERRORS, ValueError)


def load_queries(name: str) -> Mapping[str, str]:
    """The queries of `kamiyo/<name>`, each under the `-- name:` line above it. Raises ValueError on a double name."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    _, *parts = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)
    queries = dict(zip(parts[::2], (body.strip() for body in parts[1::2]), strict=True))
    if len(queries) * 2 != len(parts):
        raise ValueError(f"{name} names a query twice")
    return queries


async def open_pool(url: str, *, size: int, application: str, idle_limit: float) -> Pool:
    """A pool of at most `size` connections, named `application` in pg_stat_activity.

    PostgreSQL ends a session that sits idle for `idle_limit` seconds: a process that is stopped or cut off loses its
    locks and its open transaction then, and can settle nothing when it comes back.

    It connects when first used, so a server can start, and say that it is unhealthy, while PostgreSQL is away.
    """
    pool: Pool = asyncpg.create_pool(
        url,
        min_size=0,
        max_size=size,
        # Shorter than the limit below, so that the pool is not surprised by it.
        max_inactive_connection_lifetime=min(30.0, idle_limit / 2),
        timeout=5,
        # And our end gives up when the other has: a route that is lost ends no connection, and an answer that never
        # comes would be waited for without end.
        command_timeout=idle_limit,
        server_settings={
            "application_name": application,
            "timezone": "UTC",
            **_silent_for(idle_limit),
        },
    )
    await pool
    return pool


def _silent_for(seconds: float) -> dict[str, str]:
    limit = str(int(seconds * 1000))
    return {"idle_in_transaction_session_timeout": limit, "idle_session_timeout": limit}


async def connect(
    url: str, *, application: str, patience: float | None = None, idle_limit: float | None = None
) -> "asyncpg.Connection[asyncpg.Record]":
    """One connection. Raises DatabaseUnavailable with a sentence for the person who set the address.

    `patience` is how many seconds an answer may take, unless a call says otherwise; None is for ever. `idle_limit`: see
    `open_pool`; None leaves it to PostgreSQL's configuration.
    """
    try:
        return await asyncpg.connect(
            url,
            timeout=5,
            command_timeout=patience,
            server_settings={
                "application_name": application,
                "timezone": "UTC",
                **(_silent_for(idle_limit) if idle_limit is not None else {}),
            },
        )
    except _CANNOT_CONNECT as error:
        raise DatabaseUnavailable(
            f"Cannot connect to PostgreSQL: {reason_of(error)}. Check DATABASE_URL and the server."
        ) from error


async def to_the_end(work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns or raises. It goes on where whoever waits for it is cancelled; an error has no hearer then,
    and asyncio does not print it."""
    working = asyncio.ensure_future(work)
    working.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(working)


def reason_of(error: BaseException) -> str:
    """Why there is no connection, in words for the person who set the address; of `connect`'s error, its cause."""
    if isinstance(error, DatabaseUnavailable) and error.__cause__ is not None:
        error = error.__cause__
    # A malformed address is quoted by those who cannot read it, and it may hold a password.
    if isinstance(error, ValueError):
        return "the address cannot be read"
    return f"{type(error).__name__}: {error}".rstrip(": ")


def migration_files() -> list[Path]:
    """Every migration, in order."""
    return sorted(MIGRATIONS.glob("[0-9]*.sql"))


async def missing_migrations(db: Connection) -> list[str]:
    """Names of the migrations that this database lacks, in order. Raises RoleRefused where that may not be read."""
    applied: set[str] = set()
    if await db.fetchval(_HAS_RECORD):
        try:
            applied = {name for (name,) in await db.fetch("SELECT name FROM webhook_migrations")}
        except asyncpg.InsufficientPrivilegeError as error:
            raise await _refused(db, error) from error
    return [path.stem for path in migration_files() if path.stem not in applied]


async def _refused(db: Connection, error: asyncpg.PostgresError) -> RoleRefused:
    role, name = await db.fetchrow("SELECT current_user, current_database()") or ("?", "?")
    return RoleRefused(
        f"PostgreSQL refuses the role {role} in the database {name}: {error}. Give DATABASE_URL the role that owns "
        'Kamiyo\'s tables, or grant this one what docs/deploy.md lists under "The database role".'
    )


# A table of that name without this column is not the record, but somebody's own.
_HAS_RECORD = """SELECT EXISTS (SELECT FROM pg_attribute
    WHERE attrelid = to_regclass('webhook_migrations') AND attname = 'applied_at')"""


async def _refuse_foreign_tables(db: Connection, missing: list[str]) -> None:
    # The files refuse by themselves; asked for all of them beforehand, nothing at all is changed.
    ours = {table: name for name in missing for table in _tables_of(name)}
    if await db.fetchval(_HAS_RECORD):
        ours.pop("webhook_migrations", None)
    found = await db.fetch("SELECT name FROM unnest($1::text[]) AS name WHERE to_regclass(name) IS NOT NULL", [*ours])
    # Another process may have made them a moment ago; then their record is there as well by now.
    still_missing = await missing_migrations(db) if found else []
    foreign = [table for (table,) in found if ours[table] in still_missing]
    if foreign:
        raise ForeignTables(
            f"The database has {', '.join(foreign)} already, which Kamiyo did not make. Rename it, or give Kamiyo a "
            "database or a schema (search_path) of its own. Nothing was changed."
        )


def _tables_of(name: str) -> list[str]:
    text = (MIGRATIONS / f"{name}.sql").read_text(encoding="utf-8")
    return re.findall(r"^CREATE TABLE IF NOT EXISTS ([\w.]+)", text, re.MULTILINE)


async def migrate(db: Connection, *, report: Callable[[str], None] = lambda name: None) -> list[str]:
    """Apply what is missing; return the names. Each file is one transaction together with its own record.

    Safe to call from several processes at once. Raises ForeignTables when the tables belong to someone else, and
    RoleRefused when this role may not make them.
    """
    missing = await missing_migrations(db)
    await _refuse_foreign_tables(db, missing)
    for name in missing:
        try:
            await db.execute((MIGRATIONS / f"{name}.sql").read_text(encoding="utf-8"), timeout=_MIGRATION_SECONDS)
        except asyncpg.RaiseError as error:
            await db.execute("ROLLBACK")
            raise ForeignTables(f"{error}. {getattr(error, 'hint', '') or ''}".strip()) from error
        except asyncpg.InsufficientPrivilegeError as error:
            await db.execute("ROLLBACK")
            raise await _refused(db, error) from error
        except asyncpg.PostgresError:
            with contextlib.suppress(asyncpg.PostgresError):
                await db.execute("ROLLBACK")
            raise
        report(name)
    return missing


async def require_migrations(db: Connection) -> None:
    """Raise MigrationNeeded, saying what to run, when a migration is missing."""
    missing = await missing_migrations(db)
    if missing:
        files = " ".join(f"-f database/migrations/{name}.sql" for name in missing)
        raise MigrationNeeded(
            f'The database lacks {", ".join(missing)}. Run `kamiyo migrate`, or: psql "$DATABASE_URL" {files}'
        )


@contextlib.asynccontextmanager
async def listening(url: str, heard: Callable[[], None]) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Call `heard()` for every notice on CHANNEL while the block runs, but those sent over this connection itself.

    Whether it lasts is the caller's to watch.
    """
    db = await connect(url, application="kamiyo listener", patience=10)
    own = db.get_server_pid()

    def on_notice(_: Any, sender: int, *__: Any) -> None:
        if sender != own:
            heard()

    try:
        # Of a process that was cut off nothing stays behind.
        await db.execute(_LISTENER_IDLE)
        await db.add_listener(CHANNEL, on_notice)
        yield db
    finally:
        # A connection that is already gone cannot say goodbye, and one whose server hangs must not keep us.
        with contextlib.suppress(asyncio.CancelledError, *DATABASE_ERRORS):
            await db.close(timeout=1)
