"""`kamiyo conform URL`: what Stripe, the network and strangers do to a receiver, tried on any receiver."""

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Annotated

import httpx
import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kamiyo import conform as kit
from kamiyo.cli.console import connected, console, progressing, settings_for_commands
from kamiyo.conform import ConformError, Outcome, Result
from kamiyo.settings import Settings

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
        typer.Option(help="For a Kamiyo: its ADMIN_API_KEY, to see what became of the events."),
    ] = None,
    own: Annotated[
        bool,
        typer.Option(
            "--own",
            help="The receiver is the Kamiyo of these settings: take its admin key from them, and look into its "
            "billing tables.",
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
            help="Where any receiver shows an object, with {object_id} (and {object_type}) in it: 404, or JSON with "
            "Stripe's field names."
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds the receiver has to answer, and to finish.", min=0.5, max=60)
    ] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")] = False,
) -> None:
    """Check any receiver of Stripe's webhooks, from outside. Exit status 1 when a check fails.

    Posts some 350 invented events, in test mode, to URL and nowhere else: not for a receiver whose tables matter.
    """
    results = asyncio.run(_conform(url, tuple(secret or ()), admin_key, own, event_url, object_url, timeout))
    if as_json:
        for result in results:
            typer.echo(json.dumps(_plain(result)))
    else:
        _show(results)
    if any(result.failed for result in results):
        raise typer.Exit(1)


async def _conform(
    url: str,
    secrets: tuple[str, ...],
    admin_key: str | None,
    own: bool,
    event_url: str | None,
    object_url: str | None,
    timeout: float,
) -> list[Result]:
    settings = settings_for_commands() if own or not secrets else None
    if settings is not None and not secrets:
        secrets = tuple(settings.webhook_secrets)
    if not secrets:
        raise ConformError(
            "no secret to sign with: give --secret whsec_…, the one the receiver verifies with"
        )
    if own and settings is not None:
        admin_key = admin_key or settings.admin_api_key.get_secret_value()
    for name, template, place in (
        ("--event-url", event_url, "{event_id}"),
        ("--object-url", object_url, "{object_id}"),
    ):
        if template is not None and place not in template:
            raise ConformError(f"{name} needs {place} in it")
    async with AsyncExitStack() as stack:
        # What the environment says of proxies is not asked: deliveries go straight to the receiver, and so do these.
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=timeout, trust_env=False))
        target = kit.Target(
            address=kit.Address.of(url),
            secrets=secrets,
            timeout=timeout,
            events=_event_view(client, url, admin_key, event_url),
            objects=await _object_view(stack, client, object_url, settings if own else None),
        )
        with progressing("checks", len(kit.CHECKS)) as progress:
            return await kit.run(target, progress=progress)


def _event_view(
    client: httpx.AsyncClient, url: str, admin_key: str | None, event_url: str | None
) -> kit.EventView | None:
    if event_url is not None:
        return kit.EventAddress(client, event_url)
    return kit.AdminView(client, url, admin_key) if admin_key else None


async def _object_view(
    stack: AsyncExitStack, client: httpx.AsyncClient, object_url: str | None, settings: Settings | None
) -> kit.ObjectView | None:
    if object_url is not None:
        return kit.ObjectAddress(client, object_url)
    if settings is not None:
        return kit.BillingTables(await stack.enter_async_context(connected(settings)))
    return None


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
    counts = {outcome: sum(one.verdict.outcome is outcome for one in results) for outcome in Outcome}
    console.print(
        f"\n{counts[Outcome.passed]} passed, {counts[Outcome.failed]} failed, {counts[Outcome.skipped]} skipped",
        highlight=False,
    )
    if any(one.verdict.outcome is Outcome.skipped for one in results):
        console.print(
            "Skipped is not passed: docs/conformance.md says what the receiver can show so that it can be seen.",
            highlight=False,
        )
