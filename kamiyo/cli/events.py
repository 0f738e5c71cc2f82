"""`kamiyo events …`, `kamiyo replay`, `kamiyo rebuild`, `kamiyo cleanup`: what an operator asks and does."""

import json
import re
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar

import asyncpg
import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kamiyo import handlers, inbox
from kamiyo import rebuild as rebuilding
from kamiyo import reconcile as reconciling
from kamiyo.cli.console import (
    IDLE_SECONDS,
    complain,
    connected,
    console,
    pooled,
    print_whole,
    progressing,
    run_command,
    settings_for_commands,
    until_broken_off,
)
from kamiyo.database import Connection
from kamiyo.errors import AdminError
from kamiyo.event import decode
from kamiyo.inbox import REPLAYABLE, Filters, State
from kamiyo.rebuild import Holder
from kamiyo.reconcile import Compared
from kamiyo.refused import Refusal, named
from kamiyo.stripe_api import StripeApi
from kamiyo.web.admin import detail_of, summary_of
from kamiyo.web.dashboard import attention, changes, queries
from kamiyo.web.dashboard.attention import Advice
from kamiyo.web.models import EventSummary

app = typer.Typer(help="See what came in, and run failed events again.", no_args_is_help=True)

_T = TypeVar("_T")


_AGO = re.compile(r"(\d{1,9})([mhd])")
_SECONDS = {"m": 60, "h": 3600, "d": 86400}


def _moment(text: str) -> datetime:
    """So long ago, or a moment as it is written in ISO 8601; in UTC where it says nothing else."""
    ago = _AGO.fullmatch(text)
    try:
        if ago is not None:
            return datetime.now(UTC) - timedelta(seconds=int(ago[1]) * _SECONDS[ago[2]])
        # As `events show` and the dashboard write it.
        moment = datetime.fromisoformat(text.strip().removesuffix(" UTC"))
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{text!r} is no moment. Write how long ago it was (90m, 72h, 7d), or 2026-11-23T21:05, in UTC."
        ) from None


_StatusOption = Annotated[
    State | None,
    typer.Option(help="Only events that stand like this; failed are those that are retrying and those that are dead."),
]
_TypeOption = Annotated[str | None, typer.Option("--type", help="Only this event type.")]
_CustomerOption = Annotated[str | None, typer.Option(help="Only events of this customer (cus_…).")]
_ObjectOption = Annotated[str | None, typer.Option("--object", help="Only events about this object (in_…, sub_…).")]
_AccountOption = Annotated[str | None, typer.Option(help="Only events of this account (acct_…); own: one's own.")]
_ContextOption = Annotated[str | None, typer.Option(help="Only events of this context (acct_…/acct_…).")]
_LivemodeOption = Annotated[
    bool | None, typer.Option("--livemode/--testmode", help="Only events of live mode, or of test mode.")
]
_SinceOption = Annotated[
    datetime | None,
    typer.Option(
        help="Only events received from then on: 90m, 72h, 7d ago, or 2026-11-23T21:05 (UTC).",
        parser=_moment,
        metavar="WHEN",
    ),
]
_UntilOption = Annotated[
    datetime | None, typer.Option(help="Only events received before then.", parser=_moment, metavar="WHEN")
]

_COLOURS = {
    **{State.pending: "yellow", State.unread: "yellow", State.processing: "cyan", State.processed: "green"},
    **{State.retrying: "red", State.dead: "bold red"},
}


def _with_database(work: Callable[[Any], Coroutine[Any, Any, _T]]) -> _T:
    async def run() -> _T:
        async with connected(settings_for_commands(), idle_limit=IDLE_SECONDS) as db:
            return await until_broken_off(work(db), db.terminate)

    return run_command(run())


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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")] = False,
) -> None:
    """List events, newest first, with why each stands as it does."""
    account = "" if account == inbox.OWN else account
    filters = Filters(status, event_type, customer, object_id, account, context, livemode, since, until)
    rows = _with_database(lambda db: inbox.listed(db, filters, limit=limit))
    if as_json:
        for row in rows:
            typer.echo(EventSummary(**summary_of(row)).model_dump_json())
        return
    columns = ["received (UTC)", "event", "type", "status", "tries", "why", "object", "customer"]
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
            Text(_why(row)),
            row["object_id"] or "",
            row["customer"] or "",
            *whose,
        )
    if rows:
        print_whole(table)
    else:
        console.print("no events")


def _why(row: asyncpg.Record) -> str:
    state = inbox.state_of(row)
    if state is State.unread:
        return "waits for Stripe"
    if state in (State.retrying, State.dead):
        error = (row["error_type"] or "failed").rpartition(".")[2]
        return error if state is State.dead else f"{error}, again {row['next_try_at']:%H:%M:%S}"
    return row["outcome"] or ""


