"""Kamiyo, started as its users start it: `kamiyo serve`."""

import os
import sys

from bench.events import KINDS, SECRET, customer_ids, object_id
from bench.lab import Connection, Lab
from bench.peers.base import CUSTOMERS, ROOT, Counts, Peer
from bench.processes import Command
from kamiyo import database

HANDLER = "bench.peers.handler"


class Ours(Peer):
    """`process` tells what happens beyond the acknowledgement: nothing, the four tables, or also a user's handler."""

    path = "/api/v1/webhooks/stripe"
    schemas = ("public", "billing")
    kept = ("webhook_migrations",)

    def __init__(self, name: str, label: str, *, process: bool = True, handler: bool = False, servers: int = 1):
        self.name, self.label, self.processes = name, label, process
        self._handler, self._servers = handler, servers

    async def prepare(self, lab: Lab) -> None:
        async with lab.connected(self.database) as db:
            await database.migrate(db)
            await db.execute(
                "CREATE TABLE bench_counters (customer text PRIMARY KEY, events bigint NOT NULL) WITH (fillfactor = 50)"
            )

    async def refill(self, db: Connection, numbers: range) -> None:
        if not self._handler:
            return
        owners = set(customer_ids(CUSTOMERS))
        # `customer.updated` is about a customer of its own.
        owners |= {object_id(number) for number in numbers if KINDS[number % 4].shape == "customer"}
        rows = [(owner, 0) for owner in sorted(owners)]
        await db.copy_records_to_table("bench_counters", records=rows)
        await db.execute("VACUUM ANALYZE bench_counters")

    def command(self, lab: Lab, port: int) -> Command:
        words = (sys.executable, "-m", "kamiyo", "serve")
        env = {
            "DATABASE_URL": lab.url(self.database),
            "STRIPE_WEBHOOK_SECRET": SECRET,
            "ADMIN_API_KEY": "the-benchmarks-key",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }
        if self._handler or not self.processes:
            # Events that have a handler are left to the workers, so without a worker they are stored and no more.
            env["KAMIYO_HANDLERS"] = HANDLER
        if not self.processes:
            env["KAMIYO_WORKER"] = "false"
        return Command((*words, "--port", str(port), "--workers", str(self._servers)), env)

    async def count(self, db: Connection) -> Counts:
        row = await db.fetchrow(_COUNT)
        assert row is not None
        wrong = []
        if row["bodies"] != row["stored"]:
            wrong.append(f"{row['stored']} events have {row['bodies']} bodies")
        if row["failed"]:
            wrong.append(f"{row['failed']} events failed")
        if self.processes and row["rows"] != row["processed"]:
            wrong.append(f"{row['processed']} processed events made {row['rows']} billing rows")
        if self._handler and self.processes and row["handled"] != row["processed"]:
            wrong.append(f"the handler's effect is there {row['handled']} times for {row['processed']} events")
        return Counts(row["stored"], row["processed"], tuple(wrong))

    async def waiting(self, db: Connection) -> int:
        return int(await db.fetchval("SELECT count(*) FROM webhook_unfinished WHERE next_try_at IS NOT NULL"))

    async def delay(self, db: Connection) -> tuple[float, float] | None:
        if not self.processes:
            return None
        row = await db.fetchrow(_DELAY)
        return None if row is None or row[0] is None else (float(row[0]), float(row[1]))


# One statement, so one snapshot: the server may still be at work. Every event is of an object of its own, so as many
# rows are in the four tables as events were processed.
_COUNT = """
SELECT count(*) AS stored, count(*) FILTER (WHERE status = 'processed') AS processed,
       count(*) FILTER (WHERE status = 'failed') AS failed,
       (SELECT count(*) FROM webhook_payloads) AS bodies,
       (SELECT count(*) FROM billing.customers) + (SELECT count(*) FROM billing.subscriptions)
           + (SELECT count(*) FROM billing.invoices) + (SELECT count(*) FROM billing.payment_methods) AS rows,
       (SELECT coalesce(sum(events), 0) FROM bench_counters)::bigint AS handled
FROM webhook_events
"""

# `created_at` is when the storing transaction began, so what is measured here is a little longer than from the commit.
_DELAY = """
SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY ms), percentile_cont(0.99) WITHIN GROUP (ORDER BY ms)
FROM (SELECT extract(epoch FROM processed_at - created_at)::float8 * 1000 AS ms
      FROM webhook_events WHERE status = 'processed') AS delays
"""


def ours(servers: int) -> list[Peer]:
    """The variants that are measured; `servers` processes each, and one line with two."""
    suffix = "" if servers == 1 else f", {servers} processes"
    chosen: list[Peer] = [
        Ours("kamiyo-ack", f"Kamiyo, acknowledged only{suffix}", process=False, servers=servers),
        Ours("kamiyo", f"Kamiyo, into the four tables{suffix}", servers=servers),
        Ours("kamiyo-handler", f"Kamiyo, and a handler of one UPDATE{suffix}", handler=True, servers=servers),
    ]
    if servers == 1:
        chosen.append(Ours("kamiyo-two", "Kamiyo, into the four tables, 2 processes", servers=2))
    return chosen
