"""Ten million events against an empty database: does anything get slower?

    python -m bench.growth --rows 10000000

Two databases of one server, measured in turns: acknowledged and processed per second; then, in the full one, the
questions that servers and operators ask, the removal of a day's bodies, and a backlog of a tenth of its events.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench import fill, install, load, report
from bench.events import MEAN_BYTES, customer_id, event_id
from bench.lab import Connection, Lab, laboratory
from bench.measure import Session, started
from bench.peers.base import ROOT
from bench.peers.ours import Ours
from bench.processes import Meter, end_in_order, environment, quiet, run_in_order
from bench.run import machine
from kamiyo import inbox
from kamiyo.inbox import Filters, Outcome, Settled

RESULTS = ROOT / "bench" / "results-growth.json"

_CONNECTIONS = 64
_ASKED = 100

#: Events of a claim, and claims at once: the defaults of KAMIYO_WORKER_BATCH and KAMIYO_WORKER_CONCURRENCY.
_BATCH = 200
_HANDS = 4

#: Events of a drain that are timed together.
_SLICE = 50_000

#: Disk for one event's line in the ledger with its indexes, billing row and a tenth of backlog; for its body, of which
#: a page holds one or two; and for the WAL, the load and the second database.
_LEDGER_BYTES = 2000
_BODY_BYTES = MEAN_BYTES * 1.6
_BYTES_BESIDE = 6 << 30


@dataclass(frozen=True)
class Options:
    """How many events and customers, how long, how often."""

    rows: int
    customers: int
    backlog: int
    seconds: float
    repeats: int
    results: Path
    docs: Path | None
    patience: float
    days: int
    server: dict[str, str]


@dataclass
class Bar:
    """One promise: a figure and its limit."""

    promise: str
    figure: float
    limit: float
    unit: str
    at_most: bool = True

    @property
    def verdict(self) -> str:
        """`pass` or `miss`."""
        return "pass" if (self.figure <= self.limit if self.at_most else self.figure >= self.limit) else "miss"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "verdict": self.verdict}


@dataclass
class Growth:
    """One run as it goes."""

    options: Options
    session: Session
    plan: fill.Fill
    runs: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def lab(self) -> Lab:
        """The server."""
        return self.session.lab

    async def make(self) -> dict[str, float]:
        """Make both databases, and fill one; returns what an event takes on disk, in bytes."""
        for peer in (EMPTY, FULL):
            await self.lab.create(peer.database)
            await peer.prepare(self.lab)
        async with self.lab.connected(FULL.database) as db:
            began = time.monotonic()
            await fill.fill(db, self.plan, fill.progress_line())
            # What the kernel has not written yet would be written beside the first windows.
            await asyncio.to_thread(os.sync)
            await fill.warm(db)
            took = time.monotonic() - began
            row = await db.fetchrow(_DISK)
            assert row is not None
        rows = self.options.rows
        _say(f"filled {rows:,} events in {took:.0f} s; {row['whole'] / 2**30:.1f} GiB")
        with_bodies = rows * self.plan.kept / fill.DAYS
        disk = {name: row[name] / rows for name in ("ledger", "ledger_indexes")} | {
            "bodies": row["bodies"] / with_bodies,
            "billing": row["billing"] / rows,
        }
        disk["everything"] = sum(disk.values())
        return {name: round(value, 1) for name, value in disk.items()} | {
            "fill_seconds": round(took),
            "days_with_bodies": self.plan.kept,
            "gib": round(row["whole"] / 2**30, 2),
        }

    async def rates(self) -> None:
        """Acknowledged and processed per second, empty and full in turns."""
        for turn in range(1, self.options.repeats + 1):
            for peer in (EMPTY, FULL):
                run = await self._rate(peer)
                self.runs.append({"round": turn, **run})
                _say(
                    f"{peer.label:<6} {run['rate']:>7.0f}/s acknowledged, {run['processed']:>7.0f}/s processed, "
                    f"p99 {run['p99']:.1f} ms"
                )

    async def _rate(self, peer: Ours) -> dict[str, Any]:
        async with self.lab.connected(peer.database) as db:
            await db.execute("CHECKPOINT")
            async with started(self.session, peer) as (port, pids):
                warm = await self.session.fire(peer.path, port, connections=_CONNECTIONS, seconds=1, expect=30_000)
                since = await db.fetchval("SELECT clock_timestamp()")
                wal = await _wal(db)
                await quiet(self.session.patience)
                seconds = self.options.seconds
                async with (
                    self.session.signed(
                        peer.path, connections=_CONNECTIONS, seconds=seconds, expect=warm.rate * 2 + 1000
                    ) as file,
                    Meter(pids) as meter,
                ):
                    fired = await load.fire(port, file, connections=_CONNECTIONS, seconds=seconds)
                row = await db.fetchrow(_SINCE, since)
                written = await _wal(db) - wal
            await self._leave(db, peer)
        assert row is not None
        if not fired.acknowledged <= row["stored"] <= fired.acknowledged + _CONNECTIONS:
            self.problems.append(f"{peer.label}: {fired.acknowledged} acknowledged, {row['stored']} stored")
        return {
            "database": peer.label,
            "rate": fired.rate,
            "processed": row["processed"] / fired.seconds,
            "p50": fired.p50,
            "p99": fired.p99,
            "wal": written / max(row["stored"], 1),
            "rss": meter.usage["server"].rss,
            "others": max(meter.busy - sum(used.cpu for used in meter.usage.values()) - fired.cpu, 0.0),
        }

    async def _leave(self, db: Connection, peer: Ours) -> None:
        # Where there was nothing before, autovacuum finds much to do: a minute later, in the other's window.
        if peer is EMPTY:
            await self.lab.empty(db, peer.schemas, peer.kept)

    async def questions(self) -> dict[str, list[float]]:
        """Milliseconds of each question in the full database: every time it was asked."""
        pick = random.Random(7)
        asked: dict[str, Callable[[Connection], Awaitable[object]]] = {
            "/health": inbox.health,
            "/statistics": lambda db: inbox.statistics(db, 7),
            "/metrics": inbox.queue,
            "/events by id": lambda db: inbox.one(db, self._some(pick)),
        }
        for name, filters in self._filters(pick).items():
            asked[f"/events {name}"] = partial(_listed, filters)
        times: dict[str, list[float]] = {}
        async with self.lab.connected(FULL.database) as db:
            for name, ask in asked.items():
                times[name] = [await _timed(ask(db)) for _ in range(_ASKED)]
        return times

    def _some(self, pick: random.Random) -> str:
        return event_id(pick.randrange(self.options.rows))

    def _filters(self, pick: random.Random) -> dict[str, Callable[[], Filters]]:
        def somebody() -> str:
            return customer_id(pick.randrange(self.options.rows), self.options.customers)

        def moment() -> datetime:
            return self.plan.start + timedelta(days=pick.uniform(1, fill.DAYS - 1))

        def between() -> Filters:
            at = moment()
            return Filters(since=at, until=at + timedelta(hours=1))

        return {
            "unfiltered": Filters,
            "by customer": lambda: Filters(customer=somebody()),
            "by object": lambda: Filters(object_id="sub_" + somebody()[4:]),
            "by type": lambda: Filters(type="invoice.payment_succeeded"),
            "by type, until a moment": lambda: Filters(type="customer.updated", until=moment()),
            "by status": lambda: Filters(status="failed"),
            "by status and type": lambda: Filters(status="failed", type="invoice.payment_succeeded"),
            "in an hour": between,
        }

    async def claims(self, db: Connection) -> tuple[dict[str, float], int]:
        """How long claiming a batch takes with the backlog waiting, in milliseconds; and the number of the last claim.

        By turns in the database alone, and at the worker, whom the bodies have to reach. What is claimed is settled, as
        a worker would, so that each claim meets rows nobody touched before.
        """
        inside: list[float] = []
        outside: list[float] = []
        number = 0
        for turn in range(max(min(_ASKED, self.options.backlog // (5 * _BATCH)), 2)):
            if turn % 2:
                held, number, took = await _claim_left_there(db)
                inside.append(took)
            else:
                began = time.perf_counter()
                number, claimed = await inbox.claim(db, _BATCH)
                outside.append((time.perf_counter() - began) * 1000)
                held = [one.event.id for one in claimed]
            if len(held) != _BATCH:
                self.problems.append(f"{len(held)} events were claimed of {_BATCH}")
            async with db.transaction():
                await inbox.succeed(db, number, [Settled(name, Outcome.ignored, 1, 400) for name in held])
            await inbox.unlock(db)
        times = {"claim_p50": median(inside), "claim_p99": _p99(inside)}
        return times | {"claim_at_worker_p50": median(outside), "claim_at_worker_p99": _p99(outside)}, number

    async def retention(self) -> dict[str, float]:
        """Drop the oldest day's bodies while the server receives; seconds it took, and bytes it gave back."""
        table = self.plan.partition(fill.DAYS - self.plan.kept)
        async with self.lab.connected(FULL.database) as db, started(self.session, FULL) as (port, _):
            before = await db.fetchval("SELECT pg_database_size(current_database())")
            firing = asyncio.create_task(self.session.fire(FULL.path, port, connections=16, seconds=2, expect=20_000))
            await asyncio.sleep(1.5)
            began = time.perf_counter()
            await db.execute(f"DROP TABLE {table}")
            took = time.perf_counter() - began
            fired = await firing
            after = await db.fetchval("SELECT pg_database_size(current_database())")
            dead = await db.fetchval(
                "SELECT coalesce(sum(n_dead_tup), 0) FROM pg_stat_user_tables WHERE relname LIKE 'webhook_payloads%'"
            )
        if fired.refused or fired.broken:
            self.problems.append(f"{fired.refused} deliveries were refused while a day's bodies were dropped")
        return {
            "seconds": took,
            "bytes_given_back": before - after,
            "dead_rows": float(dead),
            "longest_acknowledgement_ms": fired.longest,
        }

    async def backlog(self, peer: Ours, count: int) -> dict[str, Any]:
        """Events per second at which workers take a backlog of `count`, and how far one fell behind its turn.

        `rates` are those of each slice of it, so that one stall of the disk is one of many.
        """
        first = self.session.take(count)
        async with self.lab.connected(peer.database) as db:
            await fill.add_backlog(db, self.plan, range(first, first + count), fill.progress_line())
            # The backlog of an outage came over hours; what is written of it now would be beside what is measured.
            await db.execute("CHECKPOINT")
            await asyncio.to_thread(os.sync)
            times, last = await self.claims(db) if peer is FULL else ({}, 0)
            async with self._worker(peer):
                began = time.monotonic()
                while await db.fetchval(_WAITING):
                    if time.monotonic() - began > 3600:
                        self.problems.append(f"of a backlog of {count} some were still waiting after an hour")
                        break
                    await asyncio.sleep(0.2)
            row = await db.fetchrow(_DRAINED, first + 1, last)
            assert row is not None
            slices = await db.fetch(_SLICES, first + 1, last, min(_SLICE, max(row["drained"], 1)))
            await self._leave(db, peer)
        if row["count"] != count or row["other"]:
            self.problems.append(f"of a backlog of {count}, {row['count']} were processed, {row['other']} failed")
        if row["backwards"]:
            self.problems.append(f"{row['backwards']} events overtook an earlier one of their customer")
        rates = [events / seconds for events, seconds in slices if seconds]
        result = {"rate": row["drained"] / row["seconds"], "rates": rates, "behind": row["behind"]}
        return result | times

    @asynccontextmanager
    async def _worker(self, peer: Ours) -> AsyncIterator[None]:
        """`kamiyo worker` on a database, ended in order."""
        log = self.session.logs / "worker.log"
        command = peer.command(self.lab, 0)
        words = [*command.words[: command.words.index("serve")], "worker"]
        async with _process(words, dict(command.env), log):
            yield


