"""When a handler blocks the event loop for good, the process ends, so that its events run elsewhere.

A handler that awaits too long is cut off by its time limit. One that *computes* or blocks (`time.sleep`, a driver that
is not async) cannot be: nothing else in the process runs, the limit included. A thread sees it, says where it hangs,
and ends the process; whoever supervises it (systemd, Kubernetes) starts it again, and the event has used up a try.
"""

import asyncio
import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import AsyncIterator

from kamiyo.telemetry import happened

#: Exit status of a process that the watchdog ended (EX_SOFTWARE of sysexits.h).
EXIT_STATUS = 70


@contextlib.asynccontextmanager
async def watching(limit: float) -> AsyncIterator[None]:
    """End the process with EXIT_STATUS when the event loop stands still for `limit` seconds while the block runs."""
    beat = time.monotonic()
    over = threading.Event()

    async def pulse() -> None:
        nonlocal beat
        while True:
            beat = time.monotonic()
            await asyncio.sleep(limit / 10)

    def watch() -> None:
        checked = time.monotonic()
        while not over.wait(limit / 10):
            now = time.monotonic()
            # A process that was stopped as a whole (SIGSTOP, a suspended machine) missed its own checks as well, and
            # gets the time to catch up.
            paused, checked = now - checked > limit / 2, now
            if not paused and now - beat > limit:
                try:
                    happened("event_loop_stuck", seconds=round(now - beat, 1))
                    faulthandler.dump_traceback(sys.stderr)
                finally:
                    # Also where standard error is no file that the place could be written to: a host's own stream.
                    os._exit(EXIT_STATUS)

    task = asyncio.create_task(pulse())
    thread = threading.Thread(target=watch, name="kamiyo watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        task.cancel()
