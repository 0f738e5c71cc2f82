"""The benchmark: every peer and every floor, in turns, on this machine.

    python -m bench.run --seconds 4 --repeats 3

Writes every run, the medians and the ratios as JSON, and a table and a picture into the documentation. Exit status 1
when something that was acknowledged is not stored, or stored twice, or when one of Kamiyo's own lines could not be
measured; a peer that cannot be installed is named and left out.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import bars, install, load, report, sampling
from bench.floors import TABLE
from bench.lab import Lab, laboratory
from bench.measure import Session, WrongAnswer, acknowledged_ids, measure, serve_floor
from bench.peers.base import ROOT, Peer, PeerUnavailable
from bench.peers.djstripe.peer import DjStripe
from bench.peers.handwritten.peer import HandWritten
from bench.peers.ours import Ours, ours
from bench.peers.syncengine.peer import SyncEngine
from bench.processes import Command, DidNotStart, end_in_order, free_port, output, quiet, run_in_order

RESULTS = ROOT / "bench" / "results.json"
_NOT_MEASURED = (DidNotStart, WrongAnswer, load.LoadFailed, PeerUnavailable)

#: Floors of the database: name, events in a commit, connections.
_INSERTS = (("insert-1", 1, 1), ("insert-100", 100, 1), ("insert-100x2", 100, 2))


@dataclass(frozen=True)
class Options:
    """How long, how often, who, and where to."""

    seconds: float
    repeats: int
    connections: tuple[int, ...]
    peers: tuple[str, ...]
    servers: int
    profile: bool
    results: Path
    docs: Path | None
    patience: float


@dataclass
class Benchmark:
    """One benchmark as it goes: what was measured, who was left out and why."""

    options: Options
    session: Session
    runs: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    async def prepare(self, peers: Iterable[Peer]) -> list[Peer]:
        """Install and make the tables of those who can be had."""
        ready = []
        for peer in peers:
            if self.options.peers and peer.name not in self.options.peers:
                continue
            try:
                await asyncio.to_thread(peer.install)
                await self.session.lab.create(peer.database)
                await peer.prepare(self.session.lab)
                ready.append(peer)
            except _NOT_MEASURED as error:
                self.leave_out(peer, error)
        return ready

    def leave_out(self, peer: Peer, error: Exception) -> None:
        """Say that a peer is not measured, and why."""
        self.left_out[peer.name] = str(error)
        _say(f"LEFT OUT: {peer.label}: {error}")
        if isinstance(peer, Ours):
            self.problems.append(f"{peer.name} could not be measured: {error}")

    async def round(self, peers: Sequence[Peer], turn: int) -> None:
        """Everybody once, at each number of connections."""
        for peer in peers:
            for connections in self.options.connections:
                if peer.name in self.left_out or (peer.name == "kamiyo-two" and connections != 64):
                    continue
                try:
                    run = await measure(
                        self.session, peer, connections=connections, seconds=self.options.seconds, turn=turn
                    )
                except _NOT_MEASURED as error:
                    self.leave_out(peer, error)
                    continue
                self.runs.append(run.as_json())
                self.problems += [f"{peer.name}, {connections} connections: {said}" for said in run.problems]
                _say(report.line(peer.label, self.runs[-1]))
        await self._floors(turn)

    async def _floors(self, turn: int) -> None:
        served = (
            ("ceiling", "bench.ceiling", ()),
            ("asgi", "uvicorn", ("bench.floor_app:app", "--lifespan", "off", "--no-access-log", "--port")),
        )
        for name, module, words in served:
            if self.options.peers and name not in self.options.peers:
                continue
            port = free_port()
            options = ("--loop", "uvloop", "--http", "httptools") if words else ()
            command = Command((sys.executable, "-m", module, *words, str(port), *options), {"PYTHONPATH": str(ROOT)})
            found = await serve_floor(
                self.session,
                name,
                command,
                port,
                connections=self.options.connections,
                seconds=min(self.options.seconds, 3),
            )
            for seen in found.values():
                self.runs.append({"peer": name, "round": turn, **asdict(seen), "rate": seen.rate})
                _say(report.line(name, self.runs[-1]))
        for name, batch, connections in _INSERTS:
            if self.options.peers and name not in self.options.peers:
                continue
            await quiet(self.options.patience)
            told = await _insert(self.session.lab, min(self.options.seconds, 3), batch, connections)
            self.runs.append({"peer": name, "round": turn, "connections": connections, **told})
            _say(report.line(name, self.runs[-1]))

    async def check_ids(self, peers: Iterable[Peer]) -> None:
        """Id by id, for each of Kamiyo's lines."""
        for peer in peers:
            if isinstance(peer, Ours) and peer.name not in self.left_out:
                try:
                    found = await acknowledged_ids(self.session, peer, connections=64)
                except _NOT_MEASURED as error:
                    # What was measured until here is not thrown away for it.
                    found = [f"its ids were not looked up: {error}"]
                self.problems += [f"{peer.name}: {said}" for said in found]
                _say(f"{peer.label}: each acknowledged id looked up: {'; '.join(found) or 'all stored'}")


