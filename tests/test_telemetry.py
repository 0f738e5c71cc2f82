"""What is logged and counted: the names, that labels stay few, that processes add up, that nothing leaks."""

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kamiyo import handlers, telemetry
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import GUIDE_TYPES
from kamiyo.telemetry import KNOWN_TYPES, happened, happened_to_each, label
from tests.conftest import (
    ADMIN,
    ADMIN_KEY,
    PREFIX,
    ROOT,
    SECRET,
    Log,
    deliver,
    event_json,
    noop,
    settled,
    signed,
    until,
)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(autouse=True)
def _labels_as_before() -> Iterator[None]:
    labelled = set(telemetry._labelled)
    yield
    telemetry._labelled.clear()
    telemetry._labelled.update(labelled)


def samples(page: bytes) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def counted(name: str, **labels: str) -> float:
    """The value of one counter of this process, now."""
    return samples(telemetry.exposition()[0]).get((name, tuple(sorted(labels.items()))), 0.0)


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


# ── Log ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_happened_is_one_line_of_json_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging(level="info", log_format="json")
    happened("event_died", event_id="evt_1", attempt=5)
    [line] = logged(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "event_died", "level": "error", "event_id": "evt_1", "attempt": 5}


def test_each_of_many_has_a_line_of_its_own_and_all_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []

    class Counting(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return len(text)

    facts = [{"event_id": f"evt_{n}", "event_type": 'said "ü"\n\u2028'} for n in range(200)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Counting())
        telemetry.configure_logging(level="info", log_format="json")
        happened_to_each("event_received", facts)
        telemetry.configure_logging(level="info", log_format="console")
        happened_to_each("event_received", facts[:2])
    [written, for_reading] = writes
    lines = [json.loads(line) for line in written.split("\n")[:-1]]
    assert [line["event_id"] for line in lines] == [f"evt_{n}" for n in range(200)]
    assert {(line["event"], line["level"], line["event_type"]) for line in lines} == {
        ("event_received", "info", 'said "ü"\n\u2028')
    }
    assert [line.count("event_received") for line in for_reading.splitlines()] == [1, 1]


def test_what_is_not_said_is_not_even_put_together(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging(level="warning", log_format="json")
    happened_to_each("event_received", ({"event_id": str(1 / n)} for n in (0,)))
    assert logged(capsys) == []


def test_a_name_that_is_not_in_the_table_is_an_error() -> None:
    with pytest.raises(KeyError):
        happened("something_else")
    with pytest.raises(KeyError):
        happened_to_each("something_else", [])


async def test_each_event_is_found_in_the_log_by_its_id_from_its_arrival_to_its_end(
    client: httpx.AsyncClient, db: Connection, log: Log
) -> None:
    @handlers.on("charge.failed")
    async def fails_once(event: Event, db: Connection) -> None:
        if event.attempt == 1:
            raise LookupError

    bodies = [event_json(f"evt_log_{n}", "customer.created", {"id": f"cus_{n}", "object": "customer"}) for n in (1, 2)]
    again = event_json("evt_log_3", "charge.failed")
    answers = await asyncio.gather(*(deliver(client, body) for body in (*bodies, bodies[0], again)))
    assert {answer.status_code for answer in answers} == {200}
    await settled(db, "evt_log_3", "processed")
    # The line follows the commit that the row was seen by.
    await until(lambda: _said(log, "evt_log_3", "event_processed"))

    def story(event_id: str) -> list[str]:
        return [line["event"] for line in log() if line.get("event_id") == event_id]

    assert story("evt_log_2") == ["event_received", "event_processed"]
    assert sorted(story("evt_log_1")) == ["duplicate_received", "event_processed", "event_received"]
    assert story("evt_log_3") == ["event_received", "try_failed", "event_processed"]
    [last] = [line for line in log() if line.get("event_id") == "evt_log_3" and line["event"] == "event_processed"]
    assert (last["event_type"], last["attempt"]) == ("charge.failed", 2) and last["took_ms"] > 0


async def _said(log: Log, event_id: str, name: str) -> bool:
    return any(line["event"] == name and line.get("event_id") == event_id for line in log())


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), ValueError("I/O operation on closed file")])
def test_a_log_that_cannot_be_written_stops_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    # `kamiyo serve 2>&1 | head`, a full disk, a terminal that is gone: events must still be received.
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        telemetry.configure_logging()
        happened("event_received", count=1)


def test_the_level_decides_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging(level="warning", log_format="json")
    happened("event_received")
    happened("delivery_rejected")
    happened("event_died")
    assert [line["event"] for line in logged(capsys)] == ["delivery_rejected", "event_died"]


