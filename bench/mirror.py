"""What `KAMIYO_MIRROR` costs: the same events without it, with three objects named, and with all, in turns.

    python -m bench.mirror --events 20000 --rounds 5

Events of the simulator's customers (an event is about one of a dozen kinds of objects) are stored in groups and worked
off by a worker, through the same functions as in a server, in one process on one connection. Prints for each: seconds
of processor time per event, of ours and of PostgreSQL's, the WAL, and what is on disk in the end; and the medians of
the ratios within each round.
"""

import argparse
import asyncio
import random
import time
from dataclasses import dataclass
from statistics import median

from bench.lab import Lab, laboratory
from bench.processes import cpu_seconds, run_in_order, tree
from kamiyo import database, inbox
from kamiyo.event import Event, parse
from kamiyo.handlers import Registry
from kamiyo.receive import ready_to_project
from kamiyo.settings import Settings
from kamiyo.simulator import World, lifecycle
from kamiyo.telemetry import configure_logging
from kamiyo.worker import Worker

#: Events in one storing commit: what a busy server has.
_GROUP = 50

_CHOICES = {"off": "", "charge,refund,dispute": "charge,refund,dispute", "all": "all"}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run took, per event: microseconds of wall clock and of processor time, bytes."""

    wall: float
    ours: float
    postgres: float
    wal: float
    disk: float

    @property
    def cpu(self) -> float:
        """Processor time in all, in microseconds."""
        return self.ours + self.postgres


def events(count: int, seed: int) -> list[Event]:
    """`count` events of many customers' lives, as they come: Stripe's time goes on, and lives overlap."""
    world, rng, bodies = World(seed, start=1_790_000_000), random.Random(seed), list[bytes]()
    while len(bodies) < count:
        bodies += [event.body() for event in lifecycle(world, rng, steps=12)]
    return [parse(body, received=time.time()) for body in bodies[:count]]


async def run(lab: Lab, mirror: str, told: list[Event]) -> Cost:
    """Store and process `told` in a database of its own."""
    await lab.create("bench_mirror")
    url = lab.url("bench_mirror")
    settings = Settings(DATABASE_URL=url, KAMIYO_MIRROR=mirror, KAMIYO_LOG_LEVEL="error", _env_file=None)
    registry, pool = Registry(), await database.open_pool(url, size=2, application="bench", idle_limit=60)
    worker = Worker(pool, url, settings, registry, random.Random(0))
    async with pool.acquire() as db:
        await database.migrate(db)
        async with lab.connected("bench_mirror") as aside:
            await aside.execute("CHECKPOINT")
            before = await lab.read(aside)
            began, ours, theirs = time.perf_counter(), time.process_time(), cpu_seconds(tree(lab.pid))
            for at in range(0, len(told), _GROUP):
                arrivals, rows = ready_to_project(told[at : at + _GROUP], registry, settings.mirrored)
                await inbox.put_projected(db, arrivals, rows, microseconds=1)
            while await worker.run_once(db):
                pass
            count = len(told)
            wall = (time.perf_counter() - began) / count * 1e6
            ours, theirs = time.process_time() - ours, cpu_seconds(tree(lab.pid)) - theirs
            after = await lab.read(aside)
            assert await aside.fetchval("SELECT count(*) FROM webhook_events WHERE status = 'processed'") == count
    await pool.close()
    per_event = 1e6 / count
    return Cost(
        wall, ours * per_event, theirs * per_event, (after.wal - before.wal) / count, (after.disk - before.disk) / count
    )


async def main(count: int, rounds: int, lab: Lab) -> int:
    """Measure in turns, print each round and the medians; returns the exit status."""
    # Both roads say a line for each event; here neither does.
    configure_logging(level="error", log_format="json")
    told = await asyncio.to_thread(events, count, 1)
    found: list[dict[str, Cost]] = []
    for turn in range(1, rounds + 1):
        found.append({name: await run(lab, mirror, told) for name, mirror in _CHOICES.items()})
        print(
            f"round {turn}: " + "; ".join(f"{name} {cost.cpu:.0f} µs" for name, cost in found[-1].items()), flush=True
        )
    print(
        f"{count} events, median of {rounds} rounds, per event; × is the median of the ratios to the same round's off"
    )
    for name in _CHOICES:
        costs = [one[name] for one in found]
        print(
            f"{name:>22}: CPU {median(c.cpu for c in costs):.0f} µs "
            f"(ours {median(c.ours for c in costs):.0f}, PostgreSQL {median(c.postgres for c in costs):.0f}), "
            f"× {median(one[name].cpu / one['off'].cpu for one in found):.2f}; "
            f"wall {median(c.wall for c in costs):.0f} µs; "
            f"WAL {median(c.wal for c in costs):.0f} B, × {median(o[name].wal / o['off'].wal for o in found):.2f}; "
            f"disk {median(c.disk for c in costs):.0f} B"
        )
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.mirror", description=__doc__)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with laboratory() as postgres:
        run_in_order(lambda: main(given.events, given.rounds, postgres))
