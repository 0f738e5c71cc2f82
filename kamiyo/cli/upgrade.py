"""`kamiyo upgrade-report`: what a switch to another Stripe API version would change."""

import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from kamiyo import handlers, upgrade
from kamiyo.cli.console import connected, console, progressing, run_command, settings_for_commands
from kamiyo.settings import Settings
from kamiyo.upgrade import Counted, Report, TypeReport

_WHAT = {
    "gone": "gone",
    "new": "new",
    "kind": "of another kind",
    "value": "of another value",
}
_SIDES = {"real": "the endpoint in use", "shadow": "the twin endpoint"}


def upgrade_report(
    grace: Annotated[
        int, typer.Option(help="Seconds during which the twin of an event may still be on its way.", min=0)
    ] = 600,
    shapes: Annotated[
        bool, typer.Option("--shapes", help="List changed fields of every type, not only of those with handlers.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit status 1 also where a type with handlers has a field less.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object, for scripts.")] = False,
) -> None:
    """Compare what a twin endpoint on another API version delivers with the real events, field by field.

    The twin is a second endpoint in Stripe's dashboard, on the version to try, at …/stripe?shadow=1, with its signing
    secret in STRIPE_SHADOW_WEBHOOK_SECRET. Nothing is changed. No value is shown, only fields, counts and event ids.

    Exit status 0: a switch changes nothing that Kamiyo makes of events. 1: it does, or something is missing to say so.
    2: there is nothing to compare.
    """
    settings = settings_for_commands()
    handlers.load(settings.handler_modules)
    with progressing("twins compared") as progress:
        found = run_command(_compare(settings, float(grace), progress))
    handled = {event_type for event_type in found.types if handlers.registry.of(event_type)}
    breaks = {name for name in handled if any(kind in ("gone", "kind") for kind, _ in found.types[name].shape)}
    if as_json:
        typer.echo(json.dumps(_plain(found, handled)))
    else:
        _show(found, handled, set(found.types) if shapes else handled)
    if not found.pairs and not found.types:
        raise typer.Exit(2)
    if found.changes or (strict and breaks):
        raise typer.Exit(1)


async def _compare(settings: Settings, grace: float, progress: Callable[[int], None]) -> Report:
    async with connected(settings) as db:
        return await upgrade.report(db, grace=grace, progress=progress)


# ── In words ────────────────────────────────────────────────────────────────────────────────────────────────────


def _show(found: Report, handled: set[str], shaped: set[str]) -> None:
    if found.since is None:
        console.print(
            "Nothing to compare: the twin endpoint has delivered nothing yet. In Stripe's dashboard add an endpoint on "
            "the version to try, for the same events, at …/stripe?shadow=1, and set STRIPE_SHADOW_WEBHOOK_SECRET.",
            highlight=False,
        )
        return
    old, new = (", ".join(sorted(found.versions[side])) or "?" for side in ("real", "shadow"))
    console.print(f"{found.pairs} pairs since {found.since:%Y-%m-%d %H:%M} UTC: {old} → {new}\n", highlight=False)
    table = Table("type", "pairs", "alike", "differ", "no twin", "no real", "handlers", box=None, pad_edge=False)
    for name, one in sorted(found.types.items()):
        style = "red" if one.changes else ""
        missing = str(one.without_twin.count or "-"), str(one.without_real.count or "-")
        differ = one.pairs - one.alike
        table.add_row(
            *(name, str(one.pairs), str(one.alike), str(differ or "-"), *missing, "yes" if name in handled else "-"),
            style=style,
        )
    console.print(table)
    for title, rows in _sections(found, shaped):
        if rows:
            console.print(f"\n[bold]{title}[/]", highlight=False)
            section = Table("type", "what", "events", "for example", box=None, pad_edge=False)
            for column in section.columns:
                column.overflow = "fold"  # what is cut off cannot be copied
            for row in rows:
                section.add_row(*row)
            console.print(section)
    console.print(
        "\n[bold red]A switch would change what the tables say, or it cannot be told yet.[/]"
        if found.changes
        else "\n[bold green]A switch changes nothing that Kamiyo makes of these events.[/]",
        highlight=False,
    )


_Row = tuple[str, str, str, str]


def _sections(found: Report, shaped: set[str]) -> Iterator[tuple[str, list[_Row]]]:
    types = sorted(found.types.items())
    yield (
        "The tables would say something else",
        [_row(name, what, c, one.columns[what]) for name, one in types for what, c in one.differing.items()],
    )
    yield (
        "Objects that cannot be read",
        [_row(name, f"{_SIDES[side]}: {why}", c) for name, one in types for (side, why), c in one.unreadable.items()],
    )
    for side in ("real", "shadow"):
        yield (
            f"Only {_SIDES[side]} receives",
            [_row(name, "all", _missing(one, side)) for name, one in types if one.only == side],
        )
        yield (
            f"Only {_SIDES[side]} received these events",
            [
                _row(name, "some", _missing(one, side))
                for name, one in types
                if _missing(one, side).count and one.only is None
            ],
        )
    yield (
        "Not compared: the body is past its retention, or too many are alike",
        [_row(name, "", one.not_compared) for name, one in types if one.not_compared.count],
    )
    yield (
        "What handlers would see in event.object",
        [
            _row(name, f"{path}: {_WHAT[kind]}", c, one.pairs)
            for name, one in types
            if name in shaped
            for (kind, path), c in sorted(one.shape.items())
        ],
    )


def _missing(one: TypeReport, side: str) -> Counted:
    return one.without_twin if side == "real" else one.without_real


def _row(name: str, what: str, counted: Counted, of: int | None = None) -> _Row:
    count = f"{counted.count} of {of}" if of else str(counted.count)
    return name, what, count, counted.examples[0] if counted.examples else ""


# ── For scripts ─────────────────────────────────────────────────────────────────────────────────────────────────


def _plain(found: Report, handled: set[str]) -> dict[str, Any]:
    return {
        "since": found.since and found.since.isoformat(),
        "until": found.until.isoformat(),
        "changes": found.changes,
        "pairs": found.pairs,
        "versions": {side: dict(counts) for side, counts in found.versions.items()},
        "types": {name: _plain_type(one, name in handled) for name, one in sorted(found.types.items())},
    }


def _plain_type(one: TypeReport, handled: bool) -> dict[str, Any]:
    return {
        "pairs": one.pairs,
        "alike": one.alike,
        "changes": one.changes,
        "only": one.only,
        "handled": handled,
        "fields": {name: _agreement(count, one.differing.get(name)) for name, count in one.columns.items()},
        "unreadable": [_said(c, side=side, why=why) for (side, why), c in one.unreadable.items()],
        "shape": [_said(c, path=path, what=kind) for (kind, path), c in sorted(one.shape.items())],
        "without_twin": _said(one.without_twin),
        "without_real": _said(one.without_real),
        "not_compared": _said(one.not_compared),
    }


def _agreement(count: int, differing: Counted | None) -> dict[str, Any]:
    if differing is None:
        return {"agree": count, "differ": 0}
    return {"agree": count - differing.count, "differ": differing.count, "examples": differing.examples}


def _said(counted: Counted, **facts: str) -> dict[str, Any]:
    return {**facts, "count": counted.count, "examples": counted.examples}
