"""What a person should hear, once.

Each look turns what the database knows into *incidents*; an incident is told when it opens and when it is over, once
each, however many processes run (one of them looks at a time). Telling is never on the way of a delivery or of an
event, and cannot fail either. Channels are Apprise URLs (Discord, Slack, e-mail, PagerDuty and a hundred others).

    event_died      an event has used up its tries, or was buried; one incident for each cause
    failure_rate    over 20 % of a type's events of the last quarter of an hour failed, and at least five
    overdue         the oldest due event has waited for over five minutes: is a worker running?
    maintenance     no worker has made the coming days' tables since yesterday
    bad_signatures  at least ten deliveries within five minutes were not signed with our secret
    reads_overdue   an event has waited for over five minutes until what it is about is read from Stripe
    stripe_refuses  Stripe refuses STRIPE_SECRET_KEY, or lets it not read something that is needed
    missed          Stripe's list had events that were never delivered; they are in now
    silence         nothing came for much longer than it ever took in the last week
    database_away   PostgreSQL has not answered for a minute (told by each process that sees it)
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import import_module
from typing import Any

from kamiyo import inbox
from kamiyo.database import DATABASE_ERRORS, Connection, Pool, load_queries
from kamiyo.settings import Settings
from kamiyo.telemetry import happened, place_of

_SQL = load_queries("alerts.sql")

# Where every application has it, the user's own too; a worker that tells does not know in which it is.
_DASHBOARD = "/api/v1/webhooks/dashboard"

_LOOK_EVERY_SECONDS = 15.0
_OVERDUE_SECONDS = 300.0
_AWAY_SECONDS = 60.0
_BURST_SECONDS = 300.0
_BURST = 10

#: The families that a look decides as a whole: what it does not see any more is over.
_FAMILIES = [
    *("event_died", "failure_rate", "overdue", "maintenance"),
    *("reads_overdue", "stripe_refuses", "missed", "silence"),
]


@dataclass(frozen=True, slots=True)
class Incident:
    """Something a person should know: a key that stays the same while it lasts, and the words for it."""

    key: str
    title: str
    body: str
    page: str


@dataclass
class Signatures:
    """Deliveries that were refused for their signature, as one process has seen them lately."""

    _refused: deque[tuple[float, str, bool | None, bool]] = field(default_factory=lambda: deque(maxlen=200))
    _good: deque[tuple[float, bytes]] = field(default_factory=lambda: deque(maxlen=20))

    def refused(self, reason: str, body: bytes) -> None:
        """Note a refusal: why, and what the unproved body looks like (its mode, its layout), never its content."""
        # Stripe sends events indented; a body on one line was written anew by something on the way.
        rewritten = body.startswith(b"{") and b"\n" not in body[:200]
        self._refused.append((time.monotonic(), reason, _mode(body), rewritten))

    def accepted(self, body: bytes) -> None:
        """Note a delivery that was signed as it should be. Cheap: nothing is looked at until someone asks."""
        self._good.append((time.monotonic(), body))

    def incident(self) -> Incident | None:
        """A burst of refusals, with what is likely behind it."""
        since = time.monotonic() - _BURST_SECONDS
        recent = [refusal for refusal in self._refused if refusal[0] >= since and refusal[1] != "missing"]
        if len(recent) < _BURST:
            return None
        good = [_mode(body) for at, body in self._good if at >= since]
        return Incident(
            "bad_signatures",
            "Deliveries are refused: their signature does not fit",
            f"{len(recent)} deliveries in the last {_BURST_SECONDS / 60:.0f} minutes were refused with 400. "
            f"{self._likely(recent, good)} Stripe keeps delivering them for up to three days, so nothing is lost yet.",
            "/",
        )

    @staticmethod
    def _likely(recent: Sequence[tuple[float, str, bool | None, bool]], good: Sequence[bool | None]) -> str:
        reasons = [reason for _, reason, _, _ in recent]
        modes = {live for _, _, live, _ in recent if live is not None}
        if reasons.count("too_old") + reasons.count("too_new") > len(reasons) / 2:
            return "Most are signed with our secret at another time: compare this machine's clock, or someone replays."
        if all(rewritten for _, _, _, rewritten in recent):
            return (
                "Most likely the body is altered on the way: it is not laid out as Stripe sends it. A proxy or "
                "middleware that parses and writes JSON anew breaks the signature; hand the bytes on as they came."
            )
        if good and len(modes) == 1 and set(good).isdisjoint(modes):
            mode = "live" if True in modes else "test"
            return (
                f"Most likely they are of the other mode: all of them are {mode} events, and what is accepted is not. "
                f"Add the {mode} endpoint's secret to STRIPE_WEBHOOK_SECRET, after a comma."
            )
        if not good and modes == {False}:
            return (
                "Most likely STRIPE_WEBHOOK_SECRET is another endpoint's: nothing was accepted lately, and these are "
                "test events. `stripe listen` prints a secret of its own, different from the dashboard's."
            )
        if not good:
            return (
                "Most likely STRIPE_WEBHOOK_SECRET is not this endpoint's: nothing was accepted lately. Copy it anew."
            )
        return "Others are accepted, so the secret is right for one sender: is a second endpoint pointing here?"


@dataclass
class Alerts:
    """One process' share in looking and telling; `run` is its loop."""

    pool: Pool
    settings: Settings
    signatures: Signatures = field(default_factory=Signatures)

    def __post_init__(self) -> None:
        # Apprise and its hundred plugins take 36 MB: only where there is someone to tell.
        self._apprise: Any = import_module("apprise") if self.settings.alert_channels else None
        channels: Any = self._apprise.Apprise() if self._apprise else None
        self._channels = channels
        for url in self.settings.alert_channels:
            if not channels.add(url):
                # Never the URL itself: it holds the key to the channel.
                happened("alert_channel_unusable", channel=url.split(":", 1)[0])
        self._away_since: float | None = None
        self._told_away = False

    @property
    def configured(self) -> bool:
        """Whether there is anyone to tell."""
        return bool(self._channels)

    async def run(self) -> None:
        """Look and tell until cancelled."""
        while self.configured:
            try:
                async with self.pool.acquire(timeout=10) as db:
                    await self.look(db)
                await self._database_is(away=False)
            except DATABASE_ERRORS:
                await self._database_is(away=True)
            except Exception as error:
                # Nobody thought of it. Who is told nothing any more believes that all is well, so the next look comes.
                happened("alerts_failed", error=type(error).__name__, place=place_of(error))
            await asyncio.sleep(_LOOK_EVERY_SECONDS)

    async def look(self, db: Connection) -> None:
        """One turn: open what is so, close what is over, tell what is to be told."""
        async with db.transaction():
            burst = self.signatures.incident()
            if burst is not None:
                await _open(db, burst)
            if not await db.fetchval(_SQL["alone"]):
                return
            incidents = await find(db)
            for incident in incidents:
                await _open(db, incident)
            await db.execute(_SQL["close"], [incident.key for incident in incidents], _FAMILIES)
            await db.execute(_SQL["close_bursts"], _BURST_SECONDS)
            await db.execute(_SQL["forget_untold"])
        # Each in a transaction of its own: one channel that hangs must not undo what another was told.
        while await self._tell_next(db):
            pass

    async def _tell_next(self, db: Connection) -> bool:
        async with db.transaction():
            row = await db.fetchrow(_SQL["to_tell"])
            if row is None:
                return False
            over = row["closed_at"] is not None
            told = await self._tell(
                f"Over: {row['title']}" if over else row["title"],
                f"It began {_moment(row['opened_at'])} and ended {_moment(row['closed_at'])}."
                if over
                else f"{row['body']}\nSince {_moment(row['opened_at'])}.",
                row["page"],
                over=over,
            )
            if told:
                await db.execute(_SQL["told_over" if over else "told"], row["key"])
                happened("alert_told", key=row["key"], over=over)
            else:
                await db.execute(_SQL["missed"], row["key"])
                happened("alert_failed", key=row["key"], tries=row["misses"] + 1)
            return True

    async def _tell(self, title: str, body: str, page: str, *, over: bool) -> bool:
        link = f"{self.settings.public_url.rstrip('/')}{_DASHBOARD}{page}" if self.settings.public_url else ""
        kinds = self._apprise.NotifyType
        kind = kinds.SUCCESS if over else kinds.WARNING
        text = f"{body}\n{link}" if link else body
        return bool(await self._channels.async_notify(title=f"Kamiyo: {title}", body=text, notify_type=kind))

    async def _database_is(self, *, away: bool) -> None:
        now = time.monotonic()
        if away:
            self._away_since = self._away_since or now
            if not self._told_away and now - self._away_since >= _AWAY_SECONDS:
                self._told_away = await self._tell(
                    "the database is away",
                    "PostgreSQL has not answered for a minute. Deliveries are answered 503, and Stripe keeps them for "
                    "up to three days; nothing is processed meanwhile. Check DATABASE_URL, the server, and its disk.",
                    "/",
                    over=False,
                )
        else:
            if self._told_away:
                await self._tell("the database is back", "Deliveries are stored and processed again.", "/", over=True)
            self._away_since, self._told_away = None, False