@app.command("show")
def show_event(
    event_id: Annotated[str, typer.Argument(help="The event's id (evt_…).")],
    payload: Annotated[bool, typer.Option(help="Print the payload as well.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object, for scripts.")] = False,
) -> None:
    """Show one event: where it stands, every failed try, whether it may be run again, and its payload."""

    async def look(db: Connection) -> tuple[asyncpg.Record, Sequence[asyncpg.Record], Advice | None]:
        found, tries = await inbox.one(db, event_id)
        return found, tries, await _advice(db, found, tries)

    row, failures, advice = _with_database(look)
    if as_json:
        typer.echo(detail_of(row, failures, row["body"] if payload else None).decode())
        return
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
            f"\n[red]try {failure['retry_count']}[/] {_said(failure['created_at'])}  "
            f"{escape(failure['error_type'])}: {escape(failure['error_message'])}",
            highlight=False,
        )
        console.print(f"fingerprint {failure['fingerprint']}", style="dim", highlight=False)
        console.print(failure["traceback"], style="dim", highlight=False, markup=False)
    if advice is not None:
        console.print(f"\nMay I retry it? [bold]{advice.title}[/]", highlight=False)
        for note in advice.notes:
            console.print(f"  {note}", highlight=False, markup=False)
        console.print(f"  kamiyo events retry {event_id}", highlight=False)
    if payload:
        console.print()
        console.print_json(json.dumps(decode(row["body"])) if row["body"] is not None else '"removed by retention"')


async def _advice(db: Connection, row: asyncpg.Record, failures: Sequence[asyncpg.Record]) -> Advice | None:
    """Whether a failed event may be run again: what the dashboard says of it."""
    if row["status"] != "failed" or not failures:
        return None
    told = None
    if row["body"] is not None:
        told = changes.event_of(row["body"], row["created_at"], row["account"], row["livemode"])
    effect = await queries.effect(db, told, row["created_at"]) if told is not None else None
    return attention.advice(failures[-1]["error_type"], effect)


@app.command("retry")
def retry_event(
    event_id: Annotated[list[str], typer.Argument(help="The failed event's id (evt_…), or several.")],
) -> None:
    """Run failed events again, each with five new tries. Exit status 1 when one could not be."""
    _each(event_id, inbox.retry, _back_in_line)


