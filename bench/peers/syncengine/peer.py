"""stripe-sync-engine: one Node process, a pool of 10."""

from pathlib import Path

from bench import install
from bench.events import SECRET
from bench.lab import Connection, Lab
from bench.peers.base import Counts, Peer
from bench.processes import Command

_HERE = Path(__file__).parent
_SERVER = _HERE / "server.cjs"
_COUNT = """
SELECT (SELECT count(*) FROM stripe.customers) + (SELECT count(*) FROM stripe.subscriptions)
    + (SELECT count(*) FROM stripe.invoices) + (SELECT count(*) FROM stripe.payment_methods)
"""


class SyncEngine(Peer):
    """See `server.cjs` beside this."""

    name = "syncengine"
    label = "stripe-sync-engine (objects only, no events)"
    path = "/webhooks"
    schemas = ("stripe",)
    kept = ("migrations",)
    _modules = Path()

    def install(self) -> None:
        self._modules = install.node_environment("syncengine", _HERE)

    def _env(self, lab: Lab, port: int) -> dict[str, str]:
        settings = {"DATABASE_URL": lab.url(self.database), "STRIPE_WEBHOOK_SECRET": SECRET}
        return {**settings, "PORT": str(port), "NODE_PATH": str(self._modules), "NODE_ENV": "production"}

    async def prepare(self, lab: Lab) -> None:
        await install.run(["node", str(_SERVER), "migrate"], env=self._env(lab, 0))

    def command(self, lab: Lab, port: int) -> Command:
        return Command(("node", str(_SERVER)), self._env(lab, port))

    async def count(self, db: Connection) -> Counts:
        # Every event is of an object of its own.
        stored = int(await db.fetchval(_COUNT))
        return Counts(stored, stored)