def test_away_from_a_terminal_the_log_is_json_and_the_console_format_is_for_reading(
    capsys: pytest.CaptureFixture[str],
) -> None:
    telemetry.configure_logging(log_format="auto")
    happened("started", worker=True)
    assert logged(capsys)[0]["event"] == "started"
    telemetry.configure_logging(log_format="console")
    happened("started", worker=True)
    said = capsys.readouterr().err
    assert "started" in said and "worker" in said and not said.startswith("{")


def test_a_host_applications_own_logging_stays_as_it_is() -> None:
    said = in_a_process(
        "import logging, structlog\n"
        "before = structlog.get_config()\n"
        "from kamiyo import telemetry\n"
        "telemetry.configure_logging(level='error', log_format='json')\n"
        "assert structlog.get_config() == before and not structlog.is_configured()\n"
        "assert not logging.root.handlers and logging.root.level == logging.WARNING\n"
        "print('as it was')"
    )
    assert said == "as it was\n"


# ── Metrics ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_types_with_a_label_are_the_guides_ten() -> None:
    assert frozenset(GUIDE_TYPES) == KNOWN_TYPES


def test_an_unknown_type_is_other_until_a_handler_is_registered_for_it() -> None:
    assert label("customer.created") == "customer.created"
    assert label("charge.succeeded") == label("x" * 255) == "other"
    telemetry.label_types(["charge.succeeded"])
    assert label("charge.succeeded") == "charge.succeeded"


async def test_a_sender_of_a_thousand_types_makes_one_label(quiet_client: httpx.AsyncClient) -> None:
    before = counted("webhook_received_total", event_type="other")
    for n in range(50):
        assert (await deliver(quiet_client, event_json(event_type=f"made.up.{n}"))).status_code == 200
    page = await quiet_client.get("/metrics")
    assert "made.up" not in page.text
    assert counted("webhook_received_total", event_type="other") == before + 50


async def test_events_total_counts_outcomes_only_so_that_the_guides_success_rate_is_right(
    client: httpx.AsyncClient, db: Connection
) -> None:
    @handlers.on("customer.created")
    async def failing(event: Event, db: Connection) -> None:
        if event.id == bad:
            raise handlers.Bury("never")

    labels = {"event_type": "customer.created"}
    processed = counted("webhook_events_total", status="processed", **labels)
    failed = counted("webhook_events_total", status="failed", **labels)
    dead = counted("webhook_dead_total", **labels)
    timed = counted("webhook_processing_duration_seconds_count", **labels)

    bad = "evt_bad"
    for event_id in ("evt_good_1", "evt_good_2", bad):
        body = event_json(event_id, "customer.created", {"id": f"cus_{event_id}", "object": "customer"})
        await deliver(client, body)
        await deliver(client, body)
        await settled(db, event_id)

    async def all_are_timed() -> bool:
        return counted("webhook_processing_duration_seconds_count", **labels) >= timed + 3

    # The counts follow the commit that makes the row visible, in the same turn of the worker.
    await until(all_are_timed)
    assert (await client.get("/metrics")).status_code == 200
    assert counted("webhook_events_total", status="processed", **labels) == processed + 2
    assert counted("webhook_events_total", status="failed", **labels) == failed + 1
    assert counted("webhook_dead_total", **labels) == dead + 1
    assert counted("webhook_processing_duration_seconds_count", **labels) == timed + 3
    statuses = {
        dict(labels)["status"]
        for (name, labels) in samples(telemetry.exposition()[0])
        if name == "webhook_events_total"
    }
    assert statuses == {"processed", "failed"}


