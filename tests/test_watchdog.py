"""Stories of the watchdog: a loop that stands still ends its process, wherever that writes its errors."""

import subprocess
import sys

import pytest

from kamiyo.watchdog import EXIT_STATUS
from tests.conftest import DEADLINE, ROOT

_BLOCKED = """
import asyncio, io, sys, time
from kamiyo.watchdog import watching

async def main():
    async with watching(0.2):
        {first}
        time.sleep({seconds})

asyncio.run(main())
"""


@pytest.mark.parametrize("first", ["pass", "sys.stderr = io.StringIO()", "sys.stderr = None"])
def test_a_blocked_loop_ends_the_process_also_where_standard_error_is_no_file(first: str) -> None:
    script = _BLOCKED.format(first=first, seconds=DEADLINE / 4)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=DEADLINE)
    assert done.returncode == EXIT_STATUS
    assert "event_loop_stuck" in done.stderr
    assert ("time.sleep" in done.stderr or "in main" in done.stderr) == (first == "pass")