async def find(db: Connection) -> list[Incident]:
    """What the database says is wrong now."""
    found = [_died(row) for row in await db.fetch(_SQL["dead"])]
    found += [_failing(row) for row in await db.fetch(_SQL["failure_rates"])]
    overdue = await db.fetchrow(_SQL["overdue"])
    if overdue is not None and overdue["seconds"] > _OVERDUE_SECONDS:
        found.append(
            Incident(
                "overdue",
                "Events wait too long",
                f"{overdue['event_id']} has been due for {overdue['seconds'] / 60:.0f} minutes"
                f"{_and_more(overdue['due'] - 1)}. Is a worker running (kamiyo worker, or KAMIYO_WORKER on in a "
                "server)? Or do handlers take longer than events come?",
                "/events?status=pending",
            )
        )
    left = await inbox.days_left(db)
    if left is not None:
        found.append(
            Incident(
                "maintenance",
                "Maintenance does not get done",
                f"No worker has made the coming days' tables since yesterday: events can be stored for {left} "
                f"day{'s' * (left != 1)} more, then deliveries are answered 503. Is a worker running? worker_failed or "
                "maintenance_failed in its log says why.",
                "/",
            )
        )
    found += await _unread(db)
    missed = await db.fetchrow(_SQL["never_came"])
    if missed is not None:
        found.append(_never_came(missed))
    silence = await db.fetchrow(_SQL["silence"])
    if silence is not None and silence["quiet_hours"] > 2 * (silence["longest_gap_hours"] or 1) + 1:
        found.append(
            Incident(
                "silence",
                "No events come any more",
                f"Nothing has arrived for {silence['quiet_hours']:.0f} hours; in the week before the longest gap was "
                f"{silence['longest_gap_hours'] or 1:.0f}. Is the endpoint still enabled in Stripe, and reachable?",
                "/",
            )
        )
    return found


