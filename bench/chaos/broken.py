"""Builds with a deliberate fault: a check that cannot fail is no check.

Named by KAMIYO_CHAOS_BROKEN and put into a process when it imports the handlers, by replacing parts of the running
Kamiyo. Nothing in `kamiyo/` knows of it.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

from bench.chaos.variables import BROKEN
from kamiyo import inbox, projections, receive, worker
from kamiyo.database import Connection

# How long the forbidden moment lasts in a broken build, in seconds. A real fault's is shorter and is met more rarely;
# what is to be shown is that the judge sees it.
_MOMENT_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault: how it is made, and the count of the last line that says so."""

    make: Callable[[], None]
    caught_as: str


def apply() -> None:
    """Break this process as the environment asks; nothing where it does not."""
    name = os.environ.get(BROKEN)
    if name:
        FAULTS[name].make()


def _acknowledge_before_commit() -> None:
    commit = receive.Receiver._commit

    async def tell_and_commit(self: receive.Receiver, db: Connection, group: Sequence[Any]) -> None:
        for waiting in group:
            receive._tell(waiting, receive.Message.received)
        await asyncio.sleep(_MOMENT_SECONDS)
        await commit(self, db, group)

    _replace(receive.Receiver, "_commit", tell_and_commit)


def _settle_outside_transaction() -> None:
    succeed, run_chunk = inbox.succeed, worker.Worker._run_chunk
    postponed: ContextVar[list[inbox.Settled] | None] = ContextVar("postponed", default=None)

    async def postpone(db: Connection, number: int, settled: Sequence[inbox.Settled]) -> None:
        waiting = postponed.get()
        if waiting is not None:
            waiting += settled

    async def run_and_settle(self: worker.Worker, db: Connection, number: int, chunk: Sequence[Any]) -> int:
        waiting: list[inbox.Settled] = []
        before = postponed.set(waiting)
        try:
            tried = await run_chunk(self, db, number, chunk)
        finally:
            postponed.reset(before)
        # The effects are committed; that they are done is not, yet.
        await asyncio.sleep(_MOMENT_SECONDS)
        if waiting:
            await succeed(db, number, waiting)
        return tried

    _replace(inbox, "succeed", postpone)
    _replace(worker.Worker, "_run_chunk", run_and_settle)


def _order_by_arrival() -> None:
    _change_query("claim", "ORDER BY c.stripe_created, c.seq", "ORDER BY c.seq")
    _replace(projections, "_rank", lambda kind, event, shaped: time.time_ns() // 1000)


def _ignore_lanes() -> None:
    _change_query("hold", "WHERE pg_try_advisory_lock(1800432, lane)", "")


def _forget_the_dead() -> None:
    _change_query("claim", "AND next_try_at <= now()", "AND next_try_at <= now() AND status <> 'processing'")


def _change_query(name: str, old: str, new: str) -> None:
    queries = cast(dict[str, str], inbox._SQL)
    if old not in queries[name]:
        raise RuntimeError(f"the fault no longer fits: {old!r} is not in the query {name}")
    queries[name] = queries[name].replace(old, new)


def _replace(where: object, name: str, value: object) -> None:
    if not hasattr(where, name):
        raise RuntimeError(f"the fault no longer fits: there is no {name}")
    setattr(where, name, value)


#: By the name that `--broken` takes.
FAULTS: dict[str, Fault] = {
    "acknowledges-before-commit": Fault(_acknowledge_before_commit, "lost"),
    "settles-outside-transaction": Fault(_settle_outside_transaction, "doubled"),
    "orders-by-arrival": Fault(_order_by_arrival, "backwards"),
    "ignores-lanes": Fault(_ignore_lanes, "overlapped"),
    "forgets-the-dead": Fault(_forget_the_dead, "stuck"),
}
