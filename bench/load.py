"""The load: wrk with one thread and keep-alive connections, sending the requests of a file."""

import contextlib
import json
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.processes import output

_SCRIPT = Path(__file__).parent / "wrk.lua"

#: Room for a run's requests; on a machine with less shared memory they go to the disk.
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder made in it is private
_ROOM = 4 << 30


class LoadFailed(Exception):
    """wrk did not run, or ran out of requests."""


class RanDry(LoadFailed):
    """The file held too few requests for the time: make more and run again."""


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk saw: 2xx answers only are `acknowledged`; times in milliseconds; `cpu` its own, in cores."""

    connections: int
    seconds: float
    acknowledged: int
    refused: int
    broken: int
    p50: float
    p90: float
    p99: float
    longest: float
    cpu: float

    @property
    def rate(self) -> float:
        """Acknowledged per second."""
        return self.acknowledged / self.seconds


def available() -> bool:
    """Whether wrk is installed."""
    return shutil.which("wrk") is not None


@contextlib.contextmanager
def request_folder() -> Iterator[Path]:
    """A private folder for files of requests; in memory, so that writing them does not disturb the disk."""
    roomy = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > _ROOM
    with tempfile.TemporaryDirectory(prefix="kamiyo-bench-", dir=_SHARED_MEMORY if roomy else None) as folder:
        yield Path(folder)


async def fire(
    port: int,
    requests: Path,
    *,
    connections: int,
    seconds: float,
    loop: bool = False,
    note: Path | None = None,
) -> Load:
    """Send `requests` over `connections` for `seconds`. Raises RanDry, or LoadFailed.

    A closed loop: each connection sends its next request when the last one is answered.
    """
    words = ["loop"] if loop else []
    if note is not None:
        words += ["note", str(note)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status, out, err = await output(
        [
            *("wrk", "-t", "1", "-c", str(connections), "-d", f"{max(round(seconds), 1)}s", "--timeout", "30s"),
            *("-s", str(_SCRIPT), f"http://127.0.0.1:{port}/", "--", str(requests), *words),
        ]
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = out.strip().splitlines()
    if status or not lines or not lines[-1].startswith("{"):
        raise LoadFailed(f"wrk: {err.strip() or lines[-1:]}")
    told = json.loads(lines[-1])
    if told["dry"]:
        raise RanDry(f"{requests.name} held too few requests")
    took = told["microseconds"] / 1e6
    spent = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return Load(
        connections=connections,
        seconds=took,
        acknowledged=told["requests"] - told["status"],
        refused=told["status"],
        broken=told["connect"] + told["read"] + told["write"] + told["timeout"],
        p50=told["p50"] / 1000,
        p90=told["p90"] / 1000,
        p99=told["p99"] / 1000,
        longest=told["max"] / 1000,
        cpu=spent / took,
    )
