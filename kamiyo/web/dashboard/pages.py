"""The pages: each a function from a visit to an answer, that looks and changes nothing."""

import base64
import binascii
import json
import struct
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.responses import RedirectResponse, Response

from kamiyo import alerts, inbox, tracing
from kamiyo.errors import PayloadError
from kamiyo.event import Event, decode
from kamiyo.inbox import Filters, Status
from kamiyo.web import charts
from kamiyo.web.charts import Series
from kamiyo.web.dashboard import attention, background, changes, payload, queries, wording
from kamiyo.web.dashboard.queries import RANGES, STATES, Position, Range, Search, Step
from kamiyo.web.dashboard.site import PageNotFound, Visit

# ── Overview ────────────────────────────────────────────────────────────────────────────────────────────────


async def overview(visit: Visit) -> Response:
    """What needs a person, then how it goes."""
    chosen = RANGES.get(visit.asked("range") or "", RANGES["1h"])
    async with visit.reading() as db:
        standing = await queries.standing(db)
        dead = await queries.dead(db)
        day = await queries.day(db)
        # The causes of the latest dead are enough to begin with; the page of failures has them all.
        groups = await queries.groups(db, dead_only=True, of=2000) if dead else []
        undecided = await queries.undecided(db, 100)
        incidents = await alerts.find(db)
        steps = await queries.steps(db, chosen, standing["now"])
        types = await queries.types(db, standing["now"] - chosen.length, 12)
        latest = await queries.events(db, Search(), size=8)
    # Refused signatures are seen by the process they are sent to, and written nowhere.
    refused = visit.site.system().alerts.signatures.incident()
    concerns = attention.concerns(
        standing=standing,
        day=day,
        dead=dead,
        groups=groups[:3],
        undecided=len(undecided),
        incidents=[*([refused] if refused else []), *incidents],
        secret_set=visit.site.settings.any_door_open,
    )
    return visit.page(
        "overview.html",
        dead=dead,
        chosen=chosen,
        ranges=RANGES.values(),
        concerns=concerns,
        standing=standing,
        pictures=_pictures(steps, chosen, standing),
        steps=steps,
        types=types,
        latest=latest.events,
        empty=standing["last_event_at"] is None,
    )


def _pictures(steps: list[Step], chosen: Range, standing: Any) -> list[dict[str, Any]]:
    """The four pictures: title, the number that sums it up, the drawing, its axis."""
    times = [_step_name(step.at, chosen) for step in steps]
    received = sum(step.received for step in steps)
    finished = sum(step.processed + step.failed for step in steps)
    failed = sum(step.failed for step in steps)
    processed = sum(step.processed for step in steps)
    spent = sum(step.processing_us for step in steps)
    median, most = standing["seconds_to_processed"] or (None, None)
    waiting = standing["waiting"] + standing["retrying"]

    highest = charts.ceiling(max((step.received for step in steps), default=0))
    rates = [step.failure_rate for step in steps]
    worst = charts.ceiling(max((rate for rate in rates if rate is not None), default=0) or 0.01)
    means = [step.mean_seconds for step in steps]
    slowest = charts.ceiling(max((mean * 1000 for mean in means if mean is not None), default=0)) / 1000
    queue = [None if step.waiting is None else step.waiting + (step.retrying or 0) for step in steps]
    longest = charts.ceiling(max((length for length in queue if length is not None), default=0))
    return [
        {
            "name": "throughput",
            "title": "Throughput",
            "figure": wording.count(received),
            "words": f"events in the {chosen.words}",
            "top": wording.count(int(highest)) if highest >= 1 else f"{highest:g}",
            "drawing": charts.columns(
                [
                    Series("good", [step.processed for step in steps]),
                    Series("wait", [step.unfinished for step in steps]),
                    Series("bad", [step.failed for step in steps]),
                ],
                highest,
                [
                    f"{time} · {wording.count(step.received)} received, {wording.count(step.failed)} failed"
                    for time, step in zip(times, steps, strict=True)
                ],
                f"Events received in each step of the {chosen.words}: {received} in all, {failed} of them failed.",
            ),
            "legend": (("good", "processed"), ("wait", "unfinished"), ("bad", "failed")),
        },
        {
            "name": "failures",
            "title": "Failure rate",
            "figure": wording.percent(failed / finished if finished else None),
            "words": f"{wording.count(failed)} of {wording.count(finished)} are failed now",
            "top": wording.percent(worst),
            "drawing": charts.line(
                Series("bad", rates),
                worst,
                [f"{time} · {wording.percent(rate)} failed" for time, rate in zip(times, rates, strict=True)],
                f"Share of events that are failed, by when they came in: {failed} of {finished}.",
            ),
            "legend": (),
        },
        {
            "name": "latency",
            "title": "Latency",
            "figure": wording.span(spent / processed / 1e6 if processed else None),
            "words": "mean work on an event"
            + (f"; done within {wording.span(median)}, 95 % within {wording.span(most)}" if median is not None else ""),
            "top": wording.span(slowest),
            "drawing": charts.line(
                Series("info", means),
                slowest,
                [f"{time} · {wording.span(mean)} mean" for time, mean in zip(times, means, strict=True)],
                f"Mean time of work on an event in each step of the {chosen.words}.",
            ),
            "legend": (),
        },
        {
            "name": "backlog",
            "title": "Backlog",
            "figure": wording.count(waiting, queries.MOST_COUNTED),
            "words": "waiting now"
            + (
                f", {wording.count(standing['retrying'], queries.MOST_COUNTED)} of them to be tried again"
                if standing["retrying"]
                else ""
            ),
            "top": wording.count(int(longest)),
            "drawing": charts.line(
                Series("wait", queue),
                longest,
                [_queue_words(time, step) for time, step in zip(times, steps, strict=True)],
                f"Events that waited, at the most in each step of the {chosen.words}.",
            ),
            "legend": (),
        },
    ]


