"""A real Prometheus scrapes a real run, and what it says is what SQL says.

Prometheus is Debian's (`apt-get install prometheus`); where it is not there, these stories are skipped.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.chaos.ground import free_ports
from kamiyo.database import Connection
from tests.conftest import (
    ADMIN_KEY,
    DEADLINE,
    ROOT,
    SECRET,
    deliver,
    event_json,
    serving,
    settled,
    until,
)

PROMETHEUS = shutil.which("prometheus")
pytestmark = pytest.mark.skipif(
    PROMETHEUS is None, reason="no prometheus here: apt-get install prometheus, to hold the metrics against SQL"
)

# In a module of its own, so that server and worker agree on which events need a worker.
_HANDLERS = """
from kamiyo import Bury, on

@on("invoice.paid")
async def paid(event, db):
    pass

@on("charge.refunded")
async def hopeless(event, db):
    raise Bury("never")
"""


@contextlib.contextmanager
def process(*words: str, folder: Path, **variables: str) -> Iterator[None]:
    """A program that runs while the block does; what it says is kept in the folder."""
    name = Path(words[0]).name
    with (folder / f"{name}.log").open("wb") as log:
        running = subprocess.Popen(
            words, cwd=folder, env={**os.environ, **variables}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield
        finally:
            running.send_signal(signal.SIGTERM)
            try:
                running.wait(DEADLINE)
            finally:
                running.kill()
                running.wait()


@pytest.fixture
async def prometheus(database_url: str, tmp_path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """Clients of a server with a worker beside it, and of the Prometheus that scrapes both."""
    (tmp_path / "counted.py").write_text(_HANDLERS, encoding="utf-8")
    # Programs that bind a port themselves cannot be handed a socket.
    worker_port, port = free_ports(2)
    common = {"DATABASE_URL": database_url, "STRIPE_WEBHOOK_SECRET": SECRET, "ADMIN_API_KEY": ADMIN_KEY}
    common |= {"KAMIYO_HANDLERS": "counted", "PYTHONPATH": f"{tmp_path}:{ROOT}", "KAMIYO_LOG_LEVEL": "warning"}
    rules = ROOT / "deploy" / "prometheus" / "kamiyo.rules.yml"
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(
            serving(database_url, folder=tmp_path, KAMIYO_WORKER="false", KAMIYO_HANDLERS="counted")
        )
        worker = (sys.executable, "-m", "kamiyo", "worker", "--metrics-port", str(worker_port))
        stack.enter_context(process(*worker, folder=tmp_path, **common))
        targets = [served.url.removeprefix("http://"), f"127.0.0.1:{worker_port}"]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "kamiyo", "static_configs": [{"targets": targets}]}],
        }
        (tmp_path / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        assert PROMETHEUS
        flags = (f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={tmp_path / 'tsdb'}")
        stack.enter_context(
            process(PROMETHEUS, f"--config.file={tmp_path / 'prometheus.yml'}", *flags, folder=tmp_path)
        )
        async with (
            httpx.AsyncClient(base_url=served.url, timeout=DEADLINE) as server,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE) as asked,
        ):
            yield server, asked


async def ask(prometheus: httpx.AsyncClient, expression: str) -> list[dict[str, Any]]:
    """What Prometheus answers to an instant query: each series with its labels and value. Fails when it refuses it."""
    answer = (await prometheus.get("/api/v1/query", params={"query": expression})).json()
    assert answer["status"] == "success", f"{expression}: {answer}"
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


async def number(prometheus: httpx.AsyncClient, expression: str) -> float | None:
    """The one number an expression comes to, None where there is none."""
    found = await ask(prometheus, expression)
    assert len(found) <= 1, found
    return float(found[0]["value"][1]) if found else None


def guides_expressions() -> list[str]:
    guide = (ROOT / "tests" / "data" / "webhook-integration-guide.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```promql\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    return [line for line in block.splitlines() if line and not line.startswith("#")]


async def test_the_guides_four_expressions_return_what_sql_says(
    prometheus: tuple[httpx.AsyncClient, httpx.AsyncClient], db: Connection
) -> None:
    server, asked = prometheus
    total, duration, failed, rate = guides_expressions()

    # Scraped before the first event, so that what follows is an increase to Prometheus.
    async def both_are_up() -> bool:
        with contextlib.suppress(httpx.TransportError):
            ready = (await asked.get("/-/ready")).status_code == 200
            return ready and await number(asked, 'count(up{job="kamiyo"} == 1)') == 2
        return False

    await until(both_are_up)
    customers = [event_json(event_type="customer.created", obj=customer(n)) for n in range(5)]
    others = ["invoice.paid"] * 3 + ["charge.refunded"] * 2 + ["charge.succeeded"]
    for body in (*customers, *(event_json(event_type=name) for name in others)):
        answer = await deliver(server, body)
        await settled(db, answer.json()["event_id"])
    await deliver(server, customers[0])  # a copy counts nowhere among the outcomes

    async def sql() -> dict[tuple[str, str], int]:
        rows = await db.fetch("SELECT event_type, status, count(*) FROM webhook_events GROUP BY 1, 2")
        assert {row["status"] for row in rows} == {"processed", "failed"}
        known = {"customer.created", "invoice.paid", "charge.refunded"}
        return {(kind if kind in known else "other", status): count for kind, status, count in rows}

    expected = await sql()
    assert sum(expected.values()) == 11 and expected["charge.refunded", "failed"] == 2

    async def counted(expression: str) -> dict[tuple[str, str], int]:
        series = await ask(asked, expression)
        sums: dict[tuple[str, str], int] = {}
        for one in series:
            key = one["metric"]["event_type"], one["metric"]["status"]
            sums[key] = sums.get(key, 0) + int(float(one["value"][1]))
        return sums

    async def all_scraped() -> bool:
        return await counted(total) == expected

    await until(all_scraped)

    assert await counted(failed) == {key: count for key, count in expected.items() if key[1] == "failed"}
    assert await number(asked, rate) == pytest.approx(9 / 11)
    # Both processes had their share: neither counts what the other did.
    assert {one["metric"]["instance"] for one in await ask(asked, total)} == await instances(asked)

    # The duration: every try is in it once, and the rules give the plain name its quantiles.
    tries = await db.fetchval("SELECT sum(greatest(attempts, 1)) FROM webhook_events")
    assert await number(asked, f"sum({duration}_count)") == tries
    # To the microsecond where a worker has measured it; of what is projected on arrival the row has the cost of the
    # commit before, for its own is not over yet.
    for kind in ("invoice.paid", "charge.refunded"):
        seconds = await db.fetchval("SELECT sum(processing_us) / 1e6 FROM webhook_events WHERE event_type = $1", kind)
        said = await number(asked, f'sum({duration}_sum{{event_type="{kind}"}})')
        assert said and said == pytest.approx(float(seconds), abs=1e-5)
    assert 0 < (await number(asked, f"sum({duration}_sum)") or 0) < DEADLINE

    async def all_quantiles() -> bool:
        # Each is a rule of its own, and the rules come one after another.
        found = {one["metric"]["quantile"] for one in await ask(asked, duration) if one["value"][1] != "NaN"}
        return found == {"0.5", "0.95", "0.99"}

    await until(all_quantiles)

    # And the dashboard asks nothing that Prometheus refuses.
    for panel in json.loads((ROOT / "deploy" / "grafana" / "kamiyo.json").read_text(encoding="utf-8"))["panels"]:
        for target in panel["targets"]:
            await ask(asked, target["expr"].replace("$__rate_interval", "1m"))
    assert await number(asked, "max(webhook_dead_events)") == 2


async def instances(prometheus: httpx.AsyncClient) -> set[str]:
    return {one["metric"]["instance"] for one in await ask(prometheus, "up")}


def customer(n: int) -> dict[str, Any]:
    return {"id": f"cus_{n}", "object": "customer", "name": "x"}