@asynccontextmanager
async def _process(words: Sequence[str], env: dict[str, str], log: Path) -> AsyncIterator[None]:
    with log.open("ab") as out:
        process = await asyncio.create_subprocess_exec(*words, env=environment(env), stdout=out, stderr=out)
    try:
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 30)
        except TimeoutError:
            process.kill()
            await process.wait()


class Database(Ours):
    """Kamiyo on one of the two databases."""

    def __init__(self, label: str) -> None:
        super().__init__(f"growth-{label}", label)


EMPTY, FULL = Database("empty"), Database("full")

_DISK = """
SELECT pg_database_size(current_database()) AS whole,
       pg_table_size('webhook_events') AS ledger,
       pg_indexes_size('webhook_events') AS ledger_indexes,
       (SELECT sum(pg_total_relation_size(inhrelid)) FROM pg_inherits
        WHERE inhparent = 'webhook_payloads'::regclass)::bigint AS bodies,
       (SELECT sum(pg_total_relation_size(oid)) FROM pg_class
        WHERE relnamespace = 'billing'::regnamespace AND relkind = 'r')::bigint AS billing
"""

_SINCE = """
SELECT count(*) AS stored, count(*) FILTER (WHERE status = 'processed') AS processed
FROM webhook_events WHERE created_at >= $1
"""

