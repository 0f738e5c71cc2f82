"""What every command needs: settings, a connection, a way to speak."""

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
from dotenv import dotenv_values
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from kamiyo import database
from kamiyo.database import DATABASE_ERRORS, Pool
from kamiyo.settings import Settings, load_settings
from kamiyo.web.system import database_url

_T = TypeVar("_T")

#: After so many seconds PostgreSQL ends a command that says nothing any more: one that was stopped, or whose route is
#: lost, while it holds the billing tables or events. So long may an answer take over a pool's connection, too.
IDLE_SECONDS = 60.0

# How long a command may take to undo what it was about, in order, when it is broken off.
_GOODBYE_SECONDS = 3.0

# Never narrower than this: a line that the terminal wraps can still be copied, an id that was cut off cannot.
_NARROWEST = 150
# More than any table needs.
_WIDEST = 1000


def _console(*, stderr: bool = False) -> Console:
    found = Console(stderr=stderr)
    return Console(stderr=stderr, width=max(found.width, _NARROWEST))


console = _console()
_stderr = _console(stderr=True)

#: The two secrets `make run` makes for itself, so that a newcomer needs none.
_DEVELOPMENT = ("STRIPE_WEBHOOK_SECRET", "ADMIN_API_KEY")


def complain(message: str) -> None:
    """Say what is wrong, on standard error."""
    # What others say may look like markup: [a].
    _stderr.print(f"[bold red]kamiyo:[/] {escape(message)}", highlight=False, soft_wrap=True)


def settings_for_commands() -> Settings:
    """The settings, completed by the development secrets where `make run` made some.

    Raises SettingsError when a variable is wrong.
    """
    settings = load_settings()
    for name, value in _made_before(settings.data_dir).items():
        if not _configured(settings, name):
            os.environ[name] = value
    return load_settings()


def make_development_secrets(settings: Settings) -> list[str]:
    """Make what is missing of the development secrets, for this process and the next; return the names of those in use.

    They are kept in `<data_dir>/development.env`, readable by this user alone.
    """
    known = _made_before(settings.data_dir)
    missing = [name for name in _DEVELOPMENT if not _configured(settings, name)]
    for name in missing:
        prefix = "whsec_" if name == "STRIPE_WEBHOOK_SECRET" else ""
        known.setdefault(name, prefix + secrets.token_hex(24))
        os.environ[name] = known[name]
    if missing:
        path = _development_file(settings.data_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.writelines(f"{name}={value}\n" for name, value in known.items())
    return missing


def _configured(settings: Settings, name: str) -> bool:
    secret = settings.stripe_webhook_secret if name == "STRIPE_WEBHOOK_SECRET" else settings.admin_api_key
    return bool(secret.get_secret_value())


def _made_before(data_dir: Path) -> dict[str, str]:
    path = _development_file(data_dir)
    return {name: value for name, value in dotenv_values(path).items() if value} if path.exists() else {}


def _development_file(data_dir: Path) -> Path:
    return data_dir / "development.env"


@asynccontextmanager
async def connected(
    settings: Settings, *, idle_limit: float | None = None
) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection to the configured or the embedded database, its migrations complete."""
    async with database_url(settings) as url, connected_to(url, settings, idle_limit=idle_limit) as db:
        yield db


@asynccontextmanager
async def pooled(settings: Settings, *, application: str = "kamiyo cli") -> AsyncIterator[Pool]:
    """A pool of connections to it, for commands that do several things at once."""
    async with database_url(settings) as url:
        # One connection first: what keeps it from being made is said in a sentence.
        async with connected_to(url, settings):
            pass
        pool = await database.open_pool(url, size=settings.pool_size, application=application, idle_limit=IDLE_SECONDS)
        try:
            yield pool
        finally:
            pool.terminate()


@asynccontextmanager
async def connected_to(
    url: str, settings: Settings, *, idle_limit: float | None = None
) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """The same, to the database at `url`."""
    db = await database.connect(url, application="kamiyo cli", idle_limit=idle_limit)
    try:
        if settings.auto_migrate:
            # Said, because whoever only wanted to look may have named the wrong database.
            await database.migrate(db, report=lambda name: complain(f"applied {name}: the database had it not yet"))
        else:
            await database.require_migrations(db)
        yield db
    finally:
        # Over a route that is lost no goodbye is answered.
        with suppress(*DATABASE_ERRORS):
            await db.close(timeout=_GOODBYE_SECONDS)


def run_command(work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns: asyncio.run for commands, whose last words are one sentence about what went wrong.

    Where PostgreSQL is lost while several things are asked at once, the first error ends the others, and asyncpg leaves
    behind what it was doing to give their connections back. Nobody asks what became of that, so asyncio would print it.
    """
    with asyncio.Runner() as runner:
        runner.get_loop().set_exception_handler(_pass_over_what_is_lost)
        return runner.run(work)


def _pass_over_what_is_lost(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    lost = isinstance(context.get("exception"), DATABASE_ERRORS) and isinstance(context.get("future"), asyncio.Future)
    if not lost:
        loop.default_exception_handler(context)


async def until_broken_off(work: Coroutine[Any, Any, _T], let_go: Callable[[], object]) -> _T:
    """What `work` returns. Broken off (Ctrl-C), it may undo things in order for a moment; then `let_go` ends its
    connections: over a route that is lost nothing is ever answered, and PostgreSQL undoes the rest by itself."""
    working = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        working.cancel()
        await asyncio.wait([working], timeout=_GOODBYE_SECONDS)
        let_go()
        # What became of it then is nothing that anybody asked for.
        await asyncio.wait([asyncio.gather(working, return_exceptions=True)], timeout=_GOODBYE_SECONDS)
        raise


def print_whole(table: Table) -> None:
    """Print a table with nothing cut off, however wide that makes it."""
    needed = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    Console(width=max(console.width, needed)).print(table)


@contextmanager
def progressing(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show how far a long piece of work is; yields a function that takes how many are done."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_stderr, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
