"""The one PostgreSQL all peers share: a database for each, and what can be read off the server itself."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import asyncpg

from bench.processes import free_port
from kamiyo.postgres import EmbeddedPostgres, temporary_postgres

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@dataclass(frozen=True, slots=True)
class Reading:
    """The server's counters at one moment: bytes of WAL ever written, a database's commits and bytes on disk."""

    wal: int
    commits: int
    disk: int


@dataclass
class Lab:
    """The server while the benchmark runs. Durability is PostgreSQL's default: fsync, synchronous commit."""

    server: EmbeddedPostgres
    port: int

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        pid = self.server.pid
        assert pid is not None
        return pid

    def url(self, database: str) -> str:
        """The address over TCP, as every peer uses it."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    @contextlib.asynccontextmanager
    async def connected(self, database: str) -> AsyncIterator[Connection]:
        """A connection of the benchmark's own."""
        db = await asyncpg.connect(self.url(database))
        try:
            yield db
        finally:
            await db.close()

    async def season(self) -> None:
        """Give the server its segments of WAL, as one has that was up for a day: it uses them again. To make a new one,
        16 MB of zeros, takes tens of milliseconds, in which nobody commits."""
        async with self.connected("postgres") as db:
            await db.execute(
                "SELECT pg_logical_emit_message(false, 'season', repeat('x', 1 << 20)) FROM generate_series(1, 1024)"
            )
            await db.execute("CHECKPOINT")

    async def create(self, database: str) -> None:
        """Make an empty database, in place of one left by an earlier try."""
        async with self.connected("postgres") as db:
            await db.execute(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')
            await db.execute(f'CREATE DATABASE "{database}"')

    async def settings(self) -> dict[str, str]:
        """Version and settings that decide what a commit costs."""
        names = ["server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_compression"]
        names += ["shared_buffers", "max_wal_size", "min_wal_size", "data_checksums", "autovacuum"]
        async with self.connected("postgres") as db:
            return {name: await db.fetchval(f"SHOW {name}") for name in names}

    async def empty(self, db: Connection, schemas: Collection[str], kept: Collection[str]) -> None:
        """Empty every table of `schemas` but the `kept` ones."""
        rows = await db.fetch(
            "SELECT quote_ident(schemaname) || '.' || quote_ident(tablename) AS name FROM pg_tables "
            "WHERE schemaname = ANY ($1) AND tablename <> ALL ($2)",
            list(schemas),
            list(kept),
        )
        if rows:
            await db.execute(f"TRUNCATE {', '.join(row['name'] for row in rows)} RESTART IDENTITY")

    async def read(self, db: Connection) -> Reading:
        """The counters now. Commits that sessions have not reported yet are waited for (they do once a second)."""
        commits = await self._commits(db)
        while True:
            await asyncio.sleep(1.1)
            later = await self._commits(db)
            if later - commits <= 5:
                break
            commits = later
        row = await db.fetchrow(
            "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint, pg_database_size(current_database())"
        )
        assert row is not None
        return Reading(int(row[0]), later, int(row[1]))

    async def _commits(self, db: Connection) -> int:
        await db.execute("SELECT pg_stat_clear_snapshot()")
        return int(await db.fetchval("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"))


@contextlib.contextmanager
def laboratory(settings: Mapping[str, str] | None = None) -> Iterator[Lab]:
    """Start the server, with these settings over the embedded one's, in a temporary folder, removed at the end."""
    port = free_port()
    ours = {"listen_addresses": "127.0.0.1", "port": str(port)}
    with temporary_postgres({**(settings or {}), **ours}) as server:
        lab = Lab(server, port)
        asyncio.run(lab.season())
        yield lab
