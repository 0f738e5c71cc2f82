"""One run of one peer: empty tables, a fresh server, a warm-up, a measured window, the drain, and the check."""

import asyncio
import contextlib
import http.client
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import load
from bench.events import requests, write_requests
from bench.lab import Connection, Lab
from bench.peers.base import CUSTOMERS, Counts, Peer
from bench.processes import Command, Meter, free_port, quiet, server

#: Seconds a peer may take to process what it has acknowledged.
_DRAIN_SECONDS = 300.0

_WARM_UP_SECONDS = 1.0
_WARM_UP_RATE = 15_000.0
_PROBES = 4

#: Events a second that no peer here reaches, several times over.
_MOST_RATE = 40_000.0

#: Events a second that no peer here processes.
_FASTER_THAN_ANY = 25_000.0


class WrongAnswer(Exception):
    """A peer did not accept an event of the benchmark."""


@dataclass(slots=True)
class Run:
    """The figures of one run. Rates are per second, times in milliseconds unless they say seconds, CPU in cores.

    `processed`: while the load ran. `end_to_end`: everything acknowledged in the window, over the window and the drain.
    `delay_*`: from commit to processed. `others`: cores that this machine spent on what is not being measured.
    `wal`, `commits`, `disk`: per event stored, the last two with everything.
    `problems`: what the check of the database found; empty when what was acknowledged is stored, once.
    """

    peer: str
    round: int
    connections: int
    seconds: float = 0.0
    rate: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    longest: float = 0.0
    processed: float | None = None
    end_to_end: float | None = None
    backlog: int = 0
    drain_seconds: float = 0.0
    delay_p50: float | None = None
    delay_p99: float | None = None
    cpu: dict[str, float] = field(default_factory=dict)
    cpu_ms: float = 0.0
    rss: float = 0.0
    pss: float = 0.0
    others: float = 0.0
    wal: float = 0.0
    commits: float = 0.0
    disk: float = 0.0
    acknowledged: int = 0
    stored: int = 0
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Session:
    """What the runs of one benchmark share: the PostgreSQL, a folder for requests, and numbers nobody used yet."""

    def __init__(self, lab: Lab, folder: Path, logs: Path, *, customers: int = CUSTOMERS) -> None:
        self.lab, self.folder, self.logs, self.customers = lab, folder, logs, customers
        #: Seconds to wait, before each window, for the rest of the machine to be quiet.
        self.patience = 0.0
        # Whole fours, so that each file has the four types in equal parts.
        self._next = 0

    def take(self, count: int) -> int:
        """The first of `count` unused numbers."""
        first, self._next = self._next, self._next + (count + 3) // 4 * 4
        return first

    def coming(self, count: float) -> range:
        """The next `count` numbers, not yet taken."""
        return range(self._next, self._next + int(count))

    @contextlib.asynccontextmanager
    async def signed(self, path: str, *, connections: int, seconds: float, expect: float) -> AsyncIterator[Path]:
        """A file of fresh requests, `expect` for each second and a few more.

        For a fast peer signing takes a fifth as long as the window itself. Whoever meters the window opens this first:
        metered with it, a peer seems the cheaper the faster it is.
        """
        file = self.folder / "requests"
        count = max(int(expect * seconds), 200) + connections
        words = {
            "first": self.take(count),
            "count": count,
            "customers": self.customers,
            "now": int(time.time()),
        }
        await asyncio.to_thread(write_requests, file, path, **words)
        try:
            yield file
        finally:
            file.unlink()

    async def fire(
        self,
        path: str,
        port: int,
        *,
        connections: int,
        seconds: float,
        expect: float,
        note: Path | None = None,
    ) -> load.Load:
        """Send fresh events; `expect` per second are signed before it begins. Raises RanDry when that was too few."""
        async with self.signed(path, connections=connections, seconds=seconds, expect=expect) as file:
            return await load.fire(port, file, connections=connections, seconds=seconds, note=note)

    def probe(self, path: str, port: int) -> None:
        """Send one event of each type. Raises WrongAnswer unless all are answered 2xx."""
        first = self.take(_PROBES)
        for request in requests(path, first=first, count=_PROBES, customers=self.customers, now=int(time.time())):
            head, _, payload = request.partition(b"\r\n\r\n")
            headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            try:
                connection.request("POST", path, payload, headers)
                answer = connection.getresponse()
                said = answer.read()
            finally:
                connection.close()
            if answer.status >= 300:
                raise WrongAnswer(f"{path} answered {answer.status}: {said[:300]!r}")