async def test_what_is_counted_beside_outcomes_has_names_of_its_own(quiet_client: httpx.AsyncClient) -> None:
    duplicates = counted("webhook_duplicates_total")
    forged = counted("webhook_rejected_total", reason="signature_no_match")
    handlers.on("customer.created")(noop)
    body = event_json("evt_1", "customer.created")
    for _ in range(3):
        await deliver(quiet_client, body)
    await quiet_client.post(f"{PREFIX}/stripe", content=body, headers=signed(body, "whsec_wrong"))

    page = await quiet_client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    now = samples(page.content)
    assert now["webhook_duplicates_total", ()] == duplicates + 2
    assert now["webhook_rejected_total", (("reason", "signature_no_match"),)] == forged + 1
    assert now["webhook_backlog_events", ()] == 1
    assert now["webhook_oldest_due_seconds", ()] >= 0
    assert now["webhook_dead_events", ()] == 0
    assert now["webhook_database_up", ()] == 1
    assert now["webhook_commit_batch_size_count", ()] >= 1
    names = {name for name, _ in now}
    for name in ("webhook_received_total", "webhook_commit_duration_seconds_count", "webhook_rejected_total"):
        assert name in names


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "signature_missing"),
        ("nonsense", "signature_malformed"),
        ("forged", "signature_no_match"),
        ("old", "signature_too_old"),
        ("early", "signature_too_new"),
    ],
)
async def test_the_log_and_the_metric_say_why_a_delivery_was_refused_and_the_answer_does_not(
    header: str | None, reason: str, quiet_client: httpx.AsyncClient, log: Log
) -> None:
    before = counted("webhook_rejected_total", reason=reason)
    at = {"old": 1_000_000_000.0, "early": 4_000_000_000.0}.get(header or "")
    headers = signed(b"{}", "whsec_wrong" if header == "forged" else SECRET, at)
    if header is None:
        del headers["Stripe-Signature"]
    elif header == "nonsense":
        headers["Stripe-Signature"] = header
    answer = await quiet_client.post(f"{PREFIX}/stripe", content=b"{}", headers=headers)

    assert answer.status_code == 400
    assert answer.json()["detail"] in ("Invalid signature", "Missing Stripe signature header")
    assert counted("webhook_rejected_total", reason=reason) == before + 1
    assert [line["reason"] for line in log() if line["event"] == "delivery_rejected"] == [reason]


# ── Several processes ─────────────────────────────────────────────────────────────────────────────────────


def in_a_process(code: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PROMETHEUS_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout


def test_the_numbers_of_several_processes_add_up(tmp_path: Path) -> None:
    shared = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    count = (
        "from kamiyo import telemetry\n"
        "telemetry.EVENTS.labels('customer.created', 'processed').inc(%d)\n"
        "telemetry.DURATION.labels('customer.created').observe(0.003)\n"
    )
    in_a_process(count % 2, **shared)
    in_a_process(count % 40, **shared)
    page = in_a_process(
        "from kamiyo import telemetry\n"
        "telemetry.QUEUE.numbers = {'backlog': 7.0, 'database_up': 1.0}\n"
        "print(telemetry.exposition()[0].decode())",
        **shared,
    )
    now = samples(page.encode())
    labels = (("event_type", "customer.created"), ("status", "processed"))
    assert now["webhook_events_total", labels] == 42
    assert now["webhook_processing_duration_seconds_count", labels[:1]] == 2
    assert now["webhook_backlog_events", ()] == 7


def test_the_directory_that_processes_share_is_private_and_goes_when_they_go() -> None:
    said = in_a_process(
        "import os, pathlib, stat\n"
        "from kamiyo import telemetry\n"
        "directory = telemetry.shared_metrics_directory()\n"
        "assert os.environ['PROMETHEUS_MULTIPROC_DIR'] == str(directory)\n"
        "assert stat.S_IMODE(directory.stat().st_mode) == 0o700\n"
        "telemetry.remove_shared_metrics(directory)\n"
        "print(directory.exists())"
    )
    assert said == "False\n"


# ── Nothing leaks ─────────────────────────────────────────────────────────────────────────────────────────


async def test_no_secret_and_nothing_of_a_customers_is_logged_or_counted(
    client: httpx.AsyncClient, db: Connection, log: Log
) -> None:
    @handlers.on("customer.updated")
    async def failing(event: Event, db: Connection) -> None:
        raise RuntimeError(f"cannot greet {event.object['email']}")

    private = ("jenny.rosen@example.com", "Jenny Rosen", "+15551234567", "4242424242424242", "my secret plan")
    customer = {
        "id": "cus_1",
        "object": "customer",
        "email": private[0],
        "name": private[1],
        "phone": private[2],
        "metadata": {"card": private[3], "note": private[4]},
    }
    body = event_json("evt_1", "customer.updated", customer)
    await deliver(client, body)
    await settled(db, "evt_1", "failed")
    await until(lambda: _said(log, "evt_1", "try_failed"))
    await client.post(f"{PREFIX}/stripe", content=body, headers=signed(body, "whsec_wrong"))
    await client.post(f"{PREFIX}/stripe", content=body[:-1], headers=signed(body[:-1]))
    await client.get(f"{PREFIX}/events", headers={"X-Admin-Key": "a wrong admin key"})
    await client.get(f"{PREFIX}/events/evt_1", headers=ADMIN)
    metrics = (await client.get("/metrics")).text
    health = (await client.get(f"{PREFIX}/health")).text

    assert {"event_received", "try_failed", "delivery_rejected", "admin_refused"} <= {line["event"] for line in log()}
    said = json.dumps(log(), ensure_ascii=False) + metrics + health
    for what in (*private, SECRET, ADMIN_KEY, "whsec_wrong", "a wrong admin key", "cannot greet"):
        assert what not in said, what
