"""One run, from the first process to the last line."""

import asyncio
import json
import logging
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import uvloop

from bench.chaos.broken import FAULTS
from bench.chaos.crew import Crew, Member, environment, supervised, working
from bench.chaos.ground import Folder, free_ports, listening, own_disk, postgres
from bench.chaos.judge import Asked, Verdict, bear_witness, judge
from bench.chaos.operators import Operators, Ran
from bench.chaos.proxy import carrying
from bench.chaos.schedule import APIS, WORKERS, schedule
from bench.chaos.storm import ADMIN_KEY, Storm, narrate
from bench.chaos.stripe import SECRET, Stripe
from bench.chaos.stripe_api import KEY, Control
from bench.chaos.traffic import Fate, Traffic, traffic
from bench.chaos.variables import BROKEN, FATES_FILE, MARKS_URL, TELL_TASKS
from kamiyo.postgres import EmbeddedPostgres
from kamiyo.reader import TOGETHER
from kamiyo.retry import MAX_ATTEMPTS, delay_after

_log = logging.getLogger("chaos")

#: Events a second: what two cores take beside all the rest of this.
RATE = 75.0

#: Requests a second that Stripe's API may be asked, by all processes together. Few, so that they run out.
API_RATE = 15

# Of the rows, when all is over: as many as that rate allows in a few seconds.
_AUDITED = "5%"

# Findings of one kind that are shown.
_SHOWN = 5

# How long nothing may be answered 2xx, once the storm is over, before the rest is given up, in seconds.
_ANSWERED_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Pace:
    """Kamiyo's times, in seconds, short enough for a run's length. Production's are longer; the code is the same."""

    handler_timeout: float
    idle_limit: float
    first_retry: float
    grace: float = 5.0

    @property
    def fence(self) -> float:
        """After how long PostgreSQL ends a session that says nothing."""
        return self.handler_timeout + self.idle_limit

    @property
    def longest_wait(self) -> float:
        """The longest time in which nothing happens though something is still to come: the wait for the last try, or
        until a dead worker's session is ended, by PostgreSQL or by another worker's next maintenance turn, and its
        events are found, or until a dead reader's objects are read by another while Stripe is avoided."""
        return 1.2 * (delay_after(MAX_ATTEMPTS - 1, first=self.first_retry) or 0) + self.fence + 30


def pace_of(seconds: float) -> Pace:
    """The times that fit a storm of `seconds`."""
    if seconds <= 30:
        return Pace(handler_timeout=1.0, idle_limit=1.5, first_retry=0.02)
    return Pace(handler_timeout=2.0, idle_limit=2.0, first_retry=0.1)


def main(
    *,
    seconds: float,
    seed: int,
    broken: str | None = None,
    must_be_caught: bool = False,
    only_schedule: bool = False,
    keep: bool = False,
) -> int:
    """Run it, print what it came to, and return the exit status: 0, 1 for a fault, 130 when it was interrupted.

    The processes' logs are kept where something was found, or with `keep`.

    With `must_be_caught` it is 0 if the broken build was caught by the count that is meant for its fault, else 1.
    """
    pace = pace_of(seconds)
    if only_schedule:
        for blow in schedule(seed, seconds, fence=pace.fence):
            print(blow)
        return 0
    narrate()
    try:
        verdict = uvloop.run(_run(seconds, seed, broken, pace, keep=keep))
    except (asyncio.CancelledError, KeyboardInterrupt):
        return 130
    _print(verdict, broken)
    if broken is not None and must_be_caught:
        return 0 if verdict.count(FAULTS[broken].caught_as) else 1
    return 1 if verdict.findings else 0


