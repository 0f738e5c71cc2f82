"""Processes: started, watched, and ended by the one who started them."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

_READY_SECONDS = 60.0
_STOP_SECONDS = 20.0
_LOOK_EVERY_SECONDS = 0.1
_MIB = 1 << 20

#: A machine that uses less than this many cores is quiet.
_QUIET_CORES = 0.15


class DidNotStart(Exception):
    """A server did not listen in time, or ended; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Command:
    """How to start a server: the words, what to add to the environment, the folder to start it in."""

    words: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_in_order() -> None:
    """From here on SIGTERM ends the running task as Ctrl-C does: every server it started is ended first."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without anything that would configure a server from outside the benchmark."""
    ours = ("KAMIYO_", "STRIPE_", "DATABASE_URL", "ADMIN_API_KEY", "PG", "DJANGO_", "PROMETHEUS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | dict(extra)


@contextlib.asynccontextmanager
async def server(command: Command, *, port: int, log: Path) -> AsyncIterator[int]:
    """Run a server until the block ends; yields its process id once it listens on `port`. Raises DidNotStart."""
    process = _spawn(command, log)
    try:
        await _listening(process, port, log)
        yield process.pid
    finally:
        await asyncio.to_thread(_end, process)


async def output(
    words: Sequence[str], *, env: Mapping[str, str] | None = None, folder: Path | None = None
) -> tuple[int, str, str]:
    """Run a program to its end: its exit status and what it said. A task that is cancelled ends it as well."""
    process = await asyncio.create_subprocess_exec(
        *words,
        env=environment(env or {}),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")


def run_in_order(benchmark: Callable[[], Coroutine[object, object, int]]) -> NoReturn:
    """Run a benchmark and exit with its status; Ctrl-C and SIGTERM end every server it started first."""
    try:
        sys.exit(asyncio.run(benchmark()))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)


def _spawn(command: Command, log: Path) -> "subprocess.Popen[bytes]":
    with log.open("ab") as out:
        return subprocess.Popen(
            command.words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=command.folder,
            env=environment(command.env),
            # A session of its own: Ctrl-C reaches the benchmark alone, which then ends its servers in order.
            start_new_session=True,
        )


async def _listening(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise DidNotStart(f"{process.args!r} did not listen:\n{_last_lines(log)}")
        await asyncio.sleep(_LOOK_EVERY_SECONDS)


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _end(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM; whatever of its own processes is still there in the end is killed, one by one."""
    family = tree(process.pid)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    _, alive = psutil.wait_procs([one for one in family if one.pid != process.pid], timeout=2)
    for one in alive:
        with contextlib.suppress(psutil.Error):
            one.kill()
    if process.poll() is None:
        process.kill()
        process.wait()


def tree(pid: int) -> list[psutil.Process]:
    """The process and its descendants, as they are now."""
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


@dataclass(frozen=True, slots=True)
class Usage:
    """What some processes used: `cpu` in cores, the largest resident set of any one, and all proportional sets, MiB."""

    cpu: float
    rss: float
    pss: float


class Meter:
    """Watches trees of processes between `start` and `stop`, which may run in any thread but one after the other."""

    def __init__(self, roots: Mapping[str, int]) -> None:
        self._roots = roots

    async def __aenter__(self) -> "Meter":
        self._families = {name: tree(pid) for name, pid in self._roots.items()}
        self._rss = dict.fromkeys(self._roots, 0.0)
        self._before = {name: cpu_seconds(family) for name, family in self._families.items()}
        self._began, self._busy = time.monotonic(), busy_seconds()
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        took = time.monotonic() - self._began
        self._watching.cancel()
        #: Cores that the whole machine used.
        self.busy = (busy_seconds() - self._busy) / took
        self._look()
        self.usage = {
            name: Usage(
                cpu=(cpu_seconds(tree(pid)) - self._before[name]) / took,
                rss=self._rss[name],
                pss=_pss(tree(pid)),
            )
            for name, pid in self._roots.items()
        }

    async def _watch(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(0.5)

    def _look(self) -> None:
        for name, family in self._families.items():
            for process in family:
                with contextlib.suppress(psutil.Error):
                    self._rss[name] = max(self._rss[name], process.memory_info().rss / _MIB)


def busy_seconds() -> float:
    """Processor time this machine has spent on anything, in core-seconds."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


async def quiet(patience: float) -> None:
    """Wait until the machine does next to nothing, or for `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        before, began = busy_seconds(), time.monotonic()
        await asyncio.sleep(0.5)
        if (busy_seconds() - before) / (time.monotonic() - began) < _QUIET_CORES:
            return


def cpu_seconds(family: Iterable[psutil.Process]) -> float:
    """User and system time of the family, with that of children who have already ended (PostgreSQL's backends)."""
    total = 0.0
    for process in family:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _pss(family: Iterable[psutil.Process]) -> float:
    total = 0.0
    for process in family:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) / 1024
    return total