async def _insert(lab: Lab, seconds: float, batch: int, connections: int) -> dict[str, float]:
    async with lab.connected("bench_floor") as db:
        await lab.empty(db, ["public"], [])
    words = (sys.executable, "-m", "bench.floors", lab.url("bench_floor"), str(seconds), str(batch), str(connections))
    status, out, _ = await output(words, env={"PYTHONPATH": str(ROOT)})
    if status:
        raise DidNotStart("the floor of the database could not be measured")
    told: dict[str, float] = json.loads(out)
    return told


async def main(options: Options, lab: Lab, folder: Path) -> int:
    """Measure, write, print; returns the exit status."""
    end_in_order()
    logs = install.CACHE / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("*.log"):
        old.unlink()
    bench = Benchmark(options, Session(lab, folder, logs))
    bench.session.patience = options.patience
    began = time.time()
    await lab.create("bench_floor")
    async with lab.connected("bench_floor") as db:
        await db.execute(TABLE)
    peers = await bench.prepare([*ours(options.servers), SyncEngine(), HandWritten(), DjStripe()])
    for turn in range(1, options.repeats + 1):
        _say(f"── round {turn} of {options.repeats} ──")
        await bench.round(peers, turn)
    await bench.check_ids(peers)
    profiles = await sampling.profiles(bench.session, peers, options.seconds) if options.profile else {}
    labels = {peer.name: peer.label for peer in peers}
    results = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "took_seconds": round(time.time() - began),
        "machine": machine(),
        "postgres": await lab.settings(),
        "options": {"seconds": options.seconds, "repeats": options.repeats, "servers": options.servers},
        "versions": {name: version(name) for name in ("asyncpg", "uvicorn", "uvloop", "httptools", "msgspec")},
        "left_out": bench.left_out,
        "problems": bench.problems,
        "labels": labels | report.FLOORS,
        "medians": report.medians(bench.runs),
        "bars": [bar.as_json() for bar in bars.judge(bench.runs)],
        "profiles": profiles,
        "runs": bench.runs,
    }
    print(report.text(results))
    await asyncio.to_thread(_write, results, options)
    return 1 if bench.problems else 0


def machine() -> dict[str, Any]:
    """What it ran on."""
    model = ""
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else ""
    load_now = os.getloadavg()[0]
    return {
        "cores": os.cpu_count(),
        "processor": model,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": round(load_now, 2),
    }


def _write(results: dict[str, Any], options: Options) -> None:
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.docs is None:
        return
    drawn = _draw(options.results, options.docs / "performance.svg")
    content = report.markdown(results, "performance.svg" if drawn else "")
    report.into_document(options.docs / "performance.md", "bench", content)


def _draw(results: Path, picture: Path) -> bool:
    try:
        tools = install.python_environment("tools", install.TOOLS)
    except PeerUnavailable as error:
        _say(f"LEFT OUT: the picture: {error}")
        return False
    drawn = subprocess.run([tools, "-m", "bench.picture", results.absolute(), picture], cwd=ROOT, check=False)
    if drawn.returncode:
        _say("LEFT OUT: the picture could not be drawn")
    return drawn.returncode == 0


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def options_of(words: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="See docs/performance.md.")
    parser.add_argument("--seconds", type=float, default=4, help="length of a measured window (default 4)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--connections", default="64,16,1", help="default 64,16,1")
    parser.add_argument("--peers", default="", help="names, separated by commas (default: all, and the floors)")
    parser.add_argument("--servers", type=int, default=int(os.environ.get("KAMIYO_BENCH_WORKERS", "1")))
    parser.add_argument("--profile", action="store_true", help="also say where our server's time goes (py-spy)")
    parser.add_argument(
        "--patience", type=float, default=0, help="seconds to wait before each window for a quiet machine"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-docs", action="store_true", help="leave the documentation as it is")
    given = parser.parse_args(words)
    return Options(
        seconds=given.seconds,
        repeats=given.repeats,
        connections=tuple(int(part) for part in given.connections.split(",")),
        peers=tuple(part for part in given.peers.split(",") if part),
        servers=given.servers,
        profile=given.profile,
        results=given.results,
        patience=given.patience,
        docs=None if given.no_docs else ROOT / "docs",
    )


if __name__ == "__main__":
    chosen = options_of()
    if not load.available():
        sys.exit("The load generator wrk is missing. On Debian and Ubuntu: apt install wrk")
    with laboratory() as postgres, load.request_folder() as requests:
        run_in_order(lambda: main(chosen, postgres, requests))
