"""One trace from the request to the settled event, through two processes, to a real OTLP receiver."""

import contextlib
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from kamiyo import tracing
from kamiyo.database import Connection
from kamiyo.doctor import Verdict, channels
from kamiyo.errors import SettingsError
from tests.conftest import (
    ADMIN,
    ADMIN_KEY,
    PREFIX,
    SECRET,
    deliver,
    event_json,
    serving,
    settings_for,
    settled,
    signed,
    until,
)
from tests.stories.test_prometheus import process

_HANDLERS = """
from opentelemetry import trace
from kamiyo import on

@on("charge.failed")
async def call_a_friend(event, db):
    with trace.get_tracer("mine").start_as_current_span("telephone"):
        if event.attempt == 1:
            raise LookupError("jenny.rosen@example.com does not answer")
"""


@dataclass(frozen=True)
class Span:
    """A span as it came over the wire."""

    id: str
    parent: str
    trace: str
    name: str
    process: str
    facts: dict[str, Any]
    failed: bool
    links: list[str]
    began: int
    ended: int


@dataclass
class Collector:
    """What an OTLP receiver has been sent."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    raw: bytes = b""

    def take(self, body: bytes) -> None:
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = {item.key: item.value.string_value for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [_span(span, about["service.name"]) for span in scope.spans]


def _span(span: Any, process: str) -> Span:
    facts = {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}
    links = [link.trace_id.hex() for link in span.links]
    return Span(
        *(span.span_id.hex(), span.parent_span_id.hex(), span.trace_id.hex(), span.name, process, facts),
        *(span.status.code == 2, links, span.start_time_unix_nano, span.end_time_unix_nano),
    )


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A receiver of OTLP over HTTP."""
    found = Collector()

    class Door(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            found.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Door) as server:
        found.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


@contextlib.contextmanager
def traced(url: str, folder: Path, endpoint: str, **variables: str) -> Iterator[httpx.AsyncClient]:
    """A server that only receives and a worker of its own, both traced."""
    (folder / "friends.py").write_text(_HANDLERS, encoding="utf-8")
    common = {
        "KAMIYO_TRACES": "true",
        "KAMIYO_TRACE_URL": "https://jaeger/trace/{trace_id}",
        "KAMIYO_HANDLERS": "friends",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "KAMIYO_SHUTDOWN_GRACE": "5",
        **variables,
    }
    worker = common | {"DATABASE_URL": url, "STRIPE_WEBHOOK_SECRET": SECRET, "KAMIYO_FIRST_RETRY_DELAY": "0.01"}
    worker |= {"PYTHONPATH": str(folder), "OTEL_SERVICE_NAME": "worker"}
    command = (sys.executable, "-m", "kamiyo", "worker")
    with (
        serving(url, folder=folder, KAMIYO_WORKER="false", **common) as served,
        process(*command, folder=folder, **worker),
    ):
        yield httpx.AsyncClient(base_url=served.url)


