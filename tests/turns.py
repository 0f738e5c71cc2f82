"""Telling a worker something, letting it take its turns in this process, reading what came of it.

Everything goes through the same functions as in a running system. When a turn is taken is the test's choice.
"""

import json
import random
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg

from kamiyo import database, inbox
from kamiyo.database import Connection
from kamiyo.event import Event, parse
from kamiyo.handlers import Registry
from kamiyo.settings import Settings
from kamiyo.shapes import TABLES
from kamiyo.worker import Worker
from tests.conftest import fresh_id

#: Some second at Stripe, in unix seconds.
NOW = 1_790_000_000

#: Rows of the billing tables by table and id: times as unix seconds, JSON as values.
Tables = dict[tuple[str, str], dict[str, Any]]

_EXAMPLES = Path(__file__).parent / "data" / "stripe"


def example(name: str, /, **changes: Any) -> dict[str, Any]:
    """Stripe's own example of an object, in today's shape, with these changes; a fresh id unless given."""
    found: dict[str, Any] = json.loads((_EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
    return {**found, "id": fresh_id(name), **changes}


def read(body: bytes) -> Event:
    """An event as the receiver reads it."""
    return parse(body, received=time.time())


async def put(db: Connection, *bodies: bytes) -> None:
    """Store events, and leave them to the workers."""
    await inbox.put(db, [read(body) for body in bodies])


async def worker_on(url: str, settings: Settings, registry: Registry | None = None) -> Worker:
    """A worker with these handlers (none), whose turns the test takes on a connection of its own."""
    pool = await database.open_pool(url, size=2, application="test worker", idle_limit=60)
    return Worker(pool, url, settings, registry or Registry(), random.Random(0))


async def work_off(worker: Worker, db: Connection) -> int:
    """Take turns until nothing is due; return how many events they had."""
    done = 0
    while count := await worker.run_once(db):
        done += count
    return done


async def die(url: str, *, running: str | None = None) -> None:
    """Claim everything that is due, begin with `running`, and be gone: what SIGKILL leaves behind."""
    db = await database.connect(url, application="test doomed")
    number, batch = await inbox.claim(db, 100)
    for claimed in batch:
        if claimed.event.id == running:
            await inbox.start(db, number, running, claimed.attempts + 1)
    await db.close()


async def no_lanes_held(db: Connection) -> bool:
    """Whether PostgreSQL has noticed that whoever held a lane is gone."""
    # In this database: one server may serve other stories meanwhile.
    return not await db.fetchval(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )


async def due_now(db: Connection) -> None:
    """Let the time pass until every failed event that will be tried again is due."""
    await db.execute("UPDATE webhook_events SET next_try_at = now() WHERE next_try_at > now()")


async def row_of(db: Connection, event_id: str) -> asyncpg.Record:
    """The event's line in the ledger."""
    row = await db.fetchrow("SELECT * FROM webhook_events WHERE event_id = $1", event_id)
    assert row is not None
    return row


async def statuses(db: Connection) -> dict[str, str]:
    """Where every event stands, by id."""
    return {event_id: status for event_id, status in await db.fetch("SELECT event_id, status FROM webhook_events")}


async def failures_of(db: Connection, event_id: str) -> list[asyncpg.Record]:
    """The failed tries of an event, in order."""
    return await db.fetch("SELECT * FROM webhook_failures WHERE event_id = $1 ORDER BY id", event_id)


async def billing(db: Connection, ids: Sequence[str] | None = None) -> Tables:
    """The four billing tables, or the rows of these ids."""
    found: Tables = {}
    for table in TABLES:
        rows = await db.fetch(
            f"SELECT * FROM billing.{table} WHERE $1::text[] IS NULL OR id = ANY ($1)",  # noqa: S608 - our names
            ids,
        )
        for row in rows:
            found[table, row["id"]] = {name: _plain(name, value) for name, value in row.items()}
            if row["order_evidence"] == "decided":
                found[table, row["id"]]["contested_by"] = None  # what it was once contested by says nothing any more
    return found


def _plain(name: str, value: Any) -> Any:
    if name in ("metadata", "items"):
        return json.loads(value)
    return int(value.timestamp()) if isinstance(value, datetime) else value
