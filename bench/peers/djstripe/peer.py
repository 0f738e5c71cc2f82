"""dj-stripe: four gunicorn processes, each one request at a time; the Stripe API is a stub that answers at once."""

import contextlib
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from bench import install
from bench.lab import Connection, Lab
from bench.peers.base import ROOT, Counts, Peer
from bench.peers.djstripe import ENDPOINT
from bench.processes import Command, free_port, server

_HERE = Path(__file__).parent


class DjStripe(Peer):
    """See `settings.py` beside this."""

    name = "djstripe"
    label = "dj-stripe (Django, gunicorn), 4 processes"
    path = f"/stripe/webhook/{ENDPOINT}/"
    kept = ("djstripe_account", "djstripe_apikey", "djstripe_webhookendpoint", "django_migrations")
    _python = Path()
    _api = 0

    def install(self) -> None:
        self._python = install.python_environment("djstripe", _HERE / "requirements.txt")

    def _env(self, lab: Lab) -> dict[str, str]:
        return {
            "BENCH_DATABASE": self.database,
            "BENCH_POSTGRES_PORT": str(lab.port),
            "BENCH_STRIPE_API": f"http://127.0.0.1:{self._api}",
            "PYTHONPATH": str(ROOT),
        }

    async def prepare(self, lab: Lab) -> None:
        async with self.helpers(lab, install.CACHE / "stub.log"):
            await install.run([str(self._python), "-m", "bench.peers.djstripe.setup"], env=self._env(lab))

    @contextlib.asynccontextmanager
    async def helpers(self, lab: Lab, log: Path) -> AsyncIterator[Mapping[str, int]]:
        self._api = free_port()
        words = (sys.executable, "-m", "bench.peers.djstripe.stub", str(self._api))
        async with server(Command(words, {"PYTHONPATH": str(ROOT)}), port=self._api, log=log) as pid:
            yield {"stub": pid}

    def command(self, lab: Lab, port: int) -> Command:
        words = (str(self._python), "-m", "gunicorn", "bench.peers.djstripe.wsgi:application")
        return Command((*words, "--workers", "4", "--bind", f"127.0.0.1:{port}"), self._env(lab))

    async def count(self, db: Connection) -> Counts:
        row = await db.fetchrow(
            "SELECT count(*) AS triggers, count(*) FILTER (WHERE processed) AS processed,"
            " (SELECT count(*) FROM djstripe_event) AS events FROM djstripe_webhookeventtrigger"
        )
        assert row is not None
        return Counts(row["events"], row["processed"])
