"""`kamiyo events …`, `kamiyo replay`, `kamiyo rebuild`, `kamiyo cleanup`: what an operator asks and does."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar

import asyncpg
import typer
from rich.table import Table

from kamiyo import database, handlers, inbox
from kamiyo import rebuild as rebuilding
from kamiyo import reconcile as reconciling
from kamiyo.cli.console import connected, console, progressing, settings_for_commands
from kamiyo.event import decode
from kamiyo.inbox import Filters, Status
from kamiyo.reconcile import Compared
from kamiyo.stripe_api import StripeApi
from kamiyo.web.system import database_url

app = typer.Typer(help="See what came in, and run failed events again.", no_args_is_help=True)

_T = TypeVar("_T")

_StatusOption = Annotated[Status | None, typer.Option(help="Only events that stand like this.")]
_TypeOption = Annotated[str | None, typer.Option("--type", help="Only this event type.")]
_CustomerOption = Annotated[str | None, typer.Option(help="Only events of this customer (cus_…).")]
_ObjectOption = Annotated[str | None, typer.Option("--object", help="Only events about this object (in_…, sub_…).")]
_AccountOption = Annotated[str | None, typer.Option(help="Only events of this account (acct_…); own: one's own.")]
_ContextOption = Annotated[str | None, typer.Option(help="Only events of this context (acct_…/acct_…).")]
_LivemodeOption = Annotated[
    bool | None, typer.Option("--livemode/--testmode", help="Only events of live mode, or of test mode.")
]
_SinceOption = Annotated[datetime | None, typer.Option(help="Only events received from then on (UTC).")]
_UntilOption = Annotated[datetime | None, typer.Option(help="Only events received before then (UTC).")]

_COLOURS = {"processed": "green", "failed": "red", "processing": "cyan", "pending": "yellow"}


def _with_database(work: Callable[[Any], Awaitable[_T]]) -> _T:
    async def run() -> _T:
        async with connected(settings_for_commands()) as db:
            return await work(db)

    return asyncio.run(run())


@app.command("list")
def list_events(
    status: _StatusOption = None,
    event_type: _TypeOption = None,
    customer: _CustomerOption = None,
    object_id: _ObjectOption = None,
    account: _AccountOption = None,
    context: _ContextOption = None,
    livemode: _LivemodeOption = None,
    since: _SinceOption = None,
    until: _UntilOption = None,
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1, max=10_000)] = 20,
) -> None:
    """List events, newest first."""
    account = "" if account == inbox.OWN else account
    filters = Filters(status, event_type, customer, object_id, account, context, livemode, _utc(since), _utc(until))
    rows = _with_database(lambda db: inbox.listed(db, filters, limit=limit))
    columns = ["received (UTC)", "event", "type", "status", "tries", "object", "customer"]
    # Most have one account and one mode: a column that says the same in each line only takes room.
    several = len({(row["account"], row["livemode"]) for row in rows}) > 1
    table = Table(*columns, *(["account", "mode"] if several else []), box=None, pad_edge=False)
    for row in rows:
        whose = [row["account"] or inbox.OWN, "live" if row["livemode"] else "test"] if several else []
        table.add_row(
            row["created_at"].strftime("%Y-%m-%d %H:%M:%S"),
            row["event_id"],
            row["event_type"],
            _coloured(row),
            str(row["attempts"]),
            row["object_id"] or "",
            row["customer"] or "",
            *whose,
        )
    console.print(table if rows else "no events")


@app.command("show")
def show_event(
    event_id: Annotated[str, typer.Argument(help="The event's id (evt_…).")],
    payload: Annotated[bool, typer.Option(help="Print the payload as well.")] = True,
) -> None:
    """Show one event: where it stands, every failed try, and its payload."""
    row, failures = _with_database(lambda db: inbox.one(db, event_id))
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name in (
        "event_id",
        "event_type",
        "status",
        "outcome",
        "created_at",
        "stripe_created",
        "processed_at",
    ):
        facts.add_row(name, _coloured(row) if name == "status" else _said(row[name]))
    for name in (
        "attempts",
        "next_try_at",
        "read_due_at",
        "object_type",
        "object_id",
        "customer",
        "account",
        "context",
        "livemode",
        "api_version",
        "source",
    ):
        facts.add_row(name, _said(row[name]))
    console.print(facts)
    for failure in failures:
        console.print(
            f"\n[red]try {failure['retry_count']}[/] {_said(failure['created_at'])}  {failure['error_type']}: "
            f"{failure['error_message']}",
            highlight=False,
        )
        console.print(failure["traceback"], style="dim", highlight=False, markup=False)
    if payload:
        console.print()
        console.print_json(json.dumps(decode(row["body"])) if row["body"] is not None else '"removed by retention"')


@app.command("retry")
def retry_event(event_id: Annotated[str, typer.Argument(help="The failed event's id (evt_…).")]) -> None:
    """Run a failed event again, with five new tries."""
    _with_database(lambda db: inbox.retry(db, event_id))
    console.print(f"{event_id} is back in line; see `kamiyo events show {event_id}`", highlight=False)


def replay(
    status: Annotated[Status, typer.Option(help="failed, or processed to run finished events again.")] = Status.failed,
    event_type: _TypeOption = None,
    customer: _CustomerOption = None,
    object_id: _ObjectOption = None,
    account: _AccountOption = None,
    context: _ContextOption = None,
    livemode: _LivemodeOption = None,
    since: _SinceOption = None,
    until: _UntilOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Run many events again: the failed ones, or those that the filters name. Counts first, and asks.

    Handlers of processed events run once more for each; the billing tables are the same afterwards.
    """
    if status not in (Status.failed, Status.processed):
        raise typer.BadParameter("only failed or processed events can be replayed")
    account = "" if account == inbox.OWN else account
    filters = Filters(status, event_type, customer, object_id, account, context, livemode, _utc(since), _utc(until))
    count = _with_database(lambda db: inbox.count_matching(db, filters))
    console.print(f"{count} {status.value} events match", highlight=False)
    if dry_run or not count:
        return
    if not yes:
        typer.confirm("Run them again?", abort=True)
    with progressing("back in line", count) as progress:
        done = _with_database(lambda db: inbox.replay(db, filters, progress=progress))
    console.print(f"{done} events are back in line", highlight=False)