def _queue_words(time: str, step: Step) -> str:
    if step.waiting is None:
        return f"{time} · no server was up to look"
    return f"{time} · {wording.count(step.waiting)} waiting, {wording.count(step.retrying)} to be tried again"


def _step_name(at: datetime, chosen: Range) -> str:
    return f"{at:%a %H:%M}" if chosen.length > timedelta(days=1) else f"{at:%H:%M}"


async def undecided(visit: Visit) -> Response:
    """Billing rows whose order nothing decides."""
    async with visit.reading() as db:
        rows, dead = await queries.undecided(db, 100), await queries.dead(db)
    return visit.page("undecided.html", dead=dead, rows=rows)


# ── Events ──────────────────────────────────────────────────────────────────────────────────────────────────


async def events(visit: Visit) -> Response:
    """The list of events, narrowed by the filters in the address."""
    search, wrong = _search(visit)
    before, after = _position(visit.asked("before")), _position(visit.asked("after"))
    async with visit.reading() as db:
        dead = await queries.dead(db)
        page = await queries.events(db, search, before=before, after=after)
        types = await queries.known_types(db)
    filters = {name: visit.asked(name) for name in _FILTERS}
    return visit.page(
        "events.html",
        dead=dead,
        page=page,
        filters=filters,
        narrowed=sum(1 for name, value in filters.items() if value and name != "status"),
        wrong=wrong,
        states=STATES,
        types=types,
        newer=_cursor(page.newer),
        older=_cursor(page.older),
        first=before is None and after is None,
        hour_ago=_minute(datetime.now(UTC) - timedelta(hours=1)),
        day_ago=_minute(datetime.now(UTC) - timedelta(days=1)),
        week_ago=_minute(datetime.now(UTC) - timedelta(days=7)),
    )


_FILTERS = ("status", "type", "customer", "object", "account", "context", "mode", "since", "until")
_MODES = {"live": True, "test": False}


def _kept_as(account: str | None) -> str | None:
    return "" if account == inbox.OWN else account


def _search(visit: Visit) -> tuple[Search, list[str]]:
    wrong = []
    status = visit.asked("status")
    if status is not None and status not in STATES:
        wrong.append(f"There is no status “{status[:40]}”.")
        status = None
    since, until = _moment(visit.asked("since")), _moment(visit.asked("until"))
    for name, moment in (("since", since), ("until", until)):
        text = visit.asked(name)
        if text is not None and moment is None:
            wrong.append(f"“{text[:40]}” is no moment. Write 2026-11-23T21:05, in UTC.")
    mode = visit.asked("mode")
    if mode is not None and mode not in _MODES:
        wrong.append(f"There is no mode “{mode[:40]}”: it is live, or test.")
    type_, customer, object_ = (visit.asked(name) for name in ("type", "customer", "object"))
    whose = (_kept_as(visit.asked("account")), visit.asked("context"), _MODES.get(mode or ""))
    return Search(status, type_, customer, object_, *whose, since, until), wrong


