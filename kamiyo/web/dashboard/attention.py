"""What needs a person now, in sentences; and whether a failed event may be run again.

Pure: from numbers to words, so that every case can be read, and tested, here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import quote

from kamiyo.alerts import Incident
from kamiyo.web.dashboard import wording
from kamiyo.web.dashboard.changes import Effect
from kamiyo.web.dashboard.queries import MOST_COUNTED, Group
from kamiyo.web.dashboard.wording import Fields

# The same bounds as /health.
_OVERDUE_SECONDS = 60.0
_DEGRADED_SECONDS = 300.0
_DEGRADED_SHARE, _UNHEALTHY_SHARE = 0.10, 0.20

# What alerts tell of that is said here in more words.
_TOLD_HERE = ("event_died", "overdue")


@dataclass(frozen=True, slots=True)
class Concern:
    """Something a person should know. `tone` is `bad` (act), `warn` (look) or `calm` (it takes care of itself).

    `page` is where more is said of it, below the dashboard's own address, and `link` what that is called.
    """

    tone: str
    title: str
    text: str
    link: str = ""
    page: str = ""
    groups: Sequence[Group] = ()


def concerns(
    *,
    standing: Fields,
    day: Fields,
    dead: int,
    groups: Sequence[Group],
    undecided: int,
    incidents: Sequence[Incident],
    secret_set: bool,
) -> list[Concern]:
    """Everything that needs a person, the worst first; what takes care of itself last.

    `incidents` are what alerts would tell, so that the page and the message at night never disagree.
    """
    found = [
        *_shut_door(secret_set),
        *_stuck(standing),
        *_unread(standing, incidents),
        *_dead(dead, groups),
        *_failing(day, dead),
        *_incidents(incidents),
        *_contradictions(undecided),
        *_retrying(standing),
    ]
    return sorted(found, key=lambda concern: ("bad", "warn", "calm").index(concern.tone))


def _incidents(incidents: Sequence[Incident]) -> Iterator[Concern]:
    rates = [one for one in incidents if one.key.startswith("failure_rate:")]
    if len(rates) > 1:
        # An outage fails many types at once; they are one concern, not a screen full of them.
        names = ", ".join(one.key.partition(":")[2] for one in rates)
        text = f"Many of those that came in within the last quarter of an hour failed: {names}."
        yield Concern("warn", f"{len(rates)} types of events fail often", text, "What fails", "/failures")
    for one in incidents:
        if one.key.partition(":")[0] in _TOLD_HERE or (one in rates and len(rates) > 1):
            continue
        tone = "bad" if one.key == "bad_signatures" else "warn"
        page = "" if one.page == "/" else one.page
        yield Concern(tone, one.title, one.body, "Look" if page else "", page)


def _shut_door(secret_set: bool) -> list[Concern]:
    if secret_set:
        return []
    text = (
        "STRIPE_WEBHOOK_SECRET is not set, so nothing can be verified and every delivery is answered 503. Stripe keeps "
        "them and delivers again: copy the endpoint's signing secret (whsec_…) into the settings and restart."
    )
    return [Concern("bad", "No event can come in", text)]


def _stuck(standing: Fields) -> list[Concern]:
    late = standing["oldest_due_seconds"]
    if late < _OVERDUE_SECONDS:
        return []
    many = wording.count(standing["waiting"] + standing["retrying"], MOST_COUNTED)
    page = f"/events/{quote(standing['oldest_event_id'], safe='')}"
    if standing["lanes_held"] == 0:
        text = (
            f"The oldest of {many} was due {wording.span(late)} ago, and no worker has any in hand. Start one: "
            "kamiyo worker, or a server without KAMIYO_WORKER=false."
        )
        return [Concern("bad", "Nothing is being processed", text, "The oldest one", page)]
    text = (
        f"The oldest of {many} was due {wording.span(late)} ago. Workers are busy with "
        f"{wording.plural(standing['lanes_held'], 'customer')}: a slow handler, or more than they can carry."
    )
    tone = "bad" if late > _DEGRADED_SECONDS else "warn"
    return [Concern(tone, "Processing is behind", text, "The oldest one", page)]


def _unread(standing: Fields, incidents: Sequence[Incident]) -> list[Concern]:
    opened: datetime | None = standing["circuit_opened_at"]
    late = standing["oldest_unread_seconds"] >= _OVERDUE_SECONDS
    if any(one.key == "reads_overdue" for one in incidents) or not (late or opened):
        return []
    many = wording.count(standing["unread"], MOST_COUNTED)
    waiting = f"{many} {'event waits' if standing['unread'] == 1 else 'events wait'} to be read from it"
    if not standing["unread"]:
        waiting = "No event waits to be read from it"
    if opened:
        text = f"{waiting}; none fails. It is asked again now and then, and all go on by themselves."
        title = f"Stripe's API has not answered for {wording.span((standing['now'] - opened).total_seconds())}"
    else:
        title = "Reading from Stripe is behind"
        text = f"{waiting}, {wording.span(standing['oldest_unread_seconds'])} late."
    return [Concern("calm", title, text, "Which", "/events?status=unread")]


def _dead(dead: int, groups: Sequence[Group]) -> list[Concern]:
    if not dead:
        return []
    many = f"{wording.count(dead, MOST_COUNTED)} {'event is' if dead == 1 else 'events are'} dead"
    they, them = ("It", "it") if dead == 1 else ("They", "them")
    text = (
        f"{they} failed for the last time: nothing happens by itself any more. Find the cause, then run {them} again."
    )
    return [Concern("bad", many, text, "All failures", "/failures", groups)]


def _failing(day: Fields, dead: int) -> list[Concern]:
    share = day["failed"] / day["received"] if day["received"] else 0.0
    if share <= _DEGRADED_SHARE:
        return []
    word, bound = ("unhealthy", _UNHEALTHY_SHARE) if share > _UNHEALTHY_SHARE else ("degraded", _DEGRADED_SHARE)
    title = f"{wording.percent(share)} of the last 24 hours failed"
    text = (
        f"{wording.count(day['failed'])} of {wording.plural(day['received'], 'event')} that came in. /health says "
        f"{word} above {wording.percent(bound)}."
    )
    # The dead are spoken of already; this says how bad it is.
    return [Concern("warn" if dead else "bad", title, text, "What fails", "/failures")]


def _contradictions(undecided: int) -> list[Concern]:
    if not undecided:
        return []
    title = f"{wording.plural(undecided, 'billing row')} {'is' if undecided == 1 else 'are'} undecided"
    text = (
        "Two events of one second contradict each other and nothing in them says which is later. With "
        "STRIPE_SECRET_KEY they are read from Stripe by themselves; without, the object's next event decides."
    )
    return [Concern("warn", title, text, "Which", "/undecided")]


def _retrying(standing: Fields) -> list[Concern]:
    many = standing["retrying"]
    if not many:
        return []
    words = "failed event is tried again by itself" if many == 1 else "failed events are tried again by themselves"
    upcoming: datetime | None = standing["next_retry_at"]
    text = f"Next {wording.relative(upcoming, standing['now'])}. " if upcoming and upcoming > standing["now"] else ""
    text += "After five tries an event is dead."
    title = f"{wording.count(many, MOST_COUNTED)} {words}"
    return [Concern("calm", title, text, "Which", "/events?status=retrying")]


# ── May I run it again? ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Advice:
    """An answer to "may I retry it?": `yes`, `careful` or `no`, in a sentence, and what to know beforehand."""

    answer: str
    title: str
    notes: Sequence[str]


_UNDONE = (
    "What a failed try wrote to this database was undone. What it had sent elsewhere (mail, calls to other systems) "
    "was not: a handler may do that a second time."
)

#: What Kamiyo's own errors mean for another try: the answer, and why. Other errors are the handler's own.
_OWN: Mapping[str, tuple[str, str, str]] = {
    "PayloadGone": (
        *("no", "No use: its body is gone"),
        "Retention removed the body, so there is nothing to run. Read the object from Stripe.",
    ),
    "Bury": (
        *("careful", "Only if the reason is gone"),
        "The handler itself gave this event up, for the reason it states.",
    ),
    "WorkerDied": (
        *("careful", "Careful: it may have killed its worker"),
        "The process died while it handled this event: out of memory, killed, or crashed. It runs alone now, so no "
        "other event suffers, but a worker may die again.",
    ),
    "HandlerTimeout": (
        *("careful", "Yes, if what it waits for is fast again"),
        "The handler took too long. If it needs the time, raise KAMIYO_HANDLER_TIMEOUT first.",
    ),
    "kamiyo.projections.ProjectionError": (
        *("careful", "Only after an update"),
        "Stripe's object does not have the documented shape, so the billing row could not be made. The same version of "
        "Kamiyo fails in the same way.",
    ),
}


def advice(error_type: str, effect: Effect | None = None) -> Advice:
    """Whether a failed event may be run again, and what to know first."""
    answer, title, why = _OWN.get(
        error_type, ("yes", "Yes, once the cause is mended", "It gets five new tries, the first one at once.")
    )
    notes = [why]
    if answer != "no":
        notes.append(_UNDONE)
    if effect is not None and effect.moved_on:
        notes.append(
            "The object has moved on since: a later event made the billing row what it is, and a retry leaves it so. "
            "The handler sees event.superseded."
        )
    elif effect is not None and effect.made and error_type != "kamiyo.projections.ProjectionError":
        notes.append("The billing row is right already; only the handler has to catch up.")
    return Advice(answer, title, notes)
