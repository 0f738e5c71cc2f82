"""Does to a running system what the schedule says."""

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import asyncpg
import httpx

from bench.chaos.crew import Crew, Member
from bench.chaos.operators import Operators, Ran, lines_of
from bench.chaos.proxy import Flow, Proxy
from bench.chaos.schedule import Blow
from bench.chaos.stripe import Stripe
from bench.chaos.stripe_api import NOTHING, Control, Mood
from bench.chaos.traffic import HANDLED, Traffic
from kamiyo.database import DATABASE_ERRORS, Connection
from kamiyo.postgres import EmbeddedPostgres, EmbeddedPostgresError

_log = logging.getLogger("chaos")

ADMIN_KEY = "admin_key_of_the_storm"

# Stripe's tolerance is 300 s; these are on its far side, both ways.
_CLOCK_JUMPS = (-86_400, -301 - 10, 301 + 10, 86_400)

# How often a start of PostgreSQL is tried, with 0.2 s between.
_STARTS = 100

_LOCKS = (
    "LOCK TABLE webhook_events IN SHARE MODE",
    "LOCK TABLE billing.invoices IN SHARE ROW EXCLUSIVE MODE",
    "LOCK TABLE webhook_payloads IN ACCESS EXCLUSIVE MODE",
    "SELECT FROM billing.customers FOR UPDATE",
)
_HOLD = """
SELECT FROM webhook_events WHERE event_id IN (SELECT event_id FROM webhook_unfinished ORDER BY next_try_at LIMIT 20)
FOR UPDATE SKIP LOCKED
"""


