"""The commands, put together."""

import socket
import sys
from typing import Annotated

import asyncpg
import typer

from kamiyo import __version__
from kamiyo.cli import billing, chaos, conform, doctor, events, serve, simulate, upgrade
from kamiyo.cli.console import complain
from kamiyo.database import UNAVAILABLE, reason_of
from kamiyo.errors import KamiyoError

app = typer.Typer(
    name="kamiyo",
    help="Stripe's webhooks: received, stored, processed, retried; and true billing tables in PostgreSQL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kamiyo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """What is said before a command."""


app.command("serve")(serve.serve)
app.command("worker")(serve.worker)
app.command("migrate")(serve.migrate)
app.command("trigger")(simulate.trigger)
app.command("conform")(conform.conform)
app.command("chaos")(chaos.chaos)
app.command("doctor")(doctor.doctor)
app.add_typer(events.app, name="events")
app.command("replay")(events.replay)
app.command("reconcile")(events.reconcile)
app.command("backfill")(billing.backfill)
app.command("audit")(billing.audit)
app.command("rebuild")(events.rebuild)
app.command("cleanup")(events.cleanup)
app.command("upgrade-report")(upgrade.upgrade_report)


# What to do about what PostgreSQL refuses; the first that fits.
_MENDS: tuple[tuple[type[Exception], str], ...] = (
    (
        asyncpg.QueryCanceledError,
        "If statement_timeout did it, give the role more time (ALTER ROLE … SET statement_timeout = 0). Run it again.",
    ),
    (
        asyncpg.LockNotAvailableError,
        "Somebody held a lock for longer than lock_timeout lets this role wait: pg_locks says who. Run it again.",
    ),
    (asyncpg.TransactionRollbackError, "It and somebody else waited for each other. Run it again."),
    (
        asyncpg.InsufficientPrivilegeError,
        "Give DATABASE_URL the role that owns Kamiyo's tables, or grant this one what docs/deploy.md lists under "
        '"The database role".',
    ),
    (
        asyncpg.ReadOnlySQLTransactionError,
        "It is a standby, or default_transaction_read_only is on. Let DATABASE_URL name the server that takes writes.",
    ),
    (asyncpg.InsufficientResourcesError, "Give PostgreSQL more of it, and run the command again."),
    (asyncpg.OperatorInterventionError, "Run it again when PostgreSQL is there."),
    (asyncpg.PostgresConnectionError, "Run it again when PostgreSQL is there."),
    (asyncpg.PostgresError, "It may be run again."),
)

# The connection is gone, or says nothing any more.
_LOST = (asyncpg.InterfaceError, asyncpg.InternalClientError, ConnectionError, socket.gaierror)


def main() -> None:
    """Run the command line; an error that somebody can mend becomes a sentence and exit status 1."""
    try:
        app()
    except KamiyoError as error:
        complain(str(error))
        sys.exit(1)
    except asyncpg.PostgresError as error:
        # Not its detail, which may quote a row.
        said = f"{type(error).__name__}: {error.args[0] if error.args else ''}"
        mend = next(words for kind, words in _MENDS if isinstance(error, kind))
        complain(f"PostgreSQL ended the command: {said}. What was committed before stays. {mend}")
        sys.exit(1)
    except TimeoutError:
        complain(
            "PostgreSQL did not answer in time. What was committed before stays. It may wait for somebody's lock: "
            "pg_stat_activity and pg_locks say whose. Run it again."
        )
        sys.exit(1)
    except _LOST as error:
        # That a transaction cannot be ended in order without its connection says nothing of what ended the connection.
        cause = error.__context__ if isinstance(error.__context__, UNAVAILABLE) else error
        complain(
            f"The connection to PostgreSQL is lost: {reason_of(cause)}. What was committed before stays. Run it again "
            "when PostgreSQL is there."
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
