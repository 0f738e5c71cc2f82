"""What the database knows of the work: workers, events, failures, the comparison with Stripe's list."""

from collections.abc import Sequence

from kamiyo import inbox
from kamiyo.database import Connection, load_queries
from kamiyo.doctor.finding import Finding, failed, passed, warning
from kamiyo.doctor.finding import count as counted
from kamiyo.settings import Settings

_SQL = load_queries("doctor.sql")


async def workers(db: Connection) -> Finding:
    count = int(await db.fetchval(_SQL["workers"]))
    if not count:
        return failed(
            "workers",
            "no worker is connected to the database",
            "Start `kamiyo worker`, or a server with KAMIYO_WORKER=true.",
        )
    connected = f"{counted(count, 'process')} with a worker connected"
    left = await inbox.days_left(db)
    if left is not None:
        return failed(
            "workers",
            f"{connected}, but none makes the coming days' tables: there is room for {counted(left, 'day')} more",
            "Look for worker_failed and maintenance_failed in their logs: docs/operations.md, “Log lines”.",
        )
    return passed("workers", connected)


async def processed(db: Connection, settings: Settings) -> Finding:
    row, unfinished = await inbox.queue(db), await db.fetchrow(_SQL["unfinished"])
    count = int(await db.fetchval(_SQL["processed"]))
    if unfinished is not None and unfinished["counted"] != unfinished["noted"]:
        return failed(
            "events",
            f"{unfinished['counted']} are not finished, and workers know of {unfinished['noted']}: the ledger was "
            "changed while its triggers were off",
            "Run in psql: SELECT webhook_recount()",
        )
    if row["oldest_due_seconds"] > 300:
        return failed(
            "events",
            f"the oldest due event has waited for {row['oldest_due_seconds'] / 60:.0f} minutes",
            "Start more workers, or look for a slow handler: docs/operations.md, “Events wait”.",
        )
    if not count:
        return warning(
            "events",
            "none was processed yet",
            "Send one: stripe trigger customer.created, or ./scripts/test_webhooks.sh",
        )
    return passed("events", f"{'1000 or more' if count == 1000 else count} are processed, {row['backlog']} are waiting")


async def unread(db: Connection, settings: Settings) -> Finding:
    """What waits to be read from Stripe, and how asking goes."""
    if not settings.api_keys:
        return passed("reads", "without a key nothing is read from Stripe: thin events end as ignored")
    row, asking = await inbox.queue(db), await db.fetchrow(_SQL["asking"])
    waiting = f"{counted(row['waiting_reads'], 'event')} waiting to be read from Stripe"
    if asking is not None and asking["refused_what"] is not None:
        return failed(
            "reads",
            f"Stripe refuses a key for {asking['refused_what']}; {waiting}",
            "Let the key read that (Stripe dashboard, API keys), or set one that exists and restart.",
        )
    if asking is not None and asking["open_seconds"] is not None:
        return warning(
            "reads",
            f"Stripe's API has not answered for {asking['open_seconds']:.0f} seconds (the circuit is open); {waiting}",
            "Look at status.stripe.com and at the network between here and Stripe; nothing fails meanwhile.",
        )
    if row["oldest_unread_seconds"] > 300:
        return warning(
            "reads",
            f"{waiting}, the oldest for {row['oldest_unread_seconds'] / 60:.0f} minutes",
            "Let a worker run with STRIPE_SECRET_KEY; raise KAMIYO_STRIPE_API_RATE where Stripe allows it.",
        )
    return passed("reads", f"{waiting}; Stripe answers")


async def failures(db: Connection, settings: Settings) -> Finding:
    row, dead = await inbox.health(db), (await inbox.queue(db))["dead"]
    events, bad = row["events_last_24h"], row["failed_events_last_24h"]
    causes = ", ".join(
        f"{cause['error_type']} ({cause['fingerprint']}, {counted(cause['events'], 'event')})"
        for cause in await db.fetch(_SQL["failures"])
    )
    seen = f"{bad} of the last day's {counted(events, 'event')} failed, {dead} dead in all"
    seen += f"; causes: {causes}" if causes else ""
    mend = "Mend the cause, then: kamiyo replay --status failed (see kamiyo events list --status failed)"
    if bad > 0.2 * events:
        return failed("failures", seen, mend)
    if dead or bad > 0.1 * events:
        return warning("failures", seen, mend)
    return passed("failures", seen)


async def compared(db: Connection, settings: Settings) -> Finding:
    check = "comparison"
    if not settings.api_keys or not settings.reconcile:
        why = "KAMIYO_RECONCILE is off" if settings.api_keys else "there is no key"
        return warning(
            check,
            f"events are not compared with Stripe's own list: {why}",
            "Set STRIPE_SECRET_KEY and KAMIYO_RECONCILE=true.",
        )
    rows = {(row["account"], row["livemode"]): row for row in await db.fetch(_SQL["compared"])}
    keyed = [(key.account, key.livemode) for key in settings.api_keys]
    for account, livemode in keyed:
        row = rows.get((account, livemode))
        ago: float | None = row["seconds_ago"] if row is not None else None
        if ago is None or ago > 3600:
            when = "never" if ago is None else f"{ago / 3600:.0f} hours ago"
            return warning(
                check,
                f"the last comparison with Stripe's list of events{_of(account, livemode, keyed)}: {when}",
                "Let a worker run with STRIPE_SECRET_KEY, or run: kamiyo reconcile",
            )
    missed = sum(row["missed"] for row in rows.values())
    if missed:
        whose = ", ".join(row["account"] or "the own account" for row in rows.values() if row["missed"])
        return warning(
            check,
            f"the last one found {counted(missed, 'event')} that never came, of {whose}; they are in now",
            "Look at the endpoint's failed deliveries in the Stripe dashboard.",
        )
    refused = [row["account"] for row in rows.values() if row["refused"]]
    if refused:
        return warning(
            check,
            f"Stripe does not let the platform's key read {', '.join(refused[:5])}{' and others' * (len(refused) > 5)}",
            "If these are no connected accounts that have left, set a key of their own in STRIPE_SECRET_KEYS.",
        )
    latest = max(rows[one]["seconds_ago"] for one in keyed)
    many = f" of {len(rows)} accounts and modes" if len(rows) > 1 else ""
    return passed(check, f"the last one{many}, {latest / 60:.0f} minutes ago, found nothing missing")


def _of(account: str, livemode: bool, among: Sequence[tuple[str, bool]]) -> str:
    if len(among) == 1:
        return ""
    return f" of {account or 'the own account'}, {'live' if livemode else 'test'} mode"
