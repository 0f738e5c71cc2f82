"""The floors under any receiver in this language on this PostgreSQL: what the driver alone can store.

    python -m bench.floors URL SECONDS BATCH CONNECTIONS

Stores bodies of events with asyncpg, BATCH of them with each commit, over CONNECTIONS at once, and prints one JSON
object: rows per second, and the median and 99th percentile of a commit in milliseconds.
"""

import asyncio
import json
import sys
import time

import asyncpg
import uvloop

from bench.events import body, event_id

# The cheapest way to keep a body: uncompressed, in the row.
TABLE = """
CREATE TABLE IF NOT EXISTS floor (event_id text COLLATE "C" PRIMARY KEY, body bytea NOT NULL);
ALTER TABLE floor ALTER body SET STORAGE EXTERNAL;
ALTER TABLE floor SET (toast_tuple_target = 8160);
"""

_ONE = "INSERT INTO floor (event_id, body) VALUES ($1, $2)"
_MANY = "INSERT INTO floor (event_id, body) SELECT * FROM unnest($1::text[], $2::bytea[])"


async def main(url: str, seconds: float, batch: int, connections: int) -> dict[str, float]:
    """Store for `seconds`, after half a second of warm-up."""
    bodies = [body(number, created=1_790_000_000, customers=500) for number in range(4)]
    numbers = iter(range(1_000_000_000))
    times: list[float] = []

    async def store(until: float) -> None:
        db = await asyncpg.connect(url)
        try:
            statement = await db.prepare(_ONE if batch == 1 else _MANY)
            while time.monotonic() < until:
                taken = [next(numbers) for _ in range(batch)]
                ids = [event_id(number) for number in taken]
                payloads = [bodies[number % 4] for number in taken]
                began = time.perf_counter()
                if batch == 1:
                    await statement.fetch(ids[0], payloads[0])
                else:
                    await statement.fetch(ids, payloads)
                times.append(time.perf_counter() - began)
        finally:
            await db.close()

    await asyncio.gather(*(store(time.monotonic() + 0.5) for _ in range(connections)))
    times.clear()
    began = time.monotonic()
    await asyncio.gather(*(store(began + seconds) for _ in range(connections)))
    took = time.monotonic() - began
    ordered = sorted(times)
    return {
        "rate": len(times) * batch / took,
        "p50": ordered[len(ordered) // 2] * 1000,
        "p99": ordered[len(ordered) * 99 // 100] * 1000,
    }


if __name__ == "__main__":
    address, duration, size, width = sys.argv[1:]
    print(json.dumps(uvloop.run(main(address, float(duration), int(size), int(width)))))
