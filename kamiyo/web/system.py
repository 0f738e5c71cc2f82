"""One running Kamiyo inside one process: database, receiver, worker; started and stopped together.

The router's lifespan owns it, so `app.include_router(router)` is the whole integration.
"""

import asyncio
import contextlib
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import asyncpg

from kamiyo import database, handlers, inbox, telemetry, tracing
from kamiyo.alerts import Alerts
from kamiyo.database import AWAY, DATABASE_ERRORS, UNAVAILABLE, Pool
from kamiyo.errors import DatabaseUnavailable, KamiyoError
from kamiyo.postgres import EmbeddedPostgres
from kamiyo.reader import Reader
from kamiyo.receive import Receiver
from kamiyo.reconcile import keep_reconciling
from kamiyo.settings import Settings, doubts, in_force
from kamiyo.shadow import ShadowReceiver
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
    shadow: ShadowReceiver
    _ready: bool = False
    _serving: asyncio.Task[None] | None = None
    _patience: asyncio.Task[None] | None = None

    def begin_to_stop(self) -> None:
        """From now on the grace runs. The worker claims nothing more; deliveries are taken until the server is done
        with its clients, and `running` is left."""
        if self._patience is None:
            self.worker.stop()
            self._patience = asyncio.create_task(_wait_for_handlers(self), name="kamiyo stop")

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

    They count from the signal that ends the process, where one does: a server waits for its clients then, and its
    handlers' time runs meanwhile.

    Raises SettingsError, MigrationNeeded or ForeignTables when it must not start. A database that is away does not
    stop the start: deliveries are answered 503 until it is back.
    """
    telemetry.configure_logging(level=settings.log_level, log_format=settings.log_format.value)
    doubted = [*doubts(settings)]
    settings = in_force(settings)
    handlers.load(settings.handler_modules)
    telemetry.label_types(handlers.registry.types())
    traces = tracing.start(settings)
    async with database_url(settings) as url:
        pool = await database.open_pool(
            url,
            size=settings.pool_size,
            application="kamiyo",
            idle_limit=settings.handler_timeout + settings.idle_limit,
        )
        api = StripeApi(pool, settings) if settings.worker and settings.api_keys else None
        worker = Worker(pool, url, settings, reader=Reader(pool, api) if api else None, traces=traces)
        system = System(
            settings,
            url,
            pool,
            Receiver(pool, settings, traces=traces, wake=worker.wake if settings.worker else None),
            worker,
            Alerts(pool, settings),
            ShadowReceiver(pool, settings),
        )
        aside: list[asyncio.Task[None]] = []
        try:
            with contextlib.suppress(DatabaseUnavailable, *UNAVAILABLE):
                await _make_ready(system)
            system._serving = asyncio.create_task(_serve(system), name="kamiyo")
            aside = [asyncio.create_task(system.alerts.run(), name="kamiyo alerts")]
            if api is not None and settings.reconcile:
                comparing = keep_reconciling(
                    *(pool, api),
                    random.Random(),  # noqa: S311 - nobody gains by guessing it
                    own_account=settings.stripe_account_id,
                    mirrored=settings.mirrored,
                )
                aside.append(asyncio.create_task(comparing, name="kamiyo reconcile"))
            for variable, reason in doubted:
                happened("setting_doubtful", variable=variable, reason=reason)
            happened("started", worker=settings.worker, environment=settings.environment.value)
            # Longer than a handler may take, so that only one that the limit cannot reach is met by it.
            watchdog = (
                watching(settings.handler_timeout + settings.idle_limit / 2)
                if settings.watchdog
                else contextlib.nullcontext()
            )
            async with watchdog:
                with _hearing_signals(system.begin_to_stop):
                    yield system
        finally:
            happened("stopping")
            for task in aside:
                task.cancel()
            await _stop(system)
            if api is not None:
                await api.close()
            if traces is not None:
                await traces.flush(settings.shutdown_grace * _TO_HAND_OVER)
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


# A route that is lost ends no connection: without a limit the start would wait for its answer for ever.
_START_PATIENCE_SECONDS = 30.0


async def _make_ready(system: System) -> None:
    db = await database.connect(system.url, application="kamiyo start", patience=_START_PATIENCE_SECONDS)
    try:
        if system.settings.auto_migrate:
            await database.migrate(db, report=lambda name: happened("migrated", migration=name))
        else:
            await database.require_migrations(db)
        await inbox.ensure_partitions(db)
    finally:
        await db.close()


# While nothing changes, a line now and then is enough.
_SAY_AGAIN_SECONDS = 30.0


async def _serve(system: System) -> None:
    # Until the database has answered once, the tables may be missing: the start waits for it here.
    told, again_at = "", 0.0
    while True:
        try:
            await _make_ready(system)
            system._ready = True
            break
        except AWAY as error:
            reason = database.reason_of(error)
            if reason != told or time.monotonic() >= again_at:
                happened("database_away", error=reason.partition(":")[0], reason=reason)
                told, again_at = reason, time.monotonic() + _SAY_AGAIN_SECONDS
            await asyncio.sleep(1)
        except KamiyoError as error:
            # The database came back as one that must not be used. Said until somebody mends it; deliveries get 503.
            happened("start_refused", error=type(error).__name__, reason=str(error))
            await asyncio.sleep(5)
    if told:
        happened("database_back")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(system.receiver.run())
        if system.settings.worker:
            tasks.create_task(system.worker.run())


# Shares of the grace: for finishing, for taking back what did not finish, for saying goodbye to PostgreSQL. Together
# they are less than the whole, because whoever waits for the end of the grace kills.
TO_FINISH, _TO_TAKE_BACK, _TO_CLOSE, _TO_HAND_OVER = 0.7, 0.13, 0.1, 0.05

# The share after which a database that says nothing is taken for one that is away.
_TO_ANSWER = 0.3


@contextlib.contextmanager
def _hearing_signals(begin: Callable[[], None]) -> Iterator[None]:
    """Call `begin()` on the loop as soon as SIGTERM or SIGINT comes, before whoever handles them already."""
    loop = asyncio.get_running_loop()
    replaced: dict[signal.Signals, tuple[Callable[..., object], Callable[..., object]]] = {}

    def put_before(number: signal.Signals, handler: Callable[[int, FrameType | None], object]) -> None:
        def both(received: int, frame: FrameType | None) -> None:
            with contextlib.suppress(RuntimeError):  # a loop that is closed already
                loop.call_soon_threadsafe(begin)
            handler(received, frame)

        signal.signal(number, both)
        replaced[number] = both, handler

    # Python's signals are the main thread's. Where nobody handles one, it ends the process, and has to go on doing so.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(number)
            if callable(handler) and handler is not signal.default_int_handler:
                put_before(number, handler)
    try:
        yield
    finally:
        for number, (ours, theirs) in replaced.items():
            if signal.getsignal(number) is ours:
                signal.signal(number, theirs)


async def _wait_for_handlers(system: System) -> None:
    """Give handlers their share of the grace, then give them up; at once where nothing could be settled any more."""
    grace = system.settings.shutdown_grace
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(grace * TO_FINISH):
            if await _answers(system.url, grace * _TO_ANSWER):
                await asyncio.Event().wait()
    system.worker.abandon()


async def _answers(url: str, seconds: float) -> bool:
    """Whether there is a PostgreSQL; one that takes no more connections is one."""
    try:
        async with asyncio.timeout(seconds):
            db = await database.connect(url, application="kamiyo stop")
            try:
                await db.execute("SELECT 1")
            finally:
                db.terminate()
    except UNAVAILABLE:
        return False
    except DatabaseUnavailable as error:
        return isinstance(error.__cause__, asyncpg.TooManyConnectionsError)
    return True


async def _stop(system: System) -> None:
    grace = system.settings.shutdown_grace
    system.begin_to_stop()
    system.receiver.close()
    serving, patience = system._serving, system._patience
    if serving is not None and patience is not None:
        if system._ready:
            await asyncio.wait([serving, patience], return_when=asyncio.FIRST_COMPLETED)
        patience.cancel()
        if not serving.done():
            system.worker.abandon()
            serving.cancel()
            await asyncio.wait([serving], timeout=grace * _TO_TAKE_BACK)
    with contextlib.suppress(TimeoutError, *UNAVAILABLE):
        async with asyncio.timeout(grace * _TO_CLOSE):
            await system.pool.close()
    system.pool.terminate()


__all__ = ["KamiyoError", "System", "database_url", "running"]