# From the newest on: what is done already is at the other end.
_WAITING = "SELECT next_try_at FROM webhook_unfinished WHERE next_try_at IS NOT NULL ORDER BY next_try_at DESC LIMIT 1"

# Claims after number $2 are the workers'. How far an event was processed after its turn, as a share of the backlog; and
# whether a customer's events were claimed in their order (claims are numbered).
_DRAINED = """
WITH backlog AS (
    SELECT seq, lane, claim, status, created_at, processed_at, stripe_created FROM webhook_events WHERE seq >= $1
), turns AS (
    SELECT row_number() OVER (ORDER BY processed_at) - row_number() OVER (ORDER BY created_at, seq) AS late,
           claim < lag(claim) OVER (PARTITION BY lane ORDER BY stripe_created, seq) AS backwards,
           processed_at, status, claim > $2 AS drained
    FROM backlog
)
SELECT count(*) FILTER (WHERE status = 'processed') AS count, count(*) FILTER (WHERE status <> 'processed') AS other,
       count(*) FILTER (WHERE drained AND status = 'processed') AS drained,
       greatest(extract(epoch FROM max(processed_at) FILTER (WHERE drained)
                - min(processed_at) FILTER (WHERE drained)), 0.001)::float8 AS seconds,
       (max(late)::float8 / count(*)) AS behind, count(*) FILTER (WHERE backwards) AS backwards
FROM turns
"""

