"""What operators do during a storm: the real `kamiyo`, each command a process of its own, and calls with the admin key.

Each is written down with how it ended, because a command may be refused, cut off and broken off, and may say so; it may
not end in a traceback, and it must end.
"""

import asyncio
import contextlib
import json
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx

# After so many seconds an operator presses Ctrl-C: a command whose route was lost waits for as long as TCP believes
# in it.
_ENOUGH_SECONDS = 60.0

#: How long a command may take to end after that.
LETTING_GO_SECONDS = 10.0

_CALL_SECONDS = 20.0

_TRACEBACK = "Traceback (most recent call last)"
_API = "/api/v1/webhooks"


@dataclass(frozen=True, slots=True)
class Ran:
    """A command or a call, and how it ended.

    `status` is the exit status, or that of the answer, None where there was none; `printed` what it wrote to standard
    output, `said` to standard error. `broken_off`: by Ctrl-C, or killed. `at_rest`: nothing went on beside it, so it
    has no excuse.
    """

    words: str
    status: int | None
    printed: str = ""
    said: str = ""
    broken_off: signal.Signals | None = None
    at_rest: bool = False

    @property
    def name(self) -> str:
        """Without its options and ids: `kamiyo events retry`, `POST /events/…/retry`."""
        if self.is_call:
            return re.sub(r"evt_\w+", "…", self.words)
        return " ".join(takewhile(re.compile("[a-z]+").fullmatch, self.words.split()))

    @property
    def is_call(self) -> bool:
        """Whether it went over HTTP."""
        return self.words.startswith(("GET ", "POST "))

    @property
    def ending(self) -> str:
        """How it ended, in a line: the status, and the last that it said."""
        told = (self.said.strip() or self.printed.strip()).rpartition("\n")[2]
        return f"{self.status}{f', {told}' if told else ''}"

    @property
    def wrong(self) -> str | None:
        """What is wrong with how it ended, None: nothing."""
        return self._wrong_answer() if self.is_call else self._wrong_end()

    def _wrong_answer(self) -> str | None:
        # None: the server was killed meanwhile. 404: cleaned up. 409: a worker was quicker.
        return None if self.status in (None, 200, 404, 409, 503) else f"answered {self.status}"

    def _wrong_end(self) -> str | None:
        last = self.said.strip().rpartition("\n")[2]
        if self.status is None:
            return f"does not end {LETTING_GO_SECONDS:g} s after Ctrl-C"
        if _TRACEBACK in self.said and not self._was_at_the_edge():
            return f"a traceback: {last}"
        if self.at_rest and self.status:
            return f"exit status {self.status} at rest: {self.printed.strip() or last or 'nothing'}"
        if self.broken_off is signal.SIGKILL and self.status == -signal.SIGKILL:
            return None
        if self.broken_off is signal.SIGINT and self.status in (130, -signal.SIGINT):
            return None
        if self.status == 1 and ("kamiyo:" in self.said or "rows compared" in self.printed):
            return None
        return f"exit status {self.status}, and it says {last or 'nothing'}" if self.status else None

    def _was_at_the_edge(self) -> bool:
        # Ctrl-C while Python imports what it is to run, or when that has returned: it is Python's to tell, and Python
        # ends of the signal itself. The command, where it has begun, ends with 130.
        return self.broken_off is signal.SIGINT and self.status == -signal.SIGINT


@dataclass
class Operators:
    """Operators at their shells, with the same settings as the servers, whose `ports` they know too."""

    env: Mapping[str, str]
    folder: Path
    ports: Sequence[int]
    admin_key: str
    ran: list[Ran] = field(default_factory=list)

    async def run(self, *words: str, patience: float = 0.0, kills: bool = False, at_rest: bool = False) -> Ran:
        """`kamiyo` with these words, to its end; after `patience` seconds, if that is not 0, broken off by Ctrl-C
        or, with `kills`, by SIGKILL. `at_rest`: the storm is over, and it must succeed."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kamiyo", *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self.folder,
            env=dict(self.env),
            start_new_session=True,
            # A shell that runs the harness in the background has Ctrl-C ignored, and that is inherited.
            preexec_fn=_hear_ctrl_c,
        )
        ending = asyncio.create_task(process.communicate())
        broken_off = None
        try:
            await asyncio.wait([ending], timeout=patience or _ENOUGH_SECONDS)
            if not ending.done():
                broken_off = signal.SIGKILL if kills and patience else signal.SIGINT
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(broken_off)
                await asyncio.wait([ending], timeout=LETTING_GO_SECONDS)
            ended = ending.done()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            printed, said = await ending
        one = Ran(
            " ".join(("kamiyo", *words)),
            process.returncode if ended else None,
            *(printed.decode(errors="replace"), said.decode(errors="replace"), broken_off, at_rest),
        )
        self.ran.append(one)
        if one.wrong:
            (self.folder / f"command{len(self.ran)}.log").write_text(f"{one.words}\n{one.said}", encoding="utf-8")
        return one

    async def call(self, server: int, method: str, path: str, **params: str) -> Any:
        """A call to one of the servers; what it answered, None unless that is a 200."""
        port = self.ports[server % len(self.ports)]
        headers = {"X-Admin-Key": self.admin_key}
        status, answer = None, None
        try:
            async with httpx.AsyncClient(timeout=_CALL_SECONDS, headers=headers, trust_env=False) as client:
                reply = await client.request(method, f"http://127.0.0.1:{port}{_API}{path}", params=params)
            status, answer = reply.status_code, reply.json() if reply.status_code == 200 else None
        except (httpx.HTTPError, AttributeError):
            pass  # the server was killed. AttributeError: see `_ask_much` in storm.py
        self.ran.append(Ran(f"{method} {path}", status))
        return answer


def lines_of(ran: Ran) -> list[dict[str, Any]]:
    """What a command printed with --json: one object a line; none where it was broken off."""
    if ran.status != 0:
        return []
    return [json.loads(line) for line in ran.printed.splitlines()]


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