@contextlib.asynccontextmanager
async def started(session: Session, peer: Peer) -> AsyncIterator[tuple[int, dict[str, int]]]:
    """The peer's server with its helpers; yields its port and the process ids by role."""
    log = session.logs / f"{peer.name}.log"
    async with peer.helpers(session.lab, log) as helpers:
        port = free_port()
        command = peer.command(session.lab, port)
        async with server(command, port=port, log=log) as pid:
            yield port, {"server": pid, "postgres": session.lab.pid, **helpers}


async def measure(session: Session, peer: Peer, *, connections: int, seconds: float, turn: int) -> Run:
    """One run, again with more requests where there were too few.

    Raises DidNotStart, WrongAnswer or LoadFailed when it cannot be had.
    """
    plenty = 1.8
    while True:
        try:
            return await _measure(session, peer, connections, seconds, turn, plenty)
        except load.RanDry:
            plenty *= 2
            if plenty > 10:
                raise


async def _measure(session: Session, peer: Peer, connections: int, seconds: float, turn: int, plenty: float) -> Run:
    run = Run(peer.name, turn, connections)
    async with session.lab.connected(peer.database) as db:
        await session.lab.empty(db, peer.schemas, peer.kept)
        await peer.refill(db, session.coming(_MOST_RATE * (seconds + 2)))
        await db.execute("CHECKPOINT")
        before = await session.lab.read(db)
        log_size = _size(session.logs / f"{peer.name}.log")
        async with started(session, peer) as (port, pids):
            await asyncio.to_thread(session.probe, peer.path, port)
            warm = await session.fire(
                peer.path,
                port,
                connections=connections,
                seconds=_WARM_UP_SECONDS,
                expect=_WARM_UP_RATE * plenty,
            )
            await _drained(db, peer, run)
            await _settled(db, peer)
            # A slow one gets a longer window, so that what is in flight at its end is a small part of it.
            window = seconds * (3 if warm.rate * seconds < 10 * connections else 1)
            await quiet(session.patience)
            counted = await peer.count(db)
            async with (
                session.signed(
                    peer.path, connections=connections, seconds=window, expect=warm.rate * plenty + 50
                ) as file,
                Meter(pids) as meter,
            ):
                fired = await load.fire(port, file, connections=connections, seconds=window)
                ended = time.monotonic()
            at_end = await peer.count(db)
            run.backlog = await peer.waiting(db) if peer.processes else 0
            await _drained(db, peer, run)
            run.drain_seconds = round(time.monotonic() - ended, 3) if run.backlog else 0.0
            await _settled(db, peer)
            delay = await peer.delay(db)
        # Its sessions have ended, so they have reported everything.
        after = await session.lab.read(db)
        final = await peer.count(db)
    _note_load(run, fired)
    run.acknowledged += warm.acknowledged + _PROBES
    run.stored = final.stored
    if peer.processes:
        run.processed = (at_end.processed - counted.processed) / fired.seconds
        run.end_to_end = (final.processed - counted.processed) / (fired.seconds + run.drain_seconds)
    run.delay_p50, run.delay_p99 = delay or (None, None)
    run.cpu = {name: round(usage.cpu, 3) for name, usage in meter.usage.items()} | {"wrk": round(fired.cpu, 3)}
    run.others = round(max(meter.busy - sum(run.cpu.values()), 0.0), 3)
    work = sum(run.cpu[name] for name in ("server", "postgres"))
    run.cpu_ms = work * 1000 / fired.rate if fired.rate else 0.0
    run.rss, run.pss = meter.usage["server"].rss, meter.usage["server"].pss
    stored = max(final.stored, 1)
    run.wal = (after.wal - before.wal) / stored
    run.commits = (after.commits - before.commits) / stored
    run.disk = (after.disk - before.disk) / stored
    run.problems = _problems(run, final, (warm, fired), connections)
    if run.problems:
        said = _said(session.logs / f"{peer.name}.log", log_size)
        run.problems += [f"its log ends: {line[:200]}" for line in said[-3:]]
    return run


