"""`kamiyo doctor`: what stands between this installation and production, and the sentence that mends it."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kamiyo import doctor as practice
from kamiyo.cli.console import console, progressing, run_command, settings_for_commands
from kamiyo.doctor import STRIPE_PATH, Finding, Subject, Verdict
from kamiyo.settings import Settings
from kamiyo.web.system import database_url

_COLOURS = {Verdict.passed: "green", Verdict.warning: "yellow", Verdict.failed: "bold red"}


def doctor(
    url: Annotated[
        str | None, typer.Option(help="Where the running server is.  [default: http://127.0.0.1:PORT]")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="Where Stripe delivers to.  [default: KAMIYO_PUBLIC_URL with /api/v1/webhooks/stripe]"),
    ] = None,
    send_test: Annotated[bool, typer.Option("--send-test", help="Send a test message to every alert channel.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 1 for warnings as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")] = False,
) -> None:
    """Check this installation against the production checklist. Exit status 1 when a check fails.

    Changes nothing and stores nothing. Each check says what it looked at and, unless it passes, what mends it. With
    STRIPE_SECRET_KEY, the endpoints that Stripe knows are looked at too.
    """
    settings = settings_for_commands()
    server = (url or f"http://127.0.0.1:{settings.port}").rstrip("/")
    public = settings.public_url.rstrip("/")
    where = endpoint or (f"{public}{STRIPE_PATH}" if public else "")
    with progressing("checks") as progress:
        findings = run_command(_examine(settings, server, where, send_test, progress))
    if as_json:
        for finding in findings:
            typer.echo(json.dumps(_plain(finding)))
    else:
        _show(findings)
    bad = {Verdict.failed, Verdict.warning} if strict else {Verdict.failed}
    if any(finding.verdict in bad for finding in findings):
        raise typer.Exit(1)


async def _examine(
    settings: Settings, server: str, endpoint: str, send_test: bool, progress: Callable[[int], None]
) -> list[Finding]:
    count = 0

    def heard(_: Finding) -> None:
        nonlocal count
        count += 1
        progress(count)

    def subject(found: str | None) -> Subject:
        return Subject(settings, found, server, endpoint, send_test=send_test)

    # A look must not make a database where there is none.
    if settings.database_url is None and not (settings.data_dir / "postgres" / "data").exists():
        return await practice.examine(subject(None), heard=heard)
    async with database_url(settings) as found:
        return await practice.examine(subject(found), heard=heard)


def _plain(finding: Finding) -> dict[str, str]:
    return {
        "check": finding.check,
        "verdict": finding.verdict.value,
        "seen": finding.seen,
        "mend": finding.mend,
    }


def _show(findings: list[Finding]) -> None:
    table = Table("check", "verdict", "what was seen, and what mends it", box=None, pad_edge=False)
    for finding in findings:
        seen = Text(finding.seen)
        if finding.mend:
            seen.append(f"\n→ {finding.mend}", style="bold")
        table.add_row(escape(finding.check), f"[{_COLOURS[finding.verdict]}]{finding.verdict.value}[/]", seen)
    console.print(table)
    counted = Counter(finding.verdict for finding in findings)
    console.print(f"\n{', '.join(f'{counted[verdict]} {verdict.value}' for verdict in Verdict)}", highlight=False)