def reconcile(
    since: Annotated[
        str,
        typer.Option(help="How far back, as 72h, 7d or 90m; Stripe keeps 30 days. Empty: where the last one ended."),
    ] = "",
) -> None:
    """Compare with Stripe's own lists of events, and take in what was never delivered. Needs STRIPE_SECRET_KEY.

    Every account and mode that there is a key for, and the connected accounts that events have come from. Where one
    was broken off, the next goes on.
    """
    settings = settings_for_commands()
    begin = int(datetime.now(UTC).timestamp()) - _seconds(since) if since else None

    async def compare() -> Compared | None:
        async with database_url(settings) as url:
            pool = await database.open_pool(url, size=4, application="kamiyo reconcile", idle_limit=60)
            try:
                async with pool.acquire() as db:
                    await database.migrate(db)
                api = StripeApi(pool, settings)
                try:
                    return await reconciling.reconcile(
                        *(pool, api),
                        since=begin,
                        own_account=settings.stripe_account_id,
                        mirrored=settings.mirrored,
                        progress=progress,
                    )
                finally:
                    await api.close()
            finally:
                await pool.close()

    handlers.load(settings.handler_modules)
    with progressing("events compared") as progress:
        done = asyncio.run(compare())
    if done is None:
        console.print("another process is comparing just now")
    else:
        console.print(
            f"{done.looked_at} events compared: {done.added} were not here and are now, {done.missed} of them of a "
            "type that should have been delivered",
            highlight=False,
        )
        if done.refused:
            accounts = ", ".join(done.refused)
            console.print(
                f"Stripe does not let STRIPE_SECRET_KEY read {accounts}: one that has left, or one that needs "
                "a key of its own in STRIPE_SECRET_KEYS",
                highlight=False,
            )


def _seconds(text: str) -> int:
    units = {"h": 3600, "d": 86400, "m": 60}
    if len(text) < 2 or text[-1] not in units or not text[:-1].isdigit():
        raise typer.BadParameter("--since takes a number and h, d or m: 72h, 7d, 90m")
    return min(int(text[:-1]) * units[text[-1]], 30 * 86400)


def rebuild() -> None:
    """Make the four billing tables again from the stored events alone, and stripe_objects as KAMIYO_MIRROR says.

    Receiving goes on meanwhile; processing waits until it is done.
    """
    with progressing("events read") as progress:
        mirrored = settings_for_commands().mirrored
        done = _with_database(lambda db: rebuilding.rebuild(db, mirrored=mirrored, progress=progress))
    console.print(f"the billing tables are rebuilt from {done} events", highlight=False)


def cleanup(
    days: Annotated[int, typer.Option(help="Remove what was received more than this many days ago.", min=1)] = 30,
) -> None:
    """Remove old processed events with their bodies. Never touches an event that is not processed."""
    with progressing("removed") as progress:

        async def prune(db: Any) -> int:
            done = await inbox.prune(db, datetime.now(UTC) - timedelta(days=days), progress=progress)
            await inbox.audit(db, "cleanup", {"days": days}, done)
            return done

        done = _with_database(prune)
    console.print(f"{done} events from more than {days} days ago are removed", highlight=False)


def _coloured(row: asyncpg.Record) -> str:
    status = row["status"]
    dead = status == "failed" and row["next_try_at"] is None
    # It waits until what it names is read from Stripe.
    unread = status == "pending" and row["read_due_at"] is not None
    return f"[{_COLOURS[status]}]{'dead' if dead else 'unread' if unread else status}[/]"


def _said(value: Any) -> str:
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + " UTC"
    return "-" if value is None or value == "" else str(value)


def _utc(moment: datetime | None) -> datetime | None:
    return moment if moment is None or moment.tzinfo else moment.replace(tzinfo=UTC)
