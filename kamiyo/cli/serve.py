"""`kamiyo serve`, `kamiyo worker`, `kamiyo migrate`."""

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import prometheus_client
import typer
import uvicorn
import uvloop
from dotenv import dotenv_values
from fastapi import FastAPI
from uvicorn.importer import import_from_string

from kamiyo import database, handlers, telemetry
from kamiyo.cli.console import complain, console, make_development_secrets, run_command, settings_for_commands
from kamiyo.database import UNAVAILABLE
from kamiyo.errors import DatabaseUnavailable, SettingsError
from kamiyo.settings import Settings, in_force, load_settings
from kamiyo.web.system import TO_FINISH, database_url, running
from kamiyo.web.wire import WireProtocol

_APP = "api.main:app"


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. (default: HOST or 127.0.0.1)")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. (default: PORT, or 8000)")] = None,
    workers: Annotated[int, typer.Option(help="Server processes that share the port.", min=1, max=64)] = 1,
    dev: Annotated[
        bool,
        typer.Option("--dev", help="For trying out: makes a signing secret and an admin key where none is set."),
    ] = False,
) -> None:
    """Receive Stripe's events over HTTP and process them.

    Settings come from the environment and .env; see .env.example. Ctrl-C or SIGTERM finishes what is in flight.
    """
    if dev:
        os.environ.setdefault("KAMIYO_ENV", "development")
    if host:
        os.environ["HOST"] = host
    if port:
        os.environ["PORT"] = str(port)
    os.environ.setdefault("KAMIYO_WATCHDOG", "true")
    made: list[str] = []
    settings = load_settings()
    if settings.development:
        made = make_development_secrets(settings)
        settings = load_settings()
    given, settings = settings, in_force(settings)
    if not settings.any_door_open:
        what = "a placeholder, which anyone could sign with," if given.any_door_open else "not set,"
        raise SettingsError(
            f"STRIPE_WEBHOOK_SECRET is {what} so no delivery could be verified. Copy the signing secret (whsec_…) of "
            "your endpoint from the Stripe dashboard, or of `stripe listen`, into .env. To try Kamiyo without Stripe: "
            "`make run`, or `kamiyo serve --dev`."
        )
    if not settings.admin_api_key.get_secret_value():
        what = "a placeholder, and so taken as not set" if given.admin_api_key.get_secret_value() else "not set"
        complain(f"ADMIN_API_KEY is {what}: the calls of operators answer 503 until it is.")
    _require_port(settings)
    directory = telemetry.shared_metrics_directory() if workers > 1 else None
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "loop": "uvloop",
        "http": WireProtocol,
        "access_log": False,
        "log_level": "warning",
        "server_header": False,
        # Handlers have the same time: both count from the signal.
        "timeout_graceful_shutdown": settings.shutdown_grace * TO_FINISH,
    }
    _stop_quietly()
    try:
        if workers > 1:
            run_command(_require_start(settings))
            _greet(settings, made)
            uvicorn.run("kamiyo.cli.serve:one_of_several", factory=True, workers=workers, **options)
        else:
            server = _Server(uvicorn.Config(_APP, **options), settings, made)
            server.run()
            if not server.started:
                raise typer.Exit(3)
    finally:
        if directory is not None:
            telemetry.remove_shared_metrics(directory)


async def _require_start(settings: Settings) -> None:
    """Raise what would keep each of several processes from starting.

    Whoever watches over them starts one that ends anew, without end: nobody would see that none ever serves.
    """
    handlers.load(settings.handler_modules)
    if settings.database_url is None:
        return  # the embedded server's tables are our own
    with contextlib.suppress(DatabaseUnavailable, *UNAVAILABLE):
        db = await database.connect(settings.database_url.get_secret_value(), application="kamiyo start", patience=30)
        try:
            if settings.auto_migrate:
                await database.migrate(db)
            else:
                await database.require_migrations(db)
        finally:
            await db.close()


def _require_port(settings: Settings) -> None:
    """Raise SettingsError when nobody can listen at HOST and PORT: before anything is started, and in a sentence."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        # As the server does it: a port that was left a moment ago is free.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((settings.host, settings.port))
        except OSError as error:
            why = _why_not(error, "an older `kamiyo serve`?")
            raise SettingsError(
                f"Cannot listen on {settings.host}, port {settings.port}: {why}. Stop that, or choose another: "
                "`kamiyo serve --host … --port …`, or HOST and PORT in .env."
            ) from error


def _why_not(error: OSError, likely: str) -> str:
    """Why nobody can listen there; `likely` is who does, if somebody does."""
    if error.errno == errno.EADDRINUSE:
        return f"another program listens there already ({likely})"
    return error.strerror or str(error)


def one_of_several() -> FastAPI:
    """The application, in a process of its own among several that share a port."""
    app: FastAPI = import_from_string(_APP)
    _calm_garbage_collection()
    return app


class _Server(uvicorn.Server):
    """Says where to look once it really listens."""

    def __init__(self, config: uvicorn.Config, settings: Settings, made: list[str]) -> None:
        super().__init__(config)
        self._settings, self._made = settings, made

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then greet."""
        await super().startup(sockets)
        if self.started:
            _calm_garbage_collection()
            _greet(self._settings, self._made)


