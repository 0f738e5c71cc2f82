"""The hand-written handler: two uvicorn processes, a pool of 20 each."""

from pathlib import Path

from bench import install
from bench.events import SECRET
from bench.lab import Connection, Lab
from bench.peers.base import ROOT, Counts, Peer
from bench.processes import Command


class HandWritten(Peer):
    """See `app.py` beside this."""

    name = "handwritten"
    label = "hand-written handler (FastAPI, SQLAlchemy), 2 processes"
    path = "/webhooks/stripe"
    _python = Path()

    def install(self) -> None:
        self._python = install.python_environment("tools", install.TOOLS)

    def _env(self, lab: Lab) -> dict[str, str]:
        url = lab.url(self.database).replace("postgresql:", "postgresql+asyncpg:")
        return {"DATABASE_URL": url, "STRIPE_WEBHOOK_SECRET": SECRET, "PYTHONPATH": str(ROOT)}

    async def prepare(self, lab: Lab) -> None:
        await install.run([str(self._python), "-m", "bench.peers.handwritten.app"], env=self._env(lab))

    def command(self, lab: Lab, port: int) -> Command:
        words = (str(self._python), "-m", "uvicorn", "bench.peers.handwritten.app:app", "--port", str(port))
        options = ("--workers", "2", "--loop", "uvloop", "--http", "httptools", "--no-access-log")
        return Command((*words, *options), self._env(lab))

    async def count(self, db: Connection) -> Counts:
        row = await db.fetchrow(
            "SELECT count(*) AS stored, count(*) FILTER (WHERE status = 'processed') AS processed,"
            " (SELECT count(*) FROM customers) + (SELECT count(*) FROM subscriptions)"
            " + (SELECT count(*) FROM invoices) + (SELECT count(*) FROM payment_methods) AS rows FROM webhook_events"
        )
        assert row is not None
        wrong = () if row["rows"] == row["processed"] else (f"{row['processed']} events made {row['rows']} rows",)
        return Counts(row["stored"], row["processed"], wrong)
