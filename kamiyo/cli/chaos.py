"""`kamiyo chaos`: the proof that nothing is lost, doubled or applied backwards, run here and now."""

import importlib
import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from kamiyo.errors import KamiyoError

#: Where the harness is in a checkout. It is not part of what is installed.
_ROOT = Path(__file__).resolve().parents[2]


def chaos(
    seconds: Annotated[float, typer.Option(help="How long the storm lasts.", min=5, max=86_400)] = 60,
    seed: Annotated[
        int | None, typer.Option(help="Decides the storm and the traffic.  [default: a new one, which is printed]")
    ] = None,
    broken: Annotated[
        str | None, typer.Option(help="Run a build with a deliberate fault, which must be caught: see docs/proof.md.")
    ] = None,
    schedule: Annotated[bool, typer.Option("--schedule", help="Only print what would be done, and when.")] = False,
) -> None:
    """Kill, pause and cut off a whole system under load, then judge its tables. Exit status 1 when anything is wrong.

    Starts a PostgreSQL, two servers and two workers of its own; your database and your settings are not touched.
    The last line is `events=N kills=N duplicates=N lost=0 doubled=0 backwards=0 overlapped=0 stuck=0`.
    """
    if not (_ROOT / "bench" / "chaos").is_dir():
        raise KamiyoError(
            "the chaos harness is in the folder bench/ of a checkout of Kamiyo, and this Kamiyo was installed without "
            "it. Clone the repository and run `make chaos` there."
        )
    if str(_ROOT) not in sys.path:
        sys.path.insert(0, str(_ROOT))
    # By name, because an installed Kamiyo has no such module.
    run = importlib.import_module("bench.chaos.run")
    if broken is not None and broken not in run.FAULTS:
        raise typer.BadParameter(f"known faults: {', '.join(run.FAULTS)}", param_hint="--broken")
    chosen = secrets.randbelow(1_000_000) if seed is None else seed
    status = run.main(seconds=seconds, seed=chosen, broken=broken, only_schedule=schedule)
    raise typer.Exit(status)
