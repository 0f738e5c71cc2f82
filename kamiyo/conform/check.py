"""What a check is, and how it comes to a verdict."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

from kamiyo.conform.target import Fault, Target, Unseen
from kamiyo.conform.wire import Unreachable

# A check sends one thing after another, each bounded by the target's timeout: this many in a row are enough.
_MOST_TIMEOUTS = 8


class Outcome(StrEnum):
    """How a check ended."""

    passed = "passed"
    failed = "failed"
    skipped = "skipped"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a check ended, and what was seen."""

    outcome: Outcome
    detail: str


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a receiver must stand. `why` says what goes wrong in one that does not."""

    name: str
    why: str
    judge: Callable[[Target], Awaitable[str]]

    async def run(self, target: Target) -> Verdict:
        """Try it on `target`. Never raises for what the receiver does, and takes a bounded time."""
        longest = target.timeout * _MOST_TIMEOUTS + target.trickle_seconds
        try:
            async with asyncio.timeout(longest):
                return Verdict(Outcome.passed, await self.judge(target))
        except (Fault, Unreachable) as fault:
            return Verdict(Outcome.failed, str(fault))
        except Unseen as unseen:
            return Verdict(Outcome.skipped, str(unseen))
        except TimeoutError:
            return Verdict(Outcome.failed, f"it was not through after {longest:g} s")


def check(name: str, why: str) -> Callable[[Callable[[Target], Awaitable[str]]], Check]:
    """Make a check of a function that returns what it saw, or raises Fault or Unseen."""

    def make(judge: Callable[[Target], Awaitable[str]]) -> Check:
        return Check(name, why, judge)

    return make