def _moment(text: str | None) -> datetime | None:
    # What <input type=datetime-local> sends has no zone; the pages speak UTC.
    try:
        moment = datetime.fromisoformat(text or "")
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M}"


def _cursor(position: Position | None) -> str | None:
    if position is None:
        return None
    at, seq = position
    packed = struct.pack(">qq", int(at.timestamp()) * 1_000_000 + at.microsecond, seq)
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def _position(cursor: str | None) -> Position | None:
    try:
        microseconds, seq = struct.unpack(
            ">qq", base64.urlsafe_b64decode((cursor or "") + "=" * (-len(cursor or "") % 4))
        )
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds), seq
    except (binascii.Error, struct.error, ValueError, OverflowError):
        return None  # not from one of our links: begin at the newest


async def search(visit: Visit) -> Response:
    """Whatever has an id, found by it."""
    text = visit.asked("q") or ""
    async with visit.reading() as db:
        dead = await queries.dead(db)
        found = await queries.found(db, text)
    if len(found) == 1:
        return RedirectResponse(_address(visit, found[0]), 303)
    return visit.page(
        "search.html", dead=dead, text=text, found=found, addresses=[_address(visit, one) for one in found]
    )


def _address(visit: Visit, found: queries.Found) -> str:
    if found.kind in ("event", "customer"):
        return visit.url(f"{found.kind}s", found.id)
    return visit.url("events", **{found.kind: found.id})


# ── Event ───────────────────────────────────────────────────────────────────────────────────────────────────


async def event(visit: Visit) -> Response:
    """One event: where it stands and why, what it changed, every try, its neighbours, its payload."""
    event_id = visit.path("event_id")
    async with visit.reading() as db:
        dead = await queries.dead(db)
        row, failures = await inbox.one(db, event_id)
        around = await queries.around(db, row)
        told = _as_filed(row)
        effect = await queries.effect(db, told, row["created_at"]) if told is not None else None
        mirrored = await queries.mirrored(db, row)
    last = failures[-1] if failures and row["status"] == "failed" else None
    trace_id = tracing.trace_id_of(event_id) if visit.site.settings.traces else None
    return visit.page(
        "event.html",
        dead=dead,
        trace_id=trace_id,
        trace_url=visit.site.settings.trace_url.replace("{trace_id}", trace_id) if trace_id else "",
        event=row,
        state=inbox.state_of(row),
        failures=failures[::-1],
        last=last,
        place=queries.place_of(last["traceback"]) if last else None,
        advice=attention.advice(last["error_type"], effect) if last else None,
        places=[queries.place_of(failure["traceback"]) for failure in failures[::-1]],
        effect=effect,
        mirrored=mirrored,
        references=changes.REFERENCES,
        around=around,
        tree=_tree(visit, row["body"]),
        # Until it is settled, the page looks again; one that waits for its next try changes only then.
        live=row["status"] in ("pending", "processing") or (last is not None and last["next_try_at"] is not None),
        said=_SAID.get(visit.asked("said") or ""),
    )


def _as_filed(row: Any) -> Event | None:
    if row["body"] is None:
        return None
    return changes.event_of(row["body"], row["created_at"], row["account"], row["livemode"])


_SAID = {
    "retry": "Back in line, with five new tries.",
    "not-failed": "It was not failed any more, so nothing was done.",
}


def _tree(visit: Visit, body: bytes | None) -> Any:
    if body is None:
        return None
    try:
        return payload.tree(decode(body), lambda found: visit.url("search", q=found))
    except PayloadError:
        return None


async def body(visit: Visit) -> Response:
    """The payload, byte for byte as Stripe signed it."""
    async with visit.reading() as db:
        row, _ = await inbox.one(db, visit.path("event_id"))
    if row["body"] is None:
        raise PageNotFound("The body of this event was removed by retention.")
    # Text, whatever is in it: nothing that Stripe's customers wrote may become a page of ours.
    return Response(row["body"], media_type="text/plain; charset=utf-8")


