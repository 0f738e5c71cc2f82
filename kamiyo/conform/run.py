"""All checks, one after another."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kamiyo.conform import authenticity, connection, content, order, repetition
from kamiyo.conform.check import Check, Outcome, Verdict
from kamiyo.conform.observe import require_views
from kamiyo.conform.target import Target

#: Every check, in the order in which they are made. The first is what the others build on.
CHECKS: tuple[Check, ...] = (
    *authenticity.CHECKS,
    *repetition.CHECKS,
    *order.CHECKS,
    *content.CHECKS,
    *connection.CHECKS,
)


@dataclass(frozen=True, slots=True)
class Result:
    """A check, its verdict, and how many seconds it took."""

    check: Check
    verdict: Verdict
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether the receiver is at fault."""
        return self.verdict.outcome is Outcome.failed


async def run(
    target: Target, checks: Sequence[Check] = CHECKS, *, progress: Callable[[int], None] = lambda done: None
) -> list[Result]:
    """Make `checks` of `target`, one after another; `progress` hears after each how many are done.

    Where the first of all, a plain signed event, is not accepted, the others would mean nothing, and are
    skipped: refusing everything is not the same as refusing forgeries.

    Raises ConformError when a view cannot be used.
    """
    await require_views(target.events, target.objects)
    results: list[Result] = []
    useless = False
    for check in checks:
        began = time.monotonic()
        if useless:
            verdict = Verdict(Outcome.skipped, "a plain signed event is not accepted")
        else:
            verdict = await check.run(target)
        results.append(Result(check, verdict, time.monotonic() - began))
        useless |= check is CHECKS[0] and verdict.outcome is Outcome.failed
        progress(len(results))
    return results