async def _drained(db: Connection, peer: Peer, run: Run) -> None:
    """Wait until everything stored is processed, or nothing more happens."""
    if not peer.processes:
        return
    deadline = time.monotonic() + _DRAIN_SECONDS
    while waiting := await peer.waiting(db):
        if time.monotonic() > deadline:
            run.problems.append(f"not processed after {_DRAIN_SECONDS:.0f} s")
            return
        # To count what waits takes longer the more it is, from the processors that are to be measured: asked every
        # 20 ms, it took a twelfth of the rate. Often only towards the end.
        await asyncio.sleep(min(max(waiting / _FASTER_THAN_ANY, 0.02), 0.5))


async def _settled(db: Connection, peer: Peer) -> None:
    """Wait until the counts stand still: requests in flight when wrk left may still be at work."""
    counts = await peer.count(db)
    while True:
        await asyncio.sleep(0.3)
        again = await peer.count(db)
        if again == counts:
            return
        counts = again


def _note_load(run: Run, fired: load.Load) -> None:
    run.seconds, run.rate = fired.seconds, fired.rate
    run.p50, run.p90, run.p99, run.longest = fired.p50, fired.p90, fired.p99, fired.longest
    run.acknowledged = fired.acknowledged


def _problems(run: Run, final: Counts, loads: Sequence[load.Load], connections: int) -> list[str]:
    """Whether what was acknowledged is stored, once: a request in flight at wrk's end may be stored, unanswered."""
    problems = [*run.problems, *final.wrong]
    if final.stored < run.acknowledged:
        problems.append(f"{run.acknowledged} acknowledged, {final.stored} stored")
    if final.stored > run.acknowledged + connections * len(loads):
        problems.append(f"{final.stored} stored, {run.acknowledged} acknowledged: stored more than once")
    for fired in loads:
        if fired.refused or fired.broken:
            problems.append(f"{fired.refused} refused, {fired.broken} connections broken")
    return problems


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _said(file: Path, since: int) -> list[str]:
    with contextlib.suppress(OSError), file.open("rb") as log:
        log.seek(since)
        return log.read()[-4000:].decode(errors="replace").splitlines()
    return []


async def acknowledged_ids(session: Session, peer: Peer, *, connections: int) -> list[str]:
    """Look each event id of a 2xx answer up, apart from the measured runs; returns what is wrong."""
    noted = session.folder / "acknowledged"
    async with session.lab.connected(peer.database) as db:
        await session.lab.empty(db, peer.schemas, peer.kept)
        await peer.refill(db, session.coming(_MOST_RATE * 3))
        async with started(session, peer) as (port, _):
            fired = await session.fire(
                peer.path, port, connections=connections, seconds=1, expect=_MOST_RATE, note=noted
            )
            await _settled(db, peer)
        ids = noted.read_text().split()
        noted.unlink()
        found = await db.fetchval("SELECT count(*) FROM webhook_events WHERE event_id = ANY ($1::text[])", ids)
    problems = []
    if len(ids) < fired.acknowledged or len(set(ids)) != len(ids):
        problems.append(f"{fired.acknowledged} answers named {len(set(ids))} different events")
    if found != len(ids):
        problems.append(f"of {len(ids)} events whose ids were acknowledged, {found} are stored")
    return problems


async def serve_floor(
    session: Session, name: str, command: Command, port: int, *, connections: Sequence[int], seconds: float
) -> dict[int, load.Load]:
    """Measure a server that keeps nothing, at each number of connections; the same requests go round and round."""
    file = session.folder / "requests"
    results = {}
    async with server(command, port=port, log=session.logs / f"{name}.log"):
        await asyncio.to_thread(
            write_requests,
            file,
            "/",
            first=session.take(20_000),
            count=20_000,
            customers=session.customers,
            now=int(time.time()),
        )
        try:
            for width in connections:
                await load.fire(port, file, connections=width, seconds=1, loop=True)
                await quiet(session.patience)
                results[width] = await load.fire(port, file, connections=width, seconds=seconds, loop=True)
        finally:
            file.unlink()
    return results
