"""A cut of the storm: `make chaos` is the long one."""

import re
import subprocess
import sys

from tests.conftest import ROOT


def test_after_a_storm_nothing_is_lost_doubled_backwards_overlapped_or_stuck() -> None:
    storm = subprocess.run(
        [sys.executable, "-m", "bench.chaos", "--seconds", "8", "--seed", "7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    last = storm.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"events=\d+ kills=\d+ duplicates=\d+ lost=0 doubled=0 backwards=0 overlapped=0 stuck=0", last)
    assert int(last.split("kills=")[1].split()[0]) > 0, "it killed something"
    assert storm.returncode == 0, storm.stdout + storm.stderr
