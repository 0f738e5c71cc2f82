"""`python -m bench.chaos --seconds 60 --seed 7`; the same as `kamiyo chaos`, and what the Makefile calls."""

import argparse
import secrets
import sys

from bench.chaos.broken import FAULTS
from bench.chaos.run import main


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long the storm lasts")
    parser.add_argument("--seed", type=int, help="decides storm and traffic (default: a new one, which is printed)")
    parser.add_argument("--broken", choices=FAULTS, help="run a build with this deliberate fault")
    parser.add_argument("--must-be-caught", action="store_true", help="exit status 0 if the broken build is caught")
    parser.add_argument("--list-broken", action="store_true", help="print the names of the faults")
    parser.add_argument("--keep", action="store_true", help="keep the processes' logs, whatever the verdict")
    parser.add_argument("--schedule", action="store_true", help="only print what would be done, and when")
    given = parser.parse_args()
    if given.list_broken:
        print("\n".join(FAULTS))
        return 0
    return main(
        seconds=given.seconds,
        seed=secrets.randbelow(1_000_000) if given.seed is None else given.seed,
        broken=given.broken,
        must_be_caught=given.must_be_caught,
        only_schedule=given.schedule,
        keep=given.keep,
    )


if __name__ == "__main__":
    sys.exit(_main())