async def _run(seconds: float, seed: int, broken: str | None, pace: Pace, *, keep: bool) -> Verdict:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    # A broken build is to be caught for its fault, soon, and not while a poison is waited for.
    sent = traffic(seed, seconds, rate=RATE, gentle=broken is not None)
    with Folder() as folder, own_disk(folder.path) as disk:
        # What a broken build has done a rebuild could mend.
        blows = schedule(seed, seconds, fence=pace.fence, disk=disk is not None, operators=broken is None)
        print(
            f"seed {seed}, {seconds:g} s: {len(sent.letters)} events of {sent.customers} customers, {len(blows)} blows"
            + ("" if disk else "; no disk of its own can be had, so none is filled")
            + (f"; a broken build: {broken}" if broken else ""),
            flush=True,
        )
        async with postgres((disk or folder.path) / "postgres") as server, carrying(server.url) as proxy:
            *ports, api_port = free_ports(APIS + 1)
            control = Control(folder.path)
            told = {"port": api_port, "folder": folder.path, "seed": seed, "seconds": seconds, "rate": RATE}
            words = (sys.executable, "-m", "bench.chaos.stripe_api", *(f"--{name}={it}" for name, it in told.items()))
            words += ("--gentle",) if broken is not None else ()
            stripe_api = Member("stripe", words, environment(), folder.path)
            stripe = Stripe(sent.letters, ports, random.Random(f"stripe/{seed}"))
            env = _environment(proxy.url, server.url, api_port, sent, folder.path, pace, broken)
            operators = Operators(env, folder.path, ports, ADMIN_KEY)
            async with supervised(stripe_api), working(ports, WORKERS, env, folder.path) as crew:
                await listening([*ports, api_port])
                rng = random.Random(f"targets/{seed}")
                storm = Storm(
                    *(crew, proxy, stripe, stripe_api, control, sent, operators, server),
                    *(rng, pace.fence, pace.grace, disk),
                )
                control.begin(time.time())
                posting = asyncio.create_task(stripe.post(sent.postings))
                try:
                    await storm.rage(blows)
                    _log.info("the storm is over")
                    await _answered(posting, stripe)
                    # An event that is taken up and put back for ever is never at rest either. A broken build may be.
                    if not await _rest(server, pace, 0 if broken else 3 * pace.longest_wait + 30):
                        await _why_not(server, crew, folder.path)
                    elif broken is None:
                        # What an operator would ask now, of Stripe itself.
                        audited = await operators.run("audit", "--sample", _AUDITED, "--wait", "1", at_rest=True)
                        _log.info("%s: %s", audited.words, audited.ending)
                finally:
                    posting.cancel()
                    await asyncio.wait([posting])
                _tell(stripe, crew, operators)
                kills = storm.kills
            if not posting.cancelled():
                posting.result()
            # Two commands may be asking beside the workers.
            asked = Asked(control.calls(), rate=API_RATE, spare=(WORKERS + 2) * TOGETHER)
            verdict = await _verdict(server, sent, stripe, asked, operators.ran, kills)
        if keep or (verdict.findings and broken is None):
            folder.keep()
            print(f"logs: {folder.path}")
        return verdict


async def _answered(posting: "asyncio.Task[None]", stripe: Stripe) -> None:
    """Wait until everything is answered 2xx, or until nothing is any more."""
    while not posting.done():
        before = stripe.answered.total()
        await asyncio.wait([posting], timeout=_ANSWERED_SECONDS)
        if stripe.answered.total() == before:
            return


async def _rest(server: EmbeddedPostgres, pace: Pace, patience: float) -> bool:
    """Wait until every event is at rest, or until it is clear that some never will be; say which.

    That is when nothing has changed for the longest wait, or things still change `patience` seconds after it.
    """
    db = await asyncpg.connect(server.url)
    try:
        deadline = time.monotonic() + pace.longest_wait + patience
        seen, seen_at = -1, time.monotonic()
        while time.monotonic() < min(deadline, seen_at + pace.longest_wait):
            waiting = await db.fetchval(
                "SELECT (SELECT count(*) FROM webhook_unfinished WHERE next_try_at IS NOT NULL)"
                " + (SELECT count(*) FROM chaos.undecided)"
            )
            changes = await db.fetchval("SELECT coalesce(max(id), 0) FROM chaos.history")
            if not waiting:
                _log.info("everything is at rest")
                return True
            if changes != seen:
                seen, seen_at = changes, time.monotonic()
            await asyncio.sleep(0.1)
        _log.info("%d events, or rows, do not come to rest", waiting)
        return False
    finally:
        await db.close()


# Every session, what it does, and what it holds: lanes, and locks that others wait for.
_SESSIONS = """
SELECT a.pid, a.application_name, a.state, a.wait_event_type, a.wait_event, now() - a.state_change AS since,
       pg_blocking_pids(a.pid) AS waits_for, left(a.query, 160) AS query,
       (SELECT array_agg(l.objid::bigint::integer) FROM pg_locks AS l
        WHERE l.pid = a.pid AND l.locktype = 'advisory' AND l.classid = 1800432 AND l.objsubid = 2) AS lanes
FROM pg_stat_activity AS a WHERE a.backend_type = 'client backend' AND a.pid <> pg_backend_pid()
"""
_WAITING = """
SELECT event_id, event_type, customer, lane, status, attempts, suspect, claim, started_at,
       next_try_at - now() AS due_in, read_try_at - now() AS read_in
FROM webhook_events WHERE next_try_at IS NOT NULL ORDER BY lane, stripe_created, seq
"""


