"""The processes: started, killed, paused, and started again when they died, as systemd or Kubernetes would."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: How long a supervisor waits before it starts a process again, in seconds.
_RESTART_SECONDS = 0.1
#: A process that ends by itself this soon after its start is waited for a little longer.
_TOO_SOON_SECONDS = 0.5


@dataclass(eq=False)
class Member:
    """One process and whoever supervises it.

    `violent` counts the ends nobody asked for in order: killed, by the storm, by a poison or by its own watchdog.
    `slowest_stop` is the longest time from a SIGTERM to the end, in seconds.
    """

    name: str
    words: Sequence[str]
    env: Mapping[str, str]
    folder: Path
    output: Path | None = None
    violent: int = 0
    slowest_stop: float = 0.0
    statuses: list[int] = field(default_factory=list)
    _process: asyncio.subprocess.Process | None = None
    _asked_to_stop: bool = False
    _log_is_full: bool = False
    _stays_down: float = 0.0

    @property
    def pid(self) -> int | None:
        """The number of its process, None before its first."""
        return self._process.pid if self._process is not None else None

    @property
    def log(self) -> Path:
        """The file with everything it wrote: `output`, where that was given."""
        return self.output or self.folder / f"{self.name}.log"

    async def live(self) -> None:
        """Run the process, and run it again whenever it ends, until cancelled; then end it for good."""
        try:
            while True:
                began = time.monotonic()
                await self._once()
                pause = _RESTART_SECONDS if time.monotonic() - began > _TOO_SOON_SECONDS else _TOO_SOON_SECONDS
                pause, self._stays_down = max(pause, self._stays_down), 0.0
                await asyncio.sleep(pause)
        finally:
            await self._end()

    async def live_once(self) -> None:
        """Run the process to its end, once; cancelled, end it for good."""
        try:
            await self._once()
        finally:
            await self._end()

    async def _once(self) -> None:
        # /dev/full takes nothing: what a log on a full disk does.
        with (Path("/dev/full") if self._log_is_full else self.log).open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=dict(self.env),
                # Ctrl-C reaches the harness alone, which then ends them in order.
                start_new_session=True,
            )
        self._asked_to_stop = False
        status = await self._process.wait()
        self.statuses.append(status)
        if not (self._asked_to_stop and status == 0):
            self.violent += 1

    async def _end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
            await self._process.wait()

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal; False where there is no process at this moment."""
        if self._process is None or self._process.returncode is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
            return True
        return False

    async def restart(self, grace: float) -> None:
        """SIGTERM, and wait for the end; whoever does not make it in `grace` seconds is killed, as everywhere."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._asked_to_stop = True
        began = time.monotonic()
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                await process.wait()
        except TimeoutError:
            self._asked_to_stop = False
            if process is self._process:
                self.signal(signal.SIGKILL)
        self.slowest_stop = max(self.slowest_stop, time.monotonic() - began)

    async def pause(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after `seconds`."""
        process = self._process
        self.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            if process is self._process:
                self.signal(signal.SIGCONT)

    def kill_for(self, seconds: float) -> None:
        """SIGKILL; it is not started again before `seconds` have passed."""
        self._stays_down = seconds
        self.signal(signal.SIGKILL)

    async def log_to_full_disk(self, seconds: float) -> None:
        """Start the process anew with its log on a full disk; after `seconds`, anew with its own."""
        self._log_is_full = True
        self.signal(signal.SIGKILL)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._log_is_full = False
            self.signal(signal.SIGKILL)


@dataclass(frozen=True)
class Crew:
    """Every process of Kamiyo."""

    apis: Sequence[Member]
    workers: Sequence[Member]

    @property
    def members(self) -> list[Member]:
        """Servers, then workers."""
        return [*self.apis, *self.workers]

    @property
    def violent(self) -> int:
        """How many processes ended without being asked to."""
        return sum(member.violent for member in self.members)


@contextlib.asynccontextmanager
async def working(ports: Sequence[int], workers: int, env: Mapping[str, str], folder: Path) -> AsyncIterator[Crew]:
    """A server on each of `ports` and that many workers, supervised while the block runs."""
    python = (sys.executable, "-m", "kamiyo")
    crew = Crew(
        [
            Member(f"api{number}", (*python, "serve"), {**env, "PORT": str(port), "KAMIYO_WORKER": "false"}, folder)
            for number, port in enumerate(ports)
        ],
        [Member(f"worker{number}", (*python, "worker"), env, folder) for number in range(workers)],
    )
    async with supervised(*crew.members):
        yield crew


@contextlib.asynccontextmanager
async def supervised(*members: Member) -> AsyncIterator[None]:
    """These run, and are started again whenever they end, while the block runs."""
    lives = [asyncio.create_task(member.live()) for member in members]
    try:
        yield
    finally:
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)


def die_with_parent() -> None:
    """End this process when the harness does: one that is killed cannot end its processes; Linux does it then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without what configures Kamiyo or PostgreSQL from outside, and with `variables`."""
    foreign = ("KAMIYO_", "STRIPE_", "DATABASE_URL", "ADMIN_API_KEY", "PG", "PROMETHEUS_", "HOST", "PORT")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**ours, "PYTHONPATH": str(ROOT), **variables}
