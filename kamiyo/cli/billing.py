"""`kamiyo backfill`, `kamiyo audit`: the billing tables and Stripe's own objects."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from kamiyo import audit as auditing
from kamiyo import backfill as filling
from kamiyo import projections
from kamiyo.audit import Audited, Difference, Finding, Verdict
from kamiyo.backfill import Filled
from kamiyo.cli.console import (
    complain,
    console,
    pooled,
    progressing,
    run_command,
    settings_for_commands,
    until_broken_off,
)
from kamiyo.database import Pool
from kamiyo.errors import KamiyoError
from kamiyo.refused import named
from kamiyo.settings import Settings
from kamiyo.stripe_api import StripeApi

_AccountOption = Annotated[
    str, typer.Option(help="A connected account (acct_…).  [default: the account of STRIPE_SECRET_KEY]")
]
_LivemodeOption = Annotated[
    bool | None,
    typer.Option("--livemode/--testmode", help="The mode to read.  [default: that of the account's first key]"),
]


class RebuildGoingOn(KamiyoError):
    """Nobody else can write to the billing tables while they are made again."""

    def __init__(self) -> None:
        super().__init__(
            "The billing tables are being made again (`kamiyo rebuild`), and until that is done nobody else can write "
            "to them. What was written before stays. Run this again when the rebuild is done."
        )


class What(StrEnum):
    """What to fill."""

    customers = "customers"
    subscriptions = "subscriptions"
    invoices = "invoices"
    payment_methods = "payment_methods"
    all = "all"


def backfill(
    what: Annotated[What, typer.Argument(help="customers, subscriptions, invoices, payment_methods, or all.")],
    account: _AccountOption = "",
    livemode: _LivemodeOption = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin with the newest again, not where an earlier run was ended.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")] = False,
) -> None:
    """Fill the billing tables from Stripe's lists of objects. Needs STRIPE_SECRET_KEY. Exit status 1 when PostgreSQL
    refuses a row.

    May be ended at any moment, and goes on from there when it is run again. Events may come in meanwhile: nothing newer
    is overwritten. Payment methods take a request for each customer, within KAMIYO_STRIPE_API_RATE.
    """
    settings = settings_for_commands()
    collections = filling.COLLECTIONS if what is What.all else (what.value,)

    async def fill(show: Callable[[int], None]) -> list[Filled]:
        at: dict[str, int] = {}

        def progress(collection: str, objects: int) -> None:
            at[collection] = objects
            show(sum(at.values()))

        async with _asking(settings, account, livemode) as (pool, api):
            work = filling.backfill(*(pool, api, collections), account=account, restart=restart, progress=progress)
            return await until_broken_off(work, pool.terminate)

    with progressing("objects in") as show:
        done = run_command(fill(show))
    for collection in collections:
        one = next((one for one in done if one.collection == collection), None)
        if as_json:
            typer.echo(json.dumps(_filled(collection, one)))
        elif one is None:
            console.print(f"{collection}: filled by an earlier run; --restart begins again", highlight=False)
        else:
            left = f", {one.unreadable} could not be read (see the log)" if one.unreadable else ""
            left += f", {one.refused} refused by PostgreSQL" if one.refused else ""
            console.print(f"{collection}: {one.objects} objects in{left}", highlight=False)
    refused = [one.collection for one in done if one.refused]
    if refused:
        commands = " and ".join(f"`kamiyo backfill {name} --restart`" for name in refused)
        complain(
            "PostgreSQL refuses rows, by a constraint or a trigger of its owner's: row_refused in the log names each. "
            f"All others are in. Mend what refuses, and run {commands}."
        )
        raise typer.Exit(1)


def _filled(collection: str, one: Filled | None) -> dict[str, object]:
    facts: dict[str, object] = {"collection": collection, "filled_before": one is None}
    return facts | ({"objects": one.objects, "unreadable": one.unreadable, "refused": one.refused} if one else {})


def audit(
    sample: Annotated[
        str,
        typer.Option(help="The share of each table's rows to compare: 1%, 0.1%, 100%; at least twenty rows of each."),
    ] = "1%",
    repair: Annotated[
        bool, typer.Option("--repair", help="Put what Stripe says into the tables. Never over anything newer.")
    ] = False,
    account: _AccountOption = "",
    livemode: _LivemodeOption = None,
    show_values: Annotated[
        bool, typer.Option("--show-values", help="Show customers' data as well. Only on a terminal.")
    ] = False,
    wait: Annotated[float, typer.Option(help="Seconds between two looks at a row that differs.", min=0, max=600)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")] = False,
) -> None:
    """Compare rows of the billing tables with Stripe's objects. Exit status 1 when one differs, and was not mended.

    Needs STRIPE_SECRET_KEY; takes one request for each row, within KAMIYO_STRIPE_API_RATE. A row that differs is looked
    at again before it is told: the event that tells it may be on its way.
    """
    if show_values and (as_json or not sys.stdout.isatty()):
        raise typer.BadParameter("it shows customers' data, so only on a terminal, and not with --json")
    share = _share(sample)
    settings = settings_for_commands()

    async def compare() -> Audited:
        async with _asking(settings, account, livemode) as (pool, api):
            work = auditing.audit(
                *(pool, api),
                share=share,
                account=account,
                repair=repair,
                pause=lambda: asyncio.sleep(wait),
                progress=progress,
            )
            return await until_broken_off(work, pool.terminate)

    with progressing("rows compared") as progress:
        done = run_command(compare())
    if as_json:
        for finding in done.findings:
            typer.echo(json.dumps(_plain(finding)))
    elif done.findings:
        _show(done.findings, show_values)
    left = sum(not finding.mended for finding in done.findings)
    if as_json:
        counts = {"checked": done.checked, "differing": len(done.findings), "mended": len(done.findings) - left}
        typer.echo(json.dumps(counts | {"unsettled": done.unsettled}))
    else:
        _conclude(done, left, repair)
    if left:
        raise typer.Exit(1)


def _share(text: str) -> float:
    number = text.removesuffix("%")
    try:
        share = float(number) / 100
    except ValueError:
        share = -1
    if not 0 < share <= 1 or number == text:
        raise typer.BadParameter("takes a share such as 1%, 0.1% or 100%", param_hint="--sample")
    return share


@asynccontextmanager
async def _asking(settings: Settings, account: str, livemode: bool | None) -> AsyncIterator[tuple[Pool, StripeApi]]:
    """A pool on the configured or the embedded database, its migrations complete, and Stripe's API in that mode.

    Raises RebuildGoingOn where the tables could not be written to for that.
    """
    if livemode is None:
        livemode = next((key.livemode for key in settings.api_keys if key.account == account), None)
    # Room for the requests that are on their way at once: each takes its token of the budget from the database.
    async with pooled(settings) as pool:
        api = StripeApi(pool, settings, livemode=livemode)
        try:
            yield pool, api
        except TimeoutError as error:
            async with pool.acquire(timeout=10) as db:
                if await projections.are_held(db):
                    raise RebuildGoingOn from error
            raise
        finally:
            await api.close()


# ── What is told ────────────────────────────────────────────────────────────────────────────────────────────────

_WORDS = {
    Verdict.gone: "Stripe has no such object (404). Is the key of this account? Nothing is changed for it",
    Verdict.unreadable: "the object does not have the shape that Stripe documents",
}


def _plain(finding: Finding) -> dict[str, Any]:
    return {
        **{"table": finding.table, "id": finding.id, "account": finding.account, "livemode": finding.livemode},
        **{"verdict": finding.verdict.value, "mended": finding.mended},
        "differences": [
            {"column": one.column} | ({} if one.private else {"ours": one.ours, "stripe": one.stripes})
            for one in finding.differences
        ],
        **{"last_webhook_event_id": finding.event_id, "order_evidence": finding.evidence},
    }


def _show(findings: list[Finding], show_values: bool) -> None:
    table = Table("table", "id", "column", "our row", "Stripe", "", box=None, pad_edge=False)
    for finding in findings:
        mended = Text("mended", style="green") if finding.mended else Text("")
        if finding.verdict is not Verdict.differs:
            table.add_row(finding.table, finding.id, "", "", Text(_WORDS[finding.verdict]), mended)
        for one in finding.differences:
            shown = show_values or not one.private
            ours, stripes = (_said(one, value) if shown else "(customer's data)" for value in (one.ours, one.stripes))
            table.add_row(finding.table, finding.id, one.column, Text(ours), Text(stripes), mended)
    console.print(table)


_MOMENTS = ("created", "due_date", "cancel_at")


def _said(difference: Difference, value: Any) -> str:
    moment = difference.column in _MOMENTS or difference.column.endswith(("_at", "_start", "_end"))
    if moment and type(value) is int:
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return "-" if value is None else str(value)


def _conclude(done: Audited, left: int, repair: bool) -> None:
    wrong = len(done.findings)
    are = "is" if wrong == 1 else "are"
    said = f"{done.checked} rows compared: " + (
        f"{wrong} {are} not as Stripe has them" if wrong else "all as Stripe has them"
    )
    if repair and wrong:
        said += f", {wrong - left} mended"
    if done.unsettled:
        said += f"; {done.unsettled} changed too often to tell, and are left for the next time"
    console.print(f"\n{said}" if wrong else said, highlight=False)
    if done.refused:
        complain(
            f"PostgreSQL refuses {named(done.refused)}. Mend the constraint or the trigger that refuses, and run this "
            "again."
        )
    refused = {one.id for one in done.refused}
    if any(one.verdict is Verdict.differs and not one.mended and one.id not in refused for one in done.findings):
        console.print(
            "What was not mended is in a final state, which nothing overwrites: `kamiyo rebuild` makes it again."
            if repair
            else "`kamiyo audit --repair` puts what Stripe says into the tables.",
            highlight=False,
        )