# ── Failures ────────────────────────────────────────────────────────────────────────────────────────────────


async def failures(visit: Visit) -> Response:
    """Everything that is failed now, by its cause."""
    async with visit.reading() as db:
        counts = await queries.failed_counts(db)
        dead = await queries.dead(db)
        groups = await queries.groups(db)
        by_hand = await queries.by_hand(db, 10)
    return visit.page(
        "failures.html",
        dead=dead,
        groups=groups,
        counts=counts,
        most=queries.MOST_GROUPED,
        by_hand=[{**row, "filters": json.loads(row["filters"])} for row in by_hand],
    )


# Events of a group that are shown with it; the list of events has no filter for causes.
_EXAMPLES = 25


async def group(visit: Visit) -> Response:
    """One cause of failures, and the events that it holds up."""
    fingerprint = visit.path("fingerprint")
    async with visit.reading() as db:
        dead = await queries.dead(db)
        found = await queries.group(db, fingerprint)
        if found is None:
            raise PageNotFound("No failure with this fingerprint is remembered.")
        rows = await queries.group_events(db, fingerprint, _EXAMPLES + 1)
    return visit.page(
        "group.html",
        dead=dead,
        group=found,
        advice=attention.advice(found.error_type),
        rows=rows[:_EXAMPLES],
        more=len(rows) > _EXAMPLES,
    )


async def confirm_replay(visit: Visit) -> Response:
    """How many events would run again, before anything is done."""
    fingerprint = visit.path("fingerprint")
    # Counting what may be a hundred thousand failures takes longer than looking at a page of them.
    async with visit.reading(seconds=30) as db:
        dead = await queries.dead(db)
        found = await queries.group(db, fingerprint)
        if found is None:
            raise PageNotFound("No failure with this fingerprint is remembered.")
        matching = await inbox.count_matching(db, Filters(status=Status.failed), fingerprint)
    return visit.page(
        "confirm.html", dead=dead, group=found, matching=matching, advice=attention.advice(found.error_type)
    )


async def replay(visit: Visit) -> Response:
    """How far a replay is, and what became of its events."""
    number = visit.path("number")
    async with visit.reading() as db:
        dead = await queries.dead(db)
        row = (
            await queries.replay(db, int(number))
            if number.isascii() and number.isdigit() and len(number) < 16
            else None
        )
        if row is None:
            raise PageNotFound("There is no replay of this number.")
        found = await queries.group(db, row["fingerprint"])
        outcome = await queries.replay_outcome(db, row["fingerprint"], row["started_at"])
    lost = row["finished_at"] is None and row["silent_seconds"] > background.SILENT_SECONDS
    return visit.page(
        "replay.html",
        dead=dead,
        replay=row,
        group=found,
        outcome=outcome,
        lost=lost,
        # It goes on until the last of its events has been run.
        live=not lost and (row["finished_at"] is None or (outcome["waiting"] > 0 and _recent(row["finished_at"]))),
    )


def _recent(moment: datetime) -> bool:
    return datetime.now(UTC) - moment < timedelta(hours=1)


# ── Customer ────────────────────────────────────────────────────────────────────────────────────────────────


async def customer(visit: Visit) -> Response:
    """What Stripe last said of a customer, and their events."""
    customer_id = visit.path("customer_id")
    before = _position(visit.asked("before"))
    async with visit.reading() as db:
        dead = await queries.dead(db)
        account = _kept_as(visit.asked("account"))
        found = await queries.customer(db, customer_id, account, _MODES.get(visit.asked("mode") or ""))
        if found is None:
            raise PageNotFound("No event and no billing row names this customer.")
        rows, older = await queries.timeline(db, found, before=before)
    moments = [
        {
            "row": row,
            "day": wording.day(row["created_at"]),
            "changes": changes.summary(_as_filed(row), row["created_at"]) if row["body"] is not None else [],
        }
        for row in rows
    ]
    return visit.page(
        "customer.html", dead=dead, customer=found, moments=moments, older=_cursor(older), first=before is None
    )


# ── Signing in ──────────────────────────────────────────────────────────────────────────────────────────────


async def sign_in(visit: Visit) -> Response:
    """The form that asks for the admin key."""
    if visit.session is not None:
        return visit.to()
    return visit.page("sign_in.html", wanted=visit.asked("next") or "", wrong=False)
