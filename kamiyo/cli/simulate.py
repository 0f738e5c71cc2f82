"""`kamiyo trigger`: realistic signed events, without a Stripe account."""

import contextlib
import json
import random
import time
from collections.abc import Iterator
from typing import Annotated

import httpx
import typer
from rich.table import Table

from kamiyo import simulator
from kamiyo.cli.console import complain, console, settings_for_commands
from kamiyo.errors import SettingsError
from kamiyo.signature import sign
from kamiyo.simulator import SimulatedEvent


def trigger(
    event_type: Annotated[
        str | None, typer.Argument(help="A Stripe event type: customer.created, invoice.payment_failed…")
    ] = None,
    story: Annotated[
        str | None, typer.Option(help=f"A whole lifecycle instead: {', '.join(simulator.STORIES)}.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Where to post. (default: http://127.0.0.1:PORT/api/v1/webhooks/stripe)"),
    ] = None,
    api_version: Annotated[
        str, typer.Option(help=f"Shape of the objects: {', '.join(simulator.API_VERSIONS)}.")
    ] = simulator.CURRENT_API_VERSION,
    only: Annotated[
        bool, typer.Option("--only", help="Post the event alone, without what must come before it.")
    ] = False,
    thin: Annotated[
        bool, typer.Option("--thin", help="Post each event's thin twin as well, where there is one, before it.")
    ] = False,
    repeat: Annotated[int, typer.Option(help="Post the last event this many times.", min=1, max=100)] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same ids. (default: random)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")] = False,
) -> None:
    """Post realistic, signed Stripe events to a running Kamiyo.

    Examples: `kamiyo trigger invoice.payment_failed`, `kamiyo trigger --story dunning`.
    """
    if (event_type is None) == (story is None):
        raise typer.BadParameter("give an event type, or --story NAME")
    if api_version not in simulator.API_VERSIONS:
        raise typer.BadParameter(f"known API versions: {', '.join(simulator.API_VERSIONS)}")
    settings = settings_for_commands()
    if not settings.webhook_secrets:
        raise SettingsError("STRIPE_WEBHOOK_SECRET is not set, so nothing can be signed. Set it, or start `make run`.")
    events = _events(event_type, story, seed, only)
    events += events[-1:] * (repeat - 1)
    target = url or f"http://127.0.0.1:{settings.port}/api/v1/webhooks/stripe"
    answers = _post(events, target, settings.webhook_secrets[0], api_version, thin=thin)
    if as_json:
        for answer in answers:
            typer.echo(json.dumps(answer))
    else:
        _show(answers, target)
    if any(answer["status_code"] != 200 for answer in answers):
        raise typer.Exit(1)


def _events(event_type: str | None, story: str | None, seed: int | None, only: bool) -> list[SimulatedEvent]:
    # Ids need to differ between calls, not to be unpredictable.
    chosen = random.randrange(2**48) if seed is None else seed  # noqa: S311 - see above
    now = int(time.time())
    if story is not None:
        if story not in simulator.STORIES:
            raise typer.BadParameter(f"known stories: {', '.join(simulator.STORIES)}")
        return list(simulator.STORIES[story](simulator.World(chosen, start=now)))
    if event_type is None:
        raise typer.BadParameter("give an event type, or --story NAME")
    try:
        events = simulator.single(event_type, seed=chosen, now=now)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return events[-1:] if only else list(events)


def _bodies(events: list[SimulatedEvent], api_version: str, *, thin: bool) -> Iterator[tuple[str, str, bytes]]:
    for event in events:
        with contextlib.suppress(ValueError):  # some types have none
            if thin:
                twin = simulator.thin(event)
                yield twin["id"], twin["type"], simulator.encode(twin)
        yield event.id, event.type, event.body(api_version)


def _post(
    events: list[SimulatedEvent], url: str, secret: str, api_version: str, *, thin: bool
) -> list[dict[str, object]]:
    answers: list[dict[str, object]] = []
    with httpx.Client(timeout=30) as client:
        for event_id, event_type, body in _bodies(events, api_version, thin=thin):
            signature = sign(body, secret, int(time.time()))
            try:
                reply = client.post(
                    url,
                    content=body,
                    headers={"Stripe-Signature": signature, "Content-Type": "application/json"},
                )
            except httpx.HTTPError as error:
                complain(f"cannot reach {url}: {error}. Is `make run` or `kamiyo serve` running?")
                raise typer.Exit(2) from error
            said = reply.json() if reply.headers.get("content-type", "").startswith("application/json") else {}
            answers.append(
                {
                    "event_id": event_id,
                    "event_type": event_type,
                    "status_code": reply.status_code,
                    "message": said.get("message") or said.get("detail") or reply.reason_phrase,
                }
            )
    return answers


def _show(answers: list[dict[str, object]], target: str) -> None:
    table = Table("event", "id", "answer", box=None, pad_edge=False)
    for answer in answers:
        colour = "green" if answer["status_code"] == 200 else "red"
        table.add_row(
            str(answer["event_type"]),
            str(answer["event_id"]),
            f"[{colour}]{answer['status_code']}[/] {answer['message']}",
        )
    console.print(table)
    look = f"look: kamiyo events show {answers[-1]['event_id']}"
    if any(answer["status_code"] == 400 for answer in answers):
        look = "was the server started with another STRIPE_WEBHOOK_SECRET than the one that is set here?"
    console.print(f"\nposted to {target}; {look}", highlight=False)
