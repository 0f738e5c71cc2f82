"""Rows which only PostgreSQL refuses: by a constraint, a column or a trigger that the tables' owner has added.

Here nobody can tell beforehand. What is written together is refused together, so it is written again in halves, until
all is in but what is refused. That is named by ids, SQLSTATE and constraint; never by what it holds.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import asyncpg

from kamiyo.database import Connection, load_queries
from kamiyo.telemetry import happened

_SQL = load_queries("refused.sql")

#: What PostgreSQL says of a row that it does not take.
ROW_REFUSED: tuple[type[asyncpg.PostgresError], ...] = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.WithCheckOptionViolationError,
    asyncpg.PLPGSQLError,
    asyncpg.ProgramLimitExceededError,
)

# Rows that a sentence names; the log names all.
_MOST_NAMED = 10

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that PostgreSQL refuses: whose it is, the event (or what led to the read) that tells it, and why.

    `place` is the table, for one of stripe_objects with the type of the object.
    """

    place: str
    id: str
    account: str
    livemode: bool
    event_id: str
    rank: int
    why: str

    def __str__(self) -> str:
        return f"{self.place} {self.id} by {self.event_id} ({self.why})"

    def tell(self) -> None:
        """Say it in the log."""
        happened("row_refused", table=self.place, object_id=self.id, event_id=self.event_id, reason=self.why)


async def write_apart(
    db: Connection, items: Sequence[_T], write: Callable[[Sequence[_T]], Awaitable[object]]
) -> list[tuple[_T, str]]:
    """`write(items)` in the caller's transaction, in halves where PostgreSQL refuses a row; what is refused, and why.

    Nobody else may be writing to these rows: in halves they are not locked in the order that everybody keeps.
    """
    if not items:
        return []
    try:
        async with db.transaction():
            await write(items)
    except ROW_REFUSED as error:
        if len(items) == 1:
            return [(items[0], _why(error))]
    else:
        return []
    half = len(items) // 2
    return [*await write_apart(db, items[:half], write), *await write_apart(db, items[half:], write)]


def _why(error: asyncpg.PostgresError) -> str:
    # Not its words, which may quote the row.
    named = getattr(error, "constraint_name", None) or getattr(error, "column_name", None)
    return ", ".join(filter(None, (error.sqlstate, named)))


def named(refusals: Sequence[Refusal]) -> str:
    """How many rows, and which: as a part of a sentence."""
    some = "; ".join(str(one) for one in refusals[:_MOST_NAMED])
    rest = len(refusals) - _MOST_NAMED
    return f"{len(refusals)} row{'s' * (len(refusals) != 1)}: {some}" + (
        f"; and {rest} more, see row_refused in the log" if rest > 0 else ""
    )


async def keep_standing(db: Connection) -> None:
    """Remember how every row stands, until the caller's transaction ends."""
    await db.execute(_SQL["forget_standing"])
    await db.execute(_SQL["keep_standing"])


async def latest(db: Connection, refused: Sequence[Refusal]) -> tuple[list[Refusal], list[Refusal]]:
    """The refusals that leave an object without its latest state; and those of them whose row stood, and is older now
    than it was, or gone."""
    highest = {(one.place, one.id, one.account, one.livemode): one for one in sorted(refused, key=lambda one: one.rank)}
    if not highest:
        return [], []
    rows = await db.fetch(_SQL["standing"], *map(list, zip(*highest, strict=True)))
    # Where something newer was taken, nobody misses what was refused.
    left = [(one, row) for one, row in zip(highest.values(), rows, strict=True) if _is_below(row["now"], one.rank)]
    lost = [one for one, row in left if row["before"] is not None and _is_below(row["now"], row["before"])]
    return [one for one, _ in left], lost


def _is_below(rank: int | None, other: int) -> bool:
    return rank is None or rank < other
