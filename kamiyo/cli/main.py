"""The commands, put together."""

import sys
from typing import Annotated

import asyncpg
import typer

from kamiyo import __version__
from kamiyo.cli import billing, chaos, conform, doctor, events, serve, simulate, upgrade
from kamiyo.cli.console import complain
from kamiyo.database import reason_of
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


def main() -> None:
    """Run the command line; an error that somebody can mend becomes a sentence and exit status 1."""
    try:
        app()
    except KamiyoError as error:
        complain(str(error))
        sys.exit(1)
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        complain(f"PostgreSQL ended the command: {type(error).__name__}: {error}. It may be run again.")
        sys.exit(1)
    except (asyncpg.InternalClientError, ConnectionError, TimeoutError) as error:
        complain(f"PostgreSQL is away, or does not answer in time ({reason_of(error)}). The command may be run again.")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
