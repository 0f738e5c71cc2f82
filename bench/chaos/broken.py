"""Builds with a deliberate fault: a check that cannot fail is no check.

Named by KAMIYO_CHAOS_BROKEN and put into a process when it imports the handlers, by replacing parts of the running
Kamiyo. Nothing in `kamiyo/` knows of it.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from bench.chaos.variables import BROKEN
from kamiyo import event, inbox, projections, receive, turn
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
            waiting.tell(receive.Message.received)
        await asyncio.sleep(_MOMENT_SECONDS)
        await commit(self, db, group)

    _replace(receive.Receiver, "_commit", tell_and_commit)


def _settle_outside_transaction() -> None:
    succeed, run_chunk = inbox.succeed, turn.Turns._run_chunk
    postponed: ContextVar[list[inbox.Settled] | None] = ContextVar("postponed", default=None)

    async def postpone(db: Connection, number: int, settled: Sequence[inbox.Settled]) -> None:
        waiting = postponed.get()
        if waiting is not None:
            waiting += settled

    async def run_and_settle(self: turn.Turns, db: Connection, number: int, chunk: Sequence[Any]) -> int:
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
    _replace(turn.Turns, "_run_chunk", run_and_settle)


def _order_by_arrival() -> None:
    _change_claims(lambda batch: sorted(batch, key=lambda claimed: claimed.seq))
    _replace(projections, "_rank", lambda kind, event, shaped: time.time_ns() // 1000)


def _ignore_lanes() -> None:
    claim = inbox.claim_since

    async def let_go(db: Connection, *words: Any) -> Any:
        claimed = await claim(db, *words)
        await inbox.unlock(db)
        return claimed

    _replace(inbox, "claim_since", let_go)


def _ignore_twins() -> None:
    async def pair_nobody(self: turn.Turns, db: Connection, trials: Sequence[Any]) -> None:
        return None

    _replace(event.Event, "occurrence", property(lambda self: self.id))
    _replace(turn.Turns, "_pair", pair_nobody)


def _forget_the_dead() -> None:
    _change_claims(lambda batch: [claimed for claimed in batch if not claimed.abandoned])


def _change_claims(change: Callable[[list[inbox.Claimed]], list[inbox.Claimed]]) -> None:
    claim = inbox.claim_since

    async def changed(db: Connection, *words: Any) -> inbox.Taken:
        taken = await claim(db, *words)
        return replace(taken, events=change(taken.events))

    _replace(inbox, "claim_since", changed)


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
    "ignores-twins": Fault(_ignore_twins, "doubled"),
    "forgets-the-dead": Fault(_forget_the_dead, "stuck"),
}