def _calm_garbage_collection() -> None:
    # Everything imported by now stays for good, and what a delivery leaves behind is not cyclic: looking for garbage
    # after every 700 new objects took 6 % of the time of a busy server.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _stop_quietly() -> None:
    # uvicorn shuts down in order and then raises the signal again, for whoever asked; here nobody else did, and a
    # stop in order is exit status 0.
    def nothing(number: int, frame: FrameType | None) -> None:
        pass

    signal.signal(signal.SIGTERM, nothing)
    signal.signal(signal.SIGINT, nothing)


_HERE = ("127.0.0.1", "0.0.0.0")  # noqa: S104 - compared with, not bound to


def _greet(settings: Settings, made: list[str]) -> None:
    # A server whose output goes to a full disk receives all the same.
    with contextlib.suppress(OSError):
        _say_where_to_look(settings, made)


def _say_where_to_look(settings: Settings, made: list[str]) -> None:
    address = f"http://{'localhost' if settings.host in _HERE else settings.host}:{settings.port}"

    def say(words: str) -> None:
        console.print(words, highlight=False)

    say(f"\n[bold]Kamiyo is listening[/] on {address}/api/v1/webhooks/stripe")
    say(f"  dashboard   {address}/dashboard   (sign in with ADMIN_API_KEY)")
    say(f"  look        {address}/docs   {address}/api/v1/webhooks/health   {address}/metrics")
    if settings.database_url is None:
        say(f"  database    embedded PostgreSQL, its data in {settings.data_dir}/ (DATABASE_URL for your own)")
    if made:
        say(f"  secrets     made for development, in {settings.data_dir / 'development.env'}: {', '.join(made)}")
    kamiyo = ".venv/bin/kamiyo" if Path(".venv/bin/kamiyo").exists() else "kamiyo"
    next_steps = {f"{kamiyo} doctor": "is everything ready? what is not, and what mends it"}
    if settings.development:
        # Not where customers are real: a simulated one would stay in the billing tables.
        next_steps = {
            f"{kamiyo} trigger --story signup": "a customer signs up and pays",
            f"{kamiyo} events list": "what came in, and what became of it",
            "./scripts/test_webhooks.sh": "the whole road, checked",
        }
    # Another terminal has not the port that was given to this one alone.
    known = dotenv_values(".env").get("PORT") or str(Settings.model_fields["port"].default)
    say("\nNow type, in another terminal:")
    if known != str(settings.port):
        say(f"  export PORT={settings.port}")
    for command, what in next_steps.items():
        say(f"  {command:<{max(map(len, next_steps))}}   {what}")
    say("Ctrl-C stops it, in order.\n")


def worker(
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve /metrics for Prometheus on this port.", min=1, max=65535)
    ] = None,
) -> None:
    """Process events without receiving any; start as many as you like, on any machine that reaches the database.

    SIGTERM finishes the events in hand, gives the others back, and exits.
    """
    os.environ.setdefault("KAMIYO_WATCHDOG", "true")
    settings = settings_for_commands().model_copy(update={"worker": True})
    if metrics_port:
        _serve_metrics(metrics_port)
    # The loop that a server has: with it and calm garbage collection an event takes a fifth less of the processor.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_work(settings))


def _serve_metrics(port: int) -> None:
    try:
        prometheus_client.start_http_server(port)
    except OSError as error:
        raise SettingsError(
            f"Cannot serve metrics on port {port}: {_why_not(error, 'another worker?')}. Stop that, or choose another: "
            "`kamiyo worker --metrics-port …`; each worker of a machine needs one of its own."
        ) from error


async def _work(settings: Settings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with running(settings):
        _calm_garbage_collection()
        await stop.wait()


def migrate() -> None:
    """Complete the database's tables. Safe to repeat, and while servers run."""

    async def complete(settings: Settings) -> list[str]:
        async with database_url(settings) as url:
            db = await database.connect(url, application="kamiyo migrate")
            try:
                return await database.migrate(db, report=lambda name: console.print(f"applied {name}", highlight=False))
            finally:
                await db.close()

    if not run_command(complete(settings_for_commands())):
        console.print("nothing to do: every migration is there")