async def _why_not(server: EmbeddedPostgres, crew: Crew, folder: Path) -> None:
    """Write down who holds what, before the processes end: `stuck.txt`, and each process's tasks in its log."""
    for member in crew.members:
        member.signal(TELL_TASKS)
    db = await asyncpg.connect(server.url)
    try:
        with (folder / "stuck.txt").open("w", encoding="utf-8") as file:
            for question in (_WAITING, _SESSIONS):
                for row in await db.fetch(question):
                    print(*(f"{name}={value}" for name, value in row.items()), file=file)
                print(file=file)
    finally:
        await db.close()
    # The tasks are told by the processes themselves, as soon as they come to it.
    await asyncio.sleep(1)


async def _verdict(
    server: EmbeddedPostgres, sent: Traffic, stripe: Stripe, asked: Asked, ran: Sequence[Ran], kills: int
) -> Verdict:
    db = await asyncpg.connect(server.url)
    try:
        await bear_witness(db, sent, stripe, asked, ran)
        return await judge(db, events=len(stripe.answered), kills=kills, duplicates=stripe.duplicates)
    finally:
        await db.close()


def _environment(
    url: str, marks_url: str, api_port: int, sent: Traffic, folder: Path, pace: Pace, broken: str | None
) -> dict[str, str]:
    fates = folder / "fates.json"
    fates.write_text(
        json.dumps({letter.event_id: letter.fate for letter in sent.letters if letter.fate is not Fate.plain})
    )
    return environment(
        DATABASE_URL=url,
        STRIPE_WEBHOOK_SECRET=SECRET,
        ADMIN_API_KEY=ADMIN_KEY,
        KAMIYO_HANDLERS="bench.chaos.handlers",
        KAMIYO_HANDLER_TIMEOUT=str(pace.handler_timeout),
        KAMIYO_IDLE_LIMIT=str(pace.idle_limit),
        KAMIYO_FIRST_RETRY_DELAY=str(pace.first_retry),
        KAMIYO_SHUTDOWN_GRACE=str(pace.grace),
        KAMIYO_COMMIT_TIMEOUT="3",
        STRIPE_SECRET_KEY=KEY,
        STRIPE_API_BASE=f"http://127.0.0.1:{api_port}",
        KAMIYO_STRIPE_API_RATE=str(API_RATE),
        KAMIYO_STRIPE_API_TIMEOUT="2",
        KAMIYO_RECONCILE="false",
        # Few, so that they run out.
        KAMIYO_POOL_SIZE="6",
        KAMIYO_WORKER_CONCURRENCY="3",
        KAMIYO_WORKER_BATCH="60",
        KAMIYO_WATCHDOG="true",
        KAMIYO_LOG_FORMAT="json",
        **{MARKS_URL: marks_url, FATES_FILE: str(fates), BROKEN: broken or ""},
    )


def _tell(stripe: Stripe, crew: Crew, operators: Operators) -> None:
    print("answers: " + ", ".join(f"{count} × {status}" for status, count in sorted(stripe.statuses.items())))
    for member in crew.members:
        ends = ", ".join(f"{count} × {status}" for status, count in sorted(Counter(member.statuses).items()))
        print(f"{member.name}: ended with status {ends or 'none'}; slowest stop {member.slowest_stop:.1f} s")
    ends_of: dict[str, Counter[str]] = {}
    for ran in operators.ran:
        ends_of.setdefault(ran.name, Counter())[str(ran.status)] += 1
    for name, how in sorted(ends_of.items()):
        print(f"{name}: " + ", ".join(f"{count} × {status}" for status, count in sorted(how.items())))


def _print(verdict: Verdict, broken: str | None) -> None:
    shown: Counter[str] = Counter()
    for finding in verdict.findings:
        shown[finding.question] += 1
        if shown[finding.question] <= _SHOWN:
            print(f"{finding.question}: {finding.what}: {finding.why}")
    for question, count in shown.items():
        if count > _SHOWN:
            print(f"{question}: {count - _SHOWN} more")
    if broken is not None:
        fault = FAULTS[broken].caught_as
        caught = verdict.count(fault)
        print(f"{broken}: {f'caught, {fault}={caught}' if caught else f'NOT CAUGHT, {fault}=0'}")
    print(verdict.line_before)
    print(verdict.last_line, flush=True)
