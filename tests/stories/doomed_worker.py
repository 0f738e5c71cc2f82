"""A worker in a process of its own, whose handlers can be its death.

    python -m tests.stories.doomed_worker URL DOOM IDLE_LIMIT

PostgreSQL ends a session of its that sits idle for IDLE_LIMIT seconds, and it waits no longer for an answer.
Every handler leaves an effect in `shop.effects` first. What it does then is DOOM, for events whose object says
`doomed`; all others are handled well:

    none         it returns
    waits        it says `entered ID` on standard output, and waits for a line on standard input
    asks         it says `entered ID`, and asks the database for something that takes for ever
    kills        it ends its own process as the kernel would, with SIGKILL
    projects     the process ends before any handler: the projection itself is what kills
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from kamiyo import database, projections
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Registry
from kamiyo.projections import Row
from kamiyo.settings import Settings
from kamiyo.worker import Worker

registry = Registry()


def doomed(event: Event) -> bool:
    """Whether this event is to be the death of its worker."""
    return bool(event.object.get("doomed"))


@registry.on("invoice.paid")
async def handler(event: Event, db: Connection) -> None:
    """Leave an effect, and meet the doom."""
    await db.execute("INSERT INTO shop.effects (event_id, pid) VALUES ($1, $2)", event.id, os.getpid())
    doom = sys.argv[2]
    if doom == "none" or not doomed(event):
        return
    if doom == "kills":
        os.kill(os.getpid(), signal.SIGKILL)
    say(f"entered {event.id}")
    if doom == "waits":
        await asyncio.to_thread(sys.stdin.readline)
    elif doom == "asks":
        await db.execute("SELECT pg_sleep(3600)")


def say(line: str) -> None:
    """A line for the story to wait for."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _ends_in_projection(row_of: Callable[[Event, datetime], Row | None]) -> Callable[[Event, datetime], Row | None]:
    def deadly(event: Event, received: datetime) -> Row | None:
        if doomed(event):
            os._exit(9)
        return row_of(event, received)

    return deadly


async def main(url: str, doom: str, idle_limit: str) -> None:
    """Work until killed."""
    if doom == "projects":
        setattr(projections, "row_of", _ends_in_projection(projections.row_of))  # noqa: B010 - not a plain assignment
    changes: dict[str, Any] = {"KAMIYO_FIRST_RETRY_DELAY": 0.01, "KAMIYO_WORKER_CONCURRENCY": 1}
    pool = await database.open_pool(url, size=4, application=f"doomed {os.getpid()}", idle_limit=float(idle_limit))
    await Worker(pool, url, Settings(_env_file=None, **changes), registry).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
