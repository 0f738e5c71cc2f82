"""`kamiyo conform URL`: what Stripe, the network and strangers do to a receiver, tried on any receiver."""

import json
import ssl
from contextlib import AsyncExitStack
from typing import Annotated

import httpx
import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kamiyo import conform as kit
from kamiyo.cli.console import connected, console, progressing, run_command, settings_for_commands
from kamiyo.conform import ConformError, Outcome, Result

_COLOURS = {Outcome.passed: "green", Outcome.failed: "bold red", Outcome.skipped: "yellow"}


def conform(
    url: Annotated[str, typer.Argument(help="Where the receiver takes Stripe's deliveries.")],
    secret: Annotated[
        list[str] | None,
        typer.Option(
            help="Signing secret of the receiver (whsec_…); again for each other that it takes.  "
            "[default: STRIPE_WEBHOOK_SECRET]"
        ),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(help="Of a Kamiyo: its ADMIN_API_KEY, to see what became of the events."),
    ] = None,
    own: Annotated[
        bool,
        typer.Option(
            "--own",
            help="The receiver is the Kamiyo of these settings: take its admin key from them, and look into "
            "its billing tables.",
        ),
    ] = False,
    event_url: Annotated[
        str | None,
        typer.Option(
            help="Where any receiver shows an event, with {event_id} in it: 404, or JSON with `status` and `times`."
        ),
    ] = None,
    object_url: Annotated[
        str | None,
        typer.Option(
            help="Where any receiver shows an object, with {object_id} (and {object_type}) in it: 404, or "
            "JSON with Stripe's field names."
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Make this check alone; again for each other, by name.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds the receiver has to answer, and to finish.", min=0.5, max=60)
    ] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")] = False,
) -> None:
    """Check any receiver of Stripe's webhooks, from outside. Exit status 1 when a check fails.

    Posts a few hundred invented events (test mode) to URL and nowhere else: use a receiver whose tables are
    for trying out.
    """
    address = kit.Address.of(url)
    for name, template, place in (
        ("--event-url", event_url, "{event_id}"),
        ("--object-url", object_url, "{object_id}"),
    ):
        if template is not None and place not in template:
            raise ConformError(f"{name} needs {place} in it")
    checks = [check for check in kit.CHECKS if not only or check.name in only]
    unknown = set(only or ()) - {check.name for check in kit.CHECKS}
    if unknown:
        names = ", ".join(check.name for check in kit.CHECKS)
        raise ConformError(f"no check is called {' or '.join(sorted(unknown))}; there are {names}")
    settings = settings_for_commands() if own or not secret else None
    secrets = tuple(secret or (settings.webhook_secrets if settings else ()))
    if not secrets:
        raise ConformError("no secret to sign with: give --secret whsec_…, the one that the receiver takes")
    if own and settings:
        admin_key = admin_key or settings.admin_api_key.get_secret_value()

    async def run() -> list[Result]:
        async with AsyncExitStack() as stack:
            # The views are trusted as the receiver is, and asked as directly: no proxy of the environment's.
            views = httpx.AsyncClient(timeout=timeout, trust_env=False, verify=ssl.create_default_context())
            await stack.enter_async_context(views)
            events: kit.EventView | None = None
            if event_url:
                events = kit.EventAddress(views, event_url)
            elif admin_key:
                events = kit.AdminView(views, url, admin_key)
            objects: kit.ObjectView | None = None
            if object_url:
                objects = kit.ObjectAddress(views, object_url)
            elif own and settings:
                objects = kit.BillingTables(await stack.enter_async_context(connected(settings)))
            target = kit.Target(address=address, secrets=secrets, timeout=timeout, events=events, objects=objects)
            with progressing("checks", len(checks)) as progress:
                return await kit.run(target, checks, progress=progress)

    results = run_command(run())
    if as_json:
        for result in results:
            typer.echo(json.dumps(_plain(result)))
    else:
        _show(results)
    if any(result.failed for result in results):
        raise typer.Exit(1)


def _plain(result: Result) -> dict[str, object]:
    return {
        "check": result.check.name,
        "outcome": result.verdict.outcome.value,
        "detail": result.verdict.detail,
        "why": result.check.why,
        "seconds": round(result.seconds, 3),
    }


def _show(results: list[Result]) -> None:
    table = Table("check", "verdict", "what was seen", box=None, pad_edge=False)
    for result in results:
        outcome = result.verdict.outcome
        seen = Text(result.verdict.detail)
        if result.failed:
            seen.append(f"\n{result.check.why}", style="dim")
        table.add_row(escape(result.check.name), f"[{_COLOURS[outcome]}]{outcome.value}[/]", seen)
    console.print(table)
    counted = (f"{sum(one.verdict.outcome is outcome for one in results)} {outcome}" for outcome in Outcome)
    console.print(f"\n{', '.join(counted)}", highlight=False)
    if any(one.verdict.outcome is Outcome.skipped for one in results):
        console.print(
            "Skipped is not passed: docs/conformance.md says what a receiver can show, to be looked at.",
            highlight=False,
        )