# How many events each whole slice of what the workers did has, and the seconds it took.
_SLICES = """
WITH drained AS (
    SELECT processed_at, (row_number() OVER (ORDER BY processed_at) - 1) / $3 AS slice
    FROM webhook_events WHERE seq >= $1 AND claim > $2 AND status = 'processed'
)
SELECT count(*), extract(epoch FROM max(processed_at) - min(processed_at))::float8
FROM drained GROUP BY slice HAVING count(*) = $3 ORDER BY slice
"""


async def _listed(filters: Callable[[], Filters], db: Connection) -> object:
    return await inbox.listed(db, filters())


async def _claim_left_there(db: Connection) -> tuple[list[str], int, float]:
    """Claim as `inbox.claim` does, its rows left there: the ids, the claim's number, the server's own milliseconds."""
    row = await db.fetchrow(_CLAIM, _BATCH)
    assert row is not None
    return row["held"], row["number"], row["took"]


_CLAIM = """
SELECT array_agg(event_id) AS held, max(claim) AS number,
       (extract(epoch FROM clock_timestamp() - statement_timestamp()) * 1000)::float8 AS took
FROM webhook_claim($1, '{}')
"""


async def _wal(db: Connection) -> int:
    return int(await db.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"))


async def _timed(question: Awaitable[object]) -> float:
    began = time.perf_counter()
    await question
    return (time.perf_counter() - began) * 1000


def _p99(times: Sequence[float]) -> float:
    return sorted(times)[len(times) * 99 // 100]


async def main(options: Options, lab: Lab, folder: Path) -> int:
    """Fill, measure, write, print; returns the exit status."""
    end_in_order()
    logs = install.CACHE / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    session = Session(lab, folder, logs, customers=options.customers)
    session.patience = options.patience
    # The fill's numbers are the first.
    session.take(options.rows)
    kept = min(options.days, await asyncio.to_thread(days_that_fit, options.rows))
    growth = Growth(options, session, fill.Fill.until_today(options.rows, options.customers, kept))
    began = time.time()
    disk = await growth.make()
    await growth.rates()
    questions = await growth.questions()
    retention = await growth.retention()
    # The same backlog for both: a long one meets checkpoints and autovacuum, a short one does not.
    before, large, after = [await growth.backlog(peer, options.backlog) for peer in (EMPTY, FULL, EMPTY)]
    small = {"rate": (before["rate"] + after["rate"]) / 2, "rates": before["rates"] + after["rates"]}
    results = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "took_seconds": round(time.time() - began),
        "machine": machine(),
        "postgres": await lab.settings(),
        "options": {name: getattr(options, name) for name in ("rows", "customers", "backlog", "seconds", "repeats")},
        "disk": disk,
        "questions": {
            name: {"p50": round(median(times), 3), "p99": round(_p99(times), 3)} for name, times in questions.items()
        },
        "retention": retention,
        "backlog": {"empty": small, "full": large},
        "bars": [bar.as_json() for bar in _bars(growth.runs, questions, retention, small, large, options.backlog)],
        "problems": growth.problems,
        "runs": growth.runs,
    }
    print(text(results))
    await asyncio.to_thread(_write, results, options)
    return 1 if growth.problems else 0


def _bars(
    runs: Sequence[dict[str, Any]],
    questions: dict[str, list[float]],
    retention: dict[str, float],
    small: dict[str, Any],
    large: dict[str, Any],
    backlog: int,
) -> list[Bar]:
    def of(database: str, name: str) -> float:
        return float(median(run[name] for run in runs if run["database"] == database))

    def at_least_ninety(promise: str, part: float, whole: float) -> Bar:
        return Bar(promise, 100 * part / whole, 90, "%", at_most=False)

    # A few batches are in work at once, and they do not end in the order they began.
    fair = max(5.0, 100 * _HANDS * 2 * _BATCH / backlog)
    return [
        at_least_ninety("acknowledged, of an empty database's", of("full", "rate"), of("empty", "rate")),
        at_least_ninety("processed, of an empty database's", of("full", "processed"), of("empty", "processed")),
        Bar("claim of 200 events out of the backlog, median", large["claim_p50"], 10, "ms"),
        *[Bar(f"{name}, median", median(times), 10, "ms") for name, times in questions.items()],
        Bar("a day's bodies dropped", retention["seconds"], 1, "s"),
        Bar("dead rows it left", retention["dead_rows"], 0, "rows"),
        at_least_ninety("backlog drained, of an empty database's rate", median(large["rates"]), median(small["rates"])),
        Bar("latest behind its turn, of the backlog", 100 * large["behind"], fair, "%"),
    ]


def _tables(results: dict[str, Any]) -> list[report.Table]:
    def of(database: str, name: str) -> float:
        return float(median(run[name] for run in results["runs"] if run["database"] == database))

    rows = results["options"]["rows"]
    rates = report.Table(["64 connections, median", "empty", f"{rows:,} events".replace(",", "\u202f")])
    for label, name in (
        ("acknowledged per second", "rate"),
        ("processed per second", "processed"),
        ("p50, ms", "p50"),
        ("p99, ms", "p99"),
        ("WAL per event, bytes", "wal"),
        ("RSS of the server, MiB", "rss"),
    ):
        rates.add(label, report.number(of("empty", name)), report.number(of("full", name)))
    backlog = results["backlog"]
    drains = [backlog[side]["rates"] for side in ("empty", "full")]
    rates.add("backlog, events per second, slices", *[report.number(median(one)) for one in drains])
    rates.add("[lowest–highest]", *[f"[{report.number(min(one))}–{report.number(max(one))}]" for one in drains])
    rates.add("as a whole, events per second", *[report.number(backlog[side]["rate"]) for side in ("empty", "full")])

    disk = report.Table(["Disk per event", "bytes"])
    for label, name in (
        ("body", "bodies"),
        ("ledger", "ledger"),
        ("indexes of the ledger", "ledger_indexes"),
        ("its row in a billing table", "billing"),
        ("together", "everything"),
    ):
        disk.add(label, report.number(results["disk"][name]))

    asked = report.Table(["In the database, ms", "median", "p99"])
    for name, times in results["questions"].items():
        asked.add(name, report.number(times["p50"]), report.number(times["p99"]))
    full = backlog["full"]
    for label, name in (
        (f"claim of {_BATCH} events", "claim"),
        ("the same, until the worker has them", "claim_at_worker"),
    ):
        asked.add(label, report.number(full[f"{name}_p50"]), report.number(full[f"{name}_p99"]))

    bars = report.Table(["Bar", "wanted", "measured", "verdict"])
    for bar in results["bars"]:
        wanted = f"{'≤' if bar['at_most'] else '≥'} {report.number(bar['limit'])} {bar['unit']}"
        bars.add(bar["promise"], wanted, f"{report.number(bar['figure'])} {bar['unit']}", bar["verdict"])
    return [rates, disk, asked, bars]


def text(results: dict[str, Any]) -> str:
    """For the terminal."""
    parts = [table.text() for table in _tables(results)]
    checked = "Checked: what was acknowledged is stored; the backlog was processed once, each customer in order."
    wrong = [f"WRONG: {problem}" for problem in results["problems"]]
    parts.append(report.disturbance(results["runs"]))
    return "\n\n".join(filter(None, [report.about(results), *parts, "\n".join(wrong) if wrong else checked]))


def _write(results: dict[str, Any], options: Options) -> None:
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.docs is not None:
        parts = [report.about(results), *[table.markdown() for table in _tables(results)]]
        parts += filter(None, [report.disturbance(results["runs"])])
        report.into_document(options.docs / "performance.md", "growth", "\n\n".join(parts))


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def options_of(words: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description="See docs/performance.md.")
    parser.add_argument("--rows", type=int, default=10_000_000, help="events to fill (default 10000000)")
    parser.add_argument("--customers", type=int, default=0, help="default: one for each hundred events")
    parser.add_argument("--backlog", type=int, default=0, help="default: a tenth of the events")
    parser.add_argument("--seconds", type=float, default=5, help="length of a measured window (default 5)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument(
        "--patience", type=float, default=0, help="seconds to wait before each window for a quiet machine"
    )
    parser.add_argument(
        "--server",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="settings of PostgreSQL (shared_buffers=4GB); a larger max_wal_size takes as much more of the disk",
    )
    parser.add_argument(
        "--days", type=int, default=fill.DAYS, help=f"of the {fill.DAYS} days, how many of the last have their bodies"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-docs", action="store_true", help="leave the documentation as it is")
    given = parser.parse_args(words)
    return Options(
        rows=given.rows,
        customers=given.customers or max(given.rows // 100, 100),
        backlog=given.backlog or max(given.rows // 10, 5000),
        seconds=given.seconds,
        repeats=given.repeats,
        results=given.results,
        docs=None if given.no_docs else ROOT / "docs",
        patience=given.patience,
        days=given.days,
        server=dict(setting.split("=", 1) for setting in given.server),
    )


def days_that_fit(rows: int) -> int:
    """Of how many of the last days the disk can hold the bodies. Exits with a sentence when it is not even one."""
    free = shutil.disk_usage(tempfile.gettempdir()).free - _BYTES_BESIDE - rows * _LEDGER_BYTES
    kept = min(int(free / (rows / fill.DAYS * _BODY_BYTES)), fill.DAYS)
    if kept < 1:
        sys.exit(
            f"The disk of {tempfile.gettempdir()} is too small for {rows:,} events. Name a folder on another with "
            "TMPDIR, or fewer events with ROWS."
        )
    if kept < fill.DAYS:
        _say(f"bodies of the last {kept} of {fill.DAYS} days only: the disk holds no more")
    return kept


if __name__ == "__main__":
    chosen = options_of()
    if not load.available():
        sys.exit("The load generator wrk is missing. On Debian and Ubuntu: apt install wrk")
    with laboratory(chosen.server) as postgres, load.request_folder() as requests:
        run_in_order(lambda: main(chosen, postgres, requests))