async def _unread(db: Connection) -> list[Incident]:
    found = []
    late = await db.fetchrow(_SQL["reads_overdue"])
    if late is not None and late["seconds"] > _OVERDUE_SECONDS:
        why = "Is a worker running that has STRIPE_SECRET_KEY?"
        if late["refused_what"] is not None:
            why = f"Stripe refuses a key for {late['refused_what']}."
        elif late["opened_at"] is not None:
            why = f"Stripe's API has not answered since {_moment(late['opened_at'])}."
        found.append(
            Incident(
                "reads_overdue",
                "Events wait to be read from Stripe",
                f"{late['count']} thin events wait until what they are about was read; {late['event_id']} the longest, "
                f"for {late['seconds'] / 60:.0f} minutes. {why} None fails meanwhile, and all go on by themselves.",
                "/events?status=unread",
            )
        )
    refused = await db.fetchrow(_SQL["stripe_refuses"])
    if refused is not None:
        found.append(
            Incident(
                "stripe_refuses",
                "Stripe refuses a key",
                f"Stripe refuses a key (STRIPE_SECRET_KEY, STRIPE_SECRET_KEYS) for {refused['refused_what']} since "
                f"{_moment(refused['refused_at'])}. 401: set a key that exists. 403: let this one read that (Stripe "
                "dashboard, API keys); an account that is named may have left. What waits for it goes on by itself.",
                "/",
            )
        )
    return found


def _and_more(many: int) -> str:
    return f", and {many} more {'is' if many == 1 else 'are'} due" if many else ""


def _mode(body: bytes) -> bool | None:
    live = b'"livemode": true' in body or b'"livemode":true' in body
    test = b'"livemode": false' in body or b'"livemode":false' in body
    return live if live != test else None


def _died(row: Any) -> Incident:
    many = "An event is dead" if row["count"] == 1 else f"{row['count']} events are dead"
    return Incident(
        f"event_died:{row['fingerprint']}",
        f"{many}: {row['error_type']}",
        f"{many} after the last try ({', '.join(row['types'])}), for example {row['example']}. "
        "Nothing happens to them by themselves any more: mend the cause, then retry them.",
        f"/failures/{row['fingerprint']}",
    )


def _never_came(row: Any) -> Incident:
    many = "an event that was" if row["missed"] == 1 else f"{row['missed']} events that were"
    whose = ""
    if row["connected"]:
        others = row["accounts"] - len(row["connected"])
        whose = f" of {', '.join(row['connected'])}{f' and {others} more' if others else ''}"
    return Incident(
        "missed",
        "Stripe had events that never arrived",
        f"The comparison of {_moment(row['at'])} found {many} not delivered{whose}; they are stored now and are "
        "processed like any. Was the endpoint disabled or unreachable? Look at its deliveries in the Stripe dashboard.",
        "/events",
    )


def _failing(row: Any) -> Incident:
    share = 100 * row["failed"] / (row["processed"] + row["failed"])
    return Incident(
        f"failure_rate:{row['event_type']}",
        f"{row['event_type']} fails often",
        f"{row['failed']} of the last quarter of an hour's {row['processed'] + row['failed']} events of this type "
        f"failed ({share:.0f} %). They are tried again by themselves.",
        "/failures",
    )


async def _open(db: Connection, incident: Incident) -> None:
    await db.execute(_SQL["open"], incident.key, incident.title, incident.body, incident.page)


def _moment(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M UTC")