@dataclass
class Storm:
    """A running system, and what is done to it: by the storm, and by its operators.

    `disk` is the folder of a disk of its own that PostgreSQL's data is on, None where there is none. `fence` and
    `grace` are in seconds: after how long PostgreSQL ends a silent session, and how long a SIGTERM may take.
    """

    crew: Crew
    proxy: Proxy
    stripe: Stripe
    stripe_api: Member
    control: Control
    sent: Traffic
    operators: Operators
    server: EmbeddedPostgres
    rng: random.Random
    fence: float
    grace: float
    disk: Path | None
    crashes: int = 0
    _server_door: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def kills(self) -> int:
        """Processes that ended by force: killed, crashed on purpose, taken down by a poison."""
        return self.crew.violent + self.crashes

    async def rage(self, blows: Sequence[Blow]) -> None:
        """Strike each blow at its time, counted from now; return when all of them are over."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for blow in blows:
                await asyncio.sleep(max(0.0, began + blow.at - time.monotonic()))
                _log.info("%s", blow)
                tasks.create_task(self._strike(blow))

    async def _strike(self, blow: Blow) -> None:
        # Each act has a method of its name.
        strike: Callable[[Blow], Awaitable[None]] = getattr(self, f"_{blow.act}")
        await strike(blow)

    # ── Processes ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _kill_api(self, blow: Blow) -> None:
        self.crew.apis[blow.target % len(self.crew.apis)].signal(signal.SIGKILL)

    async def _kill_worker(self, blow: Blow) -> None:
        self.crew.workers[blow.target % len(self.crew.workers)].signal(signal.SIGKILL)

    async def _restart_api(self, blow: Blow) -> None:
        await self.crew.apis[blow.target % len(self.crew.apis)].restart(self.grace)

    async def _restart_worker(self, blow: Blow) -> None:
        await self.crew.workers[blow.target % len(self.crew.workers)].restart(self.grace)

    async def _pause_worker(self, blow: Blow) -> None:
        await self.crew.workers[blow.target % len(self.crew.workers)].pause(blow.seconds)

    async def _pause_api(self, blow: Blow) -> None:
        await self.crew.apis[blow.target % len(self.crew.apis)].pause(blow.seconds)

    async def _log_full(self, blow: Blow) -> None:
        members = self.crew.members
        await members[blow.target % len(members)].log_to_full_disk(blow.seconds)

    # ── Stripe's API ────────────────────────────────────────────────────────────────────────────────────────────

    async def _stripe_busy(self, blow: Blow) -> None:
        await self._stripe_feels(Mood(429, blow.share, retry_after=1 + blow.target % 2), blow.seconds)

    async def _stripe_fails(self, blow: Blow) -> None:
        await self._stripe_feels(Mood(500, blow.share), blow.seconds)

    async def _stripe_hangs(self, blow: Blow) -> None:
        await self._stripe_feels(Mood(NOTHING, blow.share), blow.seconds)

    async def _stripe_feels(self, mood: Mood, seconds: float) -> None:
        with self.control.feeling(mood):
            await asyncio.sleep(seconds)

    async def _kill_stripe(self, blow: Blow) -> None:
        # None of Kamiyo's processes, so it does not count as a kill.
        self.stripe_api.kill_for(blow.seconds)

    # ── PostgreSQL ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _crash_postgres(self, blow: Blow) -> None:
        self.crashes += 1
        await self._serve_again(partial(self.server.restart, immediate=True))

    async def _restart_postgres(self, blow: Blow) -> None:
        await self._serve_again(self.server.restart)

    async def _kill_postgres(self, blow: Blow) -> None:
        def kill() -> None:
            pid = self.server.pid
            if pid is not None:
                self.crashes += 1
                os.kill(pid, signal.SIGKILL)

        await self._serve_again(kill)

    async def _serve_again(self, strike: Callable[[], None]) -> None:
        async with self._server_door:
            with contextlib.suppress(EmbeddedPostgresError):
                await asyncio.to_thread(strike)
            # On a full disk PostgreSQL does not start: whoever runs one makes room, and starts it again.
            for _ in range(_STARTS):
                with contextlib.suppress(EmbeddedPostgresError):
                    await asyncio.to_thread(self.server.ensure_running)
                    return
                await asyncio.sleep(0.2)
            raise RuntimeError("PostgreSQL does not start again")

    async def _disk_full(self, blow: Blow) -> None:
        if self.disk is None:
            return
        ballast = self.disk / "ballast"
        try:
            await asyncio.to_thread(_fill, ballast)
            await asyncio.sleep(blow.seconds)
        finally:
            ballast.unlink(missing_ok=True)
            # A PostgreSQL that cannot write its log of changes ends itself.
            await self._serve_again(lambda: None)

    async def _terminate(self, blow: Blow) -> None:
        async def terminate(db: Connection) -> None:
            pids = [
                pid
                for (pid,) in await db.fetch(
                    "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'kamiyo%' ORDER BY backend_start"
                )
            ]
            for pid in self.rng.sample(pids, round(blow.share * len(pids))):
                await db.execute("SELECT pg_terminate_backend($1)", pid)

        await self._ask(terminate)

    async def _exhaust(self, blow: Blow) -> None:
        async with asyncio.TaskGroup() as tasks:
            for port in self.stripe.ports:
                tasks.create_task(_ask_much(port, blow.seconds))
            tasks.create_task(self._take_every_slot(blow.seconds))

    async def _take_every_slot(self, seconds: float) -> None:
        taken: list[asyncpg.Connection[asyncpg.Record]] = []
        with contextlib.suppress(*DATABASE_ERRORS):
            while len(taken) < 500:
                taken.append(await asyncpg.connect(self.server.url, timeout=2))
        await asyncio.sleep(seconds)
        for connection in taken:
            connection.terminate()

    async def _lock(self, blow: Blow) -> None:
        await self._leave_open(_LOCKS[blow.target % len(_LOCKS)], blow.seconds)

    async def _hold(self, blow: Blow) -> None:
        await self._leave_open(_HOLD, blow.seconds)

    async def _leave_open(self, statement: str, seconds: float) -> None:
        async def leave_open(db: Connection) -> None:
            async with db.transaction():
                await db.execute("SET LOCAL lock_timeout = '2s'")
                await db.execute(statement)
                await asyncio.sleep(seconds)

        await self._ask(leave_open)

    async def _ask(self, work: Callable[[Connection], Awaitable[object]]) -> None:
        # Another blow may have taken PostgreSQL away: then this one misses.
        with contextlib.suppress(*DATABASE_ERRORS):
            db = await asyncpg.connect(self.server.url, timeout=3, server_settings={"application_name": "chaos"})
            try:
                await work(db)
            finally:
                db.terminate()

    # ── The wires ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _cut(self, blow: Blow) -> None:
        self.proxy.cut(blow.share, self.rng)

    async def _swallow(self, blow: Blow) -> None:
        await self.proxy.hold(blow.share, self.rng, Flow.asks, blow.seconds)

    async def _freeze(self, blow: Blow) -> None:
        await self.proxy.hold(blow.share, self.rng, Flow.nothing, blow.seconds)

    async def _blackhole(self, blow: Blow) -> None:
        self.proxy.blackhole(blow.share, self.rng)

    async def _unreachable(self, blow: Blow) -> None:
        async with self.proxy.unreachable():
            await asyncio.sleep(blow.seconds)

    async def _clock(self, blow: Blow) -> None:
        self.stripe.clock_offset = _CLOCK_JUMPS[blow.target % len(_CLOCK_JUMPS)]
        try:
            await asyncio.sleep(blow.seconds)
        finally:
            self.stripe.clock_offset = 0

    # ── What operators do ───────────────────────────────────────────────────────────────────────────────────────

    async def _rebuild(self, blow: Blow) -> None:
        await self._run(blow, "rebuild")

    async def _cleanup(self, blow: Blow) -> None:
        # Time passes for lives that are told to their end: what was received of them was received days ago.
        told = self.sent.told_to_the_end(self.stripe.answered)
        await self._ask(lambda db: db.execute("SELECT chaos.age($1)", told))
        if blow.target % 3:
            await self._run(blow, "cleanup", "--days", "1")
        else:
            await self.operators.call(blow.target, "POST", "/cleanup", days="1")

    async def _replay_failed(self, blow: Blow) -> None:
        # Of one type: some poison takes its process with it at each try, and all of it at once would leave time for
        # nothing else.
        which = ("failed", "retrying", "dead")[blow.target % 3]
        await self._run(blow, "replay", "--status", which, "--type", HANDLED[blow.target % len(HANDLED)], "--yes")

    async def _replay_processed(self, blow: Blow) -> None:
        lately = datetime.now(UTC) - timedelta(seconds=0.5 + blow.target % 5)
        customers = [life.events[0].customer or "" for life in self.sent.lives]
        some = (
            ("--since", lately.isoformat()),
            ("--type", HANDLED[blow.target % len(HANDLED)], "--since", "1m"),
            ("--customer", customers[blow.target * 7919 % len(customers)]),
        )
        await self._run(blow, "replay", "--status", "processed", *some[blow.target % len(some)], "--yes")

    async def _retry(self, blow: Blow) -> None:
        if blow.target % 2:
            page = await self.operators.call(blow.target, "GET", "/events", status="dead", limit="20")
            dead = [event["event_id"] for event in page["events"]] if page else []
        else:
            listed = await self.operators.run("events", "list", "--status", "dead", "--limit", "20", "--json")
            dead = [event["event_id"] for event in lines_of(listed)]
        if not dead:
            return
        chosen = dead[blow.target % len(dead)]
        if blow.target % 2:
            await self.operators.call(blow.target, "POST", f"/events/{chosen}/retry")
        else:
            await self._run(blow, "events", "retry", chosen)

    async def _backfill(self, blow: Blow) -> None:
        # Payment methods take a request for each customer, so whoever fills all of it is broken off.
        what = ("customers", "subscriptions", "invoices", "all")[blow.target % 4]
        whose = ("--account", self.sent.worlds[1].account) if blow.target % 3 else ()
        anew = ("--restart",) if blow.target % 5 == 0 else ()
        await self._run(blow, "backfill", what, *whose, *anew)

    async def _audit(self, blow: Blow) -> None:
        mend = ("--repair",) if blow.target % 2 else ()
        await self._run(blow, "audit", "--sample", "1%", "--wait", "1", *mend)

    async def _run(self, blow: Blow, *words: str) -> Ran:
        ran = await self.operators.run(*words, patience=blow.seconds, kills=bool(blow.target & 4))
        _log.info("%s: %s", ran.words, ran.ending)
        return ran


def _fill(ballast: Path) -> None:
    with ballast.open("wb") as file:
        # Twice, for what PostgreSQL gave back meanwhile.
        for _ in range(2):
            free = os.statvfs(ballast.parent)
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), max(free.f_bavail * free.f_frsize, 1))


async def _ask_much(port: int, seconds: float) -> None:
    """What impatient operators and a scraper ask, all at once: each takes a connection of the server's pool."""
    calls = ("/api/v1/webhooks/health", "/api/v1/webhooks/statistics?days=7", "/metrics")
    until = time.monotonic() + seconds
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=5, headers={"X-Admin-Key": ADMIN_KEY}, trust_env=False
    ) as client:

        async def ask(call: str) -> None:
            while time.monotonic() < until:
                # AttributeError: what anyio raises of a connection that is cut in the moment in which it is made.
                with contextlib.suppress(httpx.HTTPError, AttributeError):
                    await client.get(call)
                await asyncio.sleep(0)

        await asyncio.gather(*(ask(call) for call in calls for _ in range(8)))


def narrate() -> None:
    """Say on standard error what is done, with the time."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
