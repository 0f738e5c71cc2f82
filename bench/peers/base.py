"""What the benchmark must know of a peer."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.lab import Connection, Lab
from bench.processes import Command

ROOT = Path(__file__).resolve().parents[2]


class PeerUnavailable(Exception):
    """The peer cannot be had on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What a peer's tables hold: events it stored (or objects, where it keeps no events), those it processed.

    `wrong` are sentences about rows that should not be, or are missing; empty when all is well.
    """

    stored: int
    processed: int
    wrong: tuple[str, ...] = ()


class Peer(ABC):
    """One receiver. `name` is its key in the results, `label` its line in the table, `path` where it is sent to."""

    name: str
    label: str
    path: str
    #: False for one that acknowledges and leaves the work for later.
    processes = True
    schemas: tuple[str, ...] = ("public",)
    #: Tables that are not emptied between runs.
    kept: tuple[str, ...] = ()

    @property
    def database(self) -> str:
        """Its database's name."""
        return f"bench_{self.name.replace('-', '_')}"

    def install(self) -> None:  # noqa: B027 - most have nothing to do
        """Fetch what it needs, once. Raises PeerUnavailable."""

    async def prepare(self, lab: Lab) -> None:  # noqa: B027 - some have no tables of their own to make
        """Make its tables, in its empty database."""

    @abstractmethod
    def command(self, lab: Lab, port: int) -> Command:
        """How its server is started."""

    @contextlib.asynccontextmanager
    async def helpers(self, lab: Lab, log: Path) -> AsyncIterator[Mapping[str, int]]:
        """Run what it needs beside it; yields process ids by name."""
        yield {}

    async def refill(self, db: Connection, numbers: range) -> None:  # noqa: B027 - most need no rows
        """Put back the rows it needs after its tables were emptied; events of `numbers` will be sent."""

    @abstractmethod
    async def count(self, db: Connection) -> Counts:
        """Count its tables, and check them."""

    async def waiting(self, db: Connection) -> int:
        """How many events are stored and not processed."""
        counts = await self.count(db)
        return counts.stored - counts.processed

    async def delay(self, db: Connection) -> tuple[float, float] | None:
        """Median and 99th percentile of the milliseconds from commit to processed; None where that is one moment."""
        return None


#: Customers the events belong to.
CUSTOMERS = 500