def replay(
    status: Annotated[
        State | None,
        typer.Option(
            help="failed, of these retrying or dead alone, or processed to run finished events again.  "
            "[default: failed]"
        ),
    ] = None,
    event: Annotated[
        list[str] | None,
        typer.Option(help="This event (evt_…), failed or processed, and no other filter. May be said several times."),
    ] = None,
    event_type: _TypeOption = None,
    customer: _CustomerOption = None,
    object_id: _ObjectOption = None,
    account: _AccountOption = None,
    context: _ContextOption = None,
    livemode: _LivemodeOption = None,
    since: _SinceOption = None,
    until: _UntilOption = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="Only events that failed for this cause, as `kamiyo events show` names it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Run many events again: the failed ones, or those that the filters name. Counts first, and asks.

    Handlers of processed events run once more for each; the billing tables are the same afterwards. Exit status 1 when
    an event named by --event could not be run again.
    """
    if event:
        given = (status, event_type, customer, object_id, account, context, livemode, since, until, fingerprint)
        if any(one is not None for one in given):
            raise typer.BadParameter("it names the events by itself: leave the other filters out", param_hint="--event")
        _replay_named(list(dict.fromkeys(event)), dry_run=dry_run, yes=yes)
        return
    status = status or State.failed
    if status not in REPLAYABLE:
        raise typer.BadParameter(
            f"what is {status.value} is in line already; it takes {', '.join(REPLAYABLE)}", param_hint="--status"
        )
    account = "" if account == inbox.OWN else account
    filters = Filters(status, event_type, customer, object_id, account, context, livemode, since, until)
    count = _with_database(lambda db: inbox.count_matching(db, filters, fingerprint))
    console.print(f"{count} {status.value} events match", highlight=False)
    if dry_run or not count:
        return
    if not yes:
        typer.confirm("Run them again?", abort=True)
    with progressing("back in line", count) as progress:
        done = _with_database(lambda db: inbox.replay(db, filters, fingerprint, progress=progress))
    console.print(f"{done} events are back in line", highlight=False)


def _replay_named(event_ids: Sequence[str], *, dry_run: bool, yes: bool) -> None:
    _each(event_ids, inbox.require_replayable, lambda event_id, status: f"{event_id} is {status.value}")
    if dry_run:
        return
    if not yes:
        typer.confirm("Run it again?" if len(event_ids) == 1 else "Run them again?", abort=True)
    _each(event_ids, inbox.replay_one, _back_in_line)


def _back_in_line(event_id: str, _: None) -> str:
    return f"{event_id} is back in line; see `kamiyo events show {event_id}`"


def _each(
    event_ids: Sequence[str], work: Callable[[Connection, str], Coroutine[Any, Any, _T]], said: Callable[[str, _T], str]
) -> None:
    """Do something with each event, and say what it came to; exit status 1 where it was refused for one."""

    async def one_by_one(db: Connection) -> bool:
        refused = False
        for event_id in event_ids:
            try:
                came_to = await work(db, event_id)
            except AdminError as error:
                complain(str(error))
                refused = True
            else:
                console.print(said(event_id, came_to), highlight=False)
        return refused

    if _with_database(one_by_one):
        raise typer.Exit(1)


#: Stripe forgets events after so long.
_STRIPE_KEEPS = timedelta(days=30)


def reconcile(
    since: Annotated[
        datetime | None,
        typer.Option(
            help="How far back: 90m, 72h, 7d, or 2026-11-23T21:05 (UTC); Stripe keeps 30 days.  "
            "[default: where the last one ended]",
            parser=_moment,
            metavar="WHEN",
        ),
    ] = None,
) -> None:
    """Compare with Stripe's own lists of events, and take in what was never delivered. Needs STRIPE_SECRET_KEY.

    Every account and mode that there is a key for, and the connected accounts that events have come from. Where one
    was broken off, the next goes on.
    """
    settings = settings_for_commands()
    begin = int(max(since, datetime.now(UTC) - _STRIPE_KEEPS).timestamp()) if since else None

    async def compare() -> Compared | None:
        async with pooled(settings) as pool:
            api = StripeApi(pool, settings)
            try:
                comparing = reconciling.reconcile(
                    *(pool, api),
                    since=begin,
                    own_account=settings.stripe_account_id,
                    mirrored=settings.mirrored,
                    progress=progress,
                )
                return await until_broken_off(comparing, pool.terminate)
            finally:
                await api.close()

    handlers.load(settings.handler_modules)
    with progressing("events compared") as progress:
        done = run_command(compare())
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


def rebuild() -> None:
    """Make the four billing tables again from the stored events alone, and stripe_objects as KAMIYO_MIRROR says.

    Receiving goes on meanwhile; processing waits until it is done. Where another rebuild is going on, it says so, and
    waits for that. Exit status 1 when PostgreSQL refuses a row.
    """
    refused: list[Refusal] = []
    with progressing("events read") as progress:
        mirrored = settings_for_commands().mirrored
        done = _with_database(
            lambda db: rebuilding.rebuild(
                db, mirrored=mirrored, progress=progress, heard=refused.append, waits=_say_waiting
            )
        )
    console.print(f"the billing tables are rebuilt from {done} events", highlight=False)
    if refused:
        complain(
            f"PostgreSQL refuses {named(refused)}. These stand as they did before, and all others are made "
            "again. Mend the constraint or the trigger that refuses, and run `kamiyo rebuild` again."
        )
        raise typer.Exit(1)


def _say_waiting(holder: Holder) -> None:
    facts = [f"pid {holder.pid}", holder.application or "", f"since {_said(holder.since)}" if holder.since else ""]
    who = ", ".join(filter(None, facts))
    complain(
        f"The billing tables are being made again already, or a customer is being erased: another session ({who}) has "
        "them. This waits until that is done, and then makes them again itself; Ctrl-C ends it, and changes nothing."
    )


def cleanup(
    days: Annotated[int, typer.Option(help="Remove what was received more than this many days ago.", min=1)] = 30,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
) -> None:
    """Remove old processed events with their bodies. Never touches an event that is not processed."""
    if dry_run:
        found = _with_database(lambda db: inbox.count_prunable(db, days))
        console.print(f"{found.events} events from more than {days} days ago would be removed", highlight=False)
        if found.events:
            console.print(
                f"with {found.bodies} bodies; received from {_said(found.first)} to {_said(found.last)}",
                highlight=False,
            )
        return
    with progressing("removed") as progress:
        done = _with_database(lambda db: inbox.clean_up(db, days, progress=progress))
    console.print(f"{done} events from more than {days} days ago are removed", highlight=False)


def _coloured(row: asyncpg.Record) -> str:
    state = inbox.state_of(row)
    return f"[{_COLOURS[state]}]{state.value}[/]"


def _said(value: Any) -> str:
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + " UTC"
    return "-" if value is None or value == "" else str(value)
