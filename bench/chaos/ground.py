"""What a run stands on: a folder, a disk that can be filled, a PostgreSQL, ports."""

import asyncio
import contextlib
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import psutil

from bench.chaos import judge
from kamiyo import database
from kamiyo.postgres import EmbeddedPostgres

# PostgreSQL's disk, in memory: its size, of which only what is used is taken.
_DISK_BYTES = 2 << 30

# Below the range that the kernel gives to outgoing connections: a server must get its port back after a restart.
_PORTS = range(20_000, 32_000)


class Folder:
    """A temporary folder for the processes' logs. `keep` keeps it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="kamiyo-chaos-"))
        self._kept = False

    def keep(self) -> None:
        """The logs will be wanted."""
        self._kept = True

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._kept:
            shutil.rmtree(self.path / "disk", ignore_errors=True)
        else:
            shutil.rmtree(self.path, ignore_errors=True)


@contextlib.contextmanager
def own_disk(folder: Path) -> Iterator[Path | None]:
    """A small file system of its own, in memory, where that is allowed (it takes root) and there is room; else None."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = psutil.virtual_memory().available > 2 * _DISK_BYTES and _mount(disk)
    try:
        yield disk if mounted else None
    finally:
        if mounted:
            # Lazily: a process that still has a file open must not keep it.
            subprocess.run(["umount", "--lazy", str(disk)], check=False)


def _mount(disk: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES},mode=0755", "kamiyo-chaos", str(disk)]
    if sys.platform != "linux":
        return False
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@contextlib.asynccontextmanager
async def postgres(folder: Path) -> AsyncIterator[EmbeddedPostgres]:
    """A PostgreSQL in `folder` with Kamiyo's tables and the harness's own, while the block runs."""
    # A small log of changes, so that it fits the small disk; nothing that makes a commit less of a commit.
    server = await asyncio.to_thread(EmbeddedPostgres.start, folder, settings={"max_wal_size": "256MB"}, durable=False)
    try:
        db = await asyncpg.connect(server.url)
        try:
            await database.migrate(db)
            await judge.prepare(db)
        finally:
            await db.close()
        yield server
    finally:
        await asyncio.to_thread(server.stop)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody uses at this moment."""
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, 200):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


async def listening(ports: list[int]) -> None:
    """Wait until a server listens on each of `ports`."""
    async with asyncio.timeout(60):
        for port in ports:
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.05)
