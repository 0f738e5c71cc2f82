"""One running Kamiyo inside one process: database, receiver, worker; started and stopped together.

The router's lifespan owns it, so `app.include_router(router)` is the whole integration.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from kamiyo import database, handlers, inbox, telemetry
from kamiyo.alerts import Alerts
from kamiyo.database import DATABASE_ERRORS, UNAVAILABLE, Pool
from kamiyo.errors import DatabaseUnavailable, KamiyoError
from kamiyo.postgres import EmbeddedPostgres
from kamiyo.reader import Reader
from kamiyo.receive import Receiver
from kamiyo.reconcile import keep_reconciling
from kamiyo.settings import Settings
from kamiyo.stripe_api import StripeApi
from kamiyo.telemetry import happened
from kamiyo.watchdog import watching
from kamiyo.worker import Worker


@dataclass
class System:
    """What a process needs to receive, process and show events. Make it with `running`."""

    settings: Settings
    url: str
    pool: Pool
    receiver: Receiver
    worker: Worker
    alerts: Alerts
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def refresh_gauges(self) -> None:
        """Ask the database how the queue stands; when it does not answer, say so in the gauges."""
        try:
            async with asyncio.timeout(3), self.pool.acquire() as db:
                queue = await inbox.queue(db)
            telemetry.QUEUE.numbers = {
                **{name: float(value) for name, value in queue.items()},
                "database_up": 1.0,
            }
        except DATABASE_ERRORS:
            telemetry.QUEUE.numbers = {"database_up": 0.0}


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[System]:
    """Start everything, and on the way out finish what is in flight within `settings.shutdown_grace` seconds.

    Raises SettingsError, MigrationNeeded or ForeignTables when it must not start. A database that is away does not
    stop the start: deliveries are answered 503 until it is back.
    """
    telemetry.configure_logging(level=settings.log_level, log_format=settings.log_format.value)
    handlers.load(settings.handler_modules)
    telemetry.label_types(handlers.registry.types())
    async with database_url(settings) as url:
        pool = await database.open_pool(
            url,
            size=settings.pool_size,
            application="kamiyo",
            idle_limit=settings.handler_timeout + settings.idle_limit,
        )
        asks = settings.worker and settings.stripe_secret_key.get_secret_value()
        api = StripeApi(pool, settings) if asks else None
        worker = Worker(pool, url, settings, reader=Reader(pool, api) if api else None)
        system = System(settings, url, pool, Receiver(pool, settings), worker, Alerts(pool, settings))
        aside: list[asyncio.Task[None]] = []
        try:
            with contextlib.suppress(DatabaseUnavailable, *UNAVAILABLE):
                await _make_ready(system)
            system._tasks = [asyncio.create_task(_serve(system), name="kamiyo")]
            aside = [asyncio.create_task(system.alerts.run(), name="kamiyo alerts")]
            if api is not None and settings.reconcile:
                comparing = keep_reconciling(pool, api, random.Random())  # noqa: S311 - for jitter
                aside.append(asyncio.create_task(comparing, name="kamiyo reconcile"))
            happened("started", worker=settings.worker, environment=settings.environment.value)
            # Longer than a handler may take, so that only one that the limit cannot reach is met by it.
            watchdog = (
                watching(settings.handler_timeout + settings.idle_limit / 2)
                if settings.watchdog
                else contextlib.nullcontext()
            )
            async with watchdog:
                yield system
        finally:
            happened("stopping")
            for task in aside:
                task.cancel()
            await _stop(system)
            if api is not None:
                await api.close()
            happened("stopped")


@contextlib.asynccontextmanager
async def database_url(settings: Settings) -> AsyncIterator[str]:
    """The address of the database to use, while the block runs: the configured one, or the embedded one's."""
    if settings.database_url is not None:
        yield settings.database_url.get_secret_value()
        return
    server = await asyncio.to_thread(EmbeddedPostgres.start, settings.data_dir / "postgres")
    try:
        yield server.url
    finally:
        await asyncio.to_thread(server.stop)


async def _make_ready(system: System) -> None:
    db = await database.connect(system.url, application="kamiyo start")
    try:
        if system.settings.auto_migrate:
            await database.migrate(db, report=lambda name: happened("migrated", migration=name))
        else:
            await database.require_migrations(db)
        await inbox.ensure_partitions(db)
    finally:
        await db.close()


_AWAY: tuple[type[BaseException], ...] = (*DATABASE_ERRORS, DatabaseUnavailable)


async def _serve(system: System) -> None:
    # Until the database has answered once, the tables may be missing: the start waits for it here.
    while True:
        try:
            await _make_ready(system)
            break
        except _AWAY as error:
            happened("database_away", error=type(error).__name__)
            await asyncio.sleep(1)
        except KamiyoError as error:
            # The database came back as one that must not be used. Said until somebody mends it; deliveries get 503.
            happened("start_refused", reason=type(error).__name__)
            await asyncio.sleep(5)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(system.receiver.run())
        if system.settings.worker:
            tasks.create_task(system.worker.run())


# Shares of the grace: for finishing, for taking back what did not finish, for saying goodbye to PostgreSQL. Together
# they are less than the whole, because whoever waits for the end of the grace kills.
_TO_FINISH, _TO_TAKE_BACK, _TO_CLOSE = 0.7, 0.15, 0.1


async def _stop(system: System) -> None:
    grace = system.settings.shutdown_grace
    system.receiver.close()
    system.worker.stop()
    if system._tasks:
        _, late = await asyncio.wait(system._tasks, timeout=grace * _TO_FINISH)
        if late:
            system.worker.abandon()
            for task in late:
                task.cancel()
            await asyncio.wait(late, timeout=grace * _TO_TAKE_BACK)
    with contextlib.suppress(TimeoutError, *UNAVAILABLE):
        async with asyncio.timeout(grace * _TO_CLOSE):
            await system.pool.close()
    system.pool.terminate()


__all__ = ["KamiyoError", "System", "database_url", "running"]