async def test_an_event_is_one_trace_from_the_request_through_a_worker_of_another_process_to_its_end(
    database_url: str, db: Connection, tmp_path: Path, collector: Collector
) -> None:
    body = event_json("evt_traced", "charge.failed", {"id": "ch_1", "object": "charge", "note": "my secret plan"})
    proxy = "0af7651916cd43dd8448eb211c80319c"
    # The last spans have a twentieth of the grace to be handed over: time enough, also for a busy machine.
    with traced(database_url, tmp_path, collector.url, KAMIYO_SHUTDOWN_GRACE="60") as client:
        async with client:
            header = {"traceparent": f"00-{proxy}-b7ad6b7169203331-01"}
            answer = await client.post(f"{PREFIX}/stripe", content=body, headers=signed(body) | header)
            assert answer.status_code == 200
            await settled(db, "evt_traced", "processed")
            await deliver(client, body)
            await deliver(client, event_json("evt_other", "customer.created", {"id": "cus_1", "object": "customer"}))
            detail = (await client.get(f"{PREFIX}/events/evt_traced", headers=ADMIN)).text
            assert "does not answer" in detail  # the ledger has the message, and the trace has not
            await client.post("/dashboard/sign-in", data={"key": ADMIN_KEY, "next": ""})
            page = (await client.get("/dashboard/events/evt_traced")).text
            assert f'href="https://jaeger/trace/{tracing.trace_id_of("evt_traced")}"' in page
    # Both processes have ended, and handed over what they had.

    spans = [span for span in collector.spans if span.trace == tracing.trace_id_of("evt_traced")]
    assert {span.facts["webhook.event.id"] for span in spans if span.name != "telephone"} == {"evt_traced"}
    children: dict[str, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.began):
        children[span.parent].append(span)

    def tree(parent: str) -> list[Any]:
        return [(span.name, span.process, span.failed, tree(span.id)) for span in children[parent]]

    said: list[Any] = [("commit", "kamiyo-webhooks", False, [])]
    first: list[Any] = [
        ("handle", "worker", True, [("telephone", "worker", True, [])]),
        ("settle", "worker", False, []),
    ]
    second: list[Any] = [
        ("handle", "worker", False, [("telephone", "worker", False, [])]),
        ("settle", "worker", False, []),
    ]
    tries = [("process charge.failed", "worker", True, first), ("process charge.failed", "worker", False, second)]
    again: Any = ("receive charge.failed", "kamiyo-webhooks", False, [])
    assert tree("") == [("receive charge.failed", "kamiyo-webhooks", False, [*said, *tries, again])]
    [root] = children[""]
    assert root.links == [proxy]
    assert all(span.began <= span.ended for span in spans)
    [failed] = [span for span in spans if span.name.startswith("process") and span.failed]
    assert (failed.facts["kamiyo.attempt"], failed.facts["error.type"]) == (1, "LookupError")
    for private in (b"my secret plan", SECRET.encode()):
        assert private not in collector.raw
    ours = [span for span in spans if span.name != "telephone"]
    assert not any("jenny" in str(span) for span in ours)

    # One that its billing row was all it needed: settled in the storing commit.
    other = [span.name for span in collector.spans if span.trace == tracing.trace_id_of("evt_other")]
    assert sorted(other) == ["commit", "receive customer.created"]


async def test_a_collector_that_is_away_costs_nothing_but_the_spans_and_that_is_said(
    database_url: str, db: Connection, tmp_path: Path
) -> None:
    [log] = [tmp_path / f"{Path(sys.executable).name}.log"]
    with traced(database_url, tmp_path, "http://127.0.0.1:9", OTEL_EXPORTER_OTLP_TIMEOUT="0.1") as client:
        async with client:
            assert (await deliver(client, event_json("evt_1", "charge.failed"))).status_code == 200
            await settled(db, "evt_1", "processed")

            async def said() -> bool:
                return '"event":"spans_lost"' in log.read_text()

            await until(said)
    text = log.read_text()
    assert '"event":"stopped"' in text and "Traceback" not in text
    assert all(line.startswith('{"timestamp"') for line in text.splitlines())


def test_without_opentelemetry_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(None, KAMIYO_TRACES=True)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"pip install 'kamiyo-webhooks\[otel\]'"):
        tracing.start(settings)


def test_where_traces_are_off_opentelemetrys_machinery_is_not_even_loaded() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import sys, api.main; print([m for m in sys.modules if 'opentelemetry.sdk' in m])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "[]\n"


async def test_the_doctor_asks_the_collector(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await channels.traces(settings_for(None)) == []
    traced = settings_for(None, KAMIYO_TRACES=True)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    [found] = await channels.traces(traced)
    assert found.verdict is Verdict.passed and not collector.spans
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    [found] = await channels.traces(traced)
    assert found.verdict is Verdict.warning and "OTEL_EXPORTER_OTLP_ENDPOINT" in found.mend
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    [found] = await channels.traces(traced)
    assert found.verdict is Verdict.failed and "pip install" in found.seen
