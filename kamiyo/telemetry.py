"""The only place that words log lines and counts metrics.

Code says what happened: `happened("event_died", event_id=…, attempt=5)`. This file decides how loud it is and how the
line reads. A name that is not in `_LEVELS` is an error, so the table below is the list of everything that is ever
logged. No fact may hold a secret, a payload or a customer's data: ids, types, counts, durations and reasons only.

What happens to an event is a line of its own, with the event's id; a whole group of them is written at once
(`happened_to_each`), because at ten thousand events a second the lines must not cost more than the events.

Metrics follow Prometheus: each process counts its own, and several processes behind one address share a directory
(`PROMETHEUS_MULTIPROC_DIR`, made by itself for the workers of one server), so that a scrape adds them up.
"""

import contextlib
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import structlog

# Must be set before prometheus_client is imported: it decides then where values live. Processes started by one
# parent (uvicorn --workers) share the parent's directory; a single process needs none.
if multiprocessing.parent_process() is not None and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    _shared = Path(tempfile.gettempdir()) / f"kamiyo-metrics-{os.getppid()}"
    _shared.mkdir(mode=0o700, exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(_shared)

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

#: Types that have a label of their own; any other counts as `other`, so that a sender cannot mint labels.
KNOWN_TYPES = frozenset(
    {
        *("customer.created", "customer.updated", "customer.deleted"),
        *("customer.subscription.created", "customer.subscription.updated", "customer.subscription.deleted"),
        *(
            "invoice.payment_succeeded",
            "invoice.payment_failed",
            "payment_method.attached",
            "payment_method.detached",
        ),
    }
)
_labelled: set[str] = set(KNOWN_TYPES)

EVENTS = Counter("webhook_events_total", "Events by outcome.", ["event_type", "status"])
DURATION = Histogram(
    "webhook_processing_duration_seconds",
    "Time to process one event: projection, handlers, settling.",
    ["event_type"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
RECEIVED = Counter("webhook_received_total", "New events committed.", ["event_type"])
DUPLICATES = Counter("webhook_duplicates_total", "Deliveries of events already stored.")
REJECTED = Counter("webhook_rejected_total", "Deliveries refused, by reason.", ["reason"])
RETRIES = Counter("webhook_retries_total", "Failed tries that will be tried again.", ["event_type"])
DEAD = Counter("webhook_dead_total", "Events given up after their last try.", ["event_type"])
WORKER_ERRORS = Counter(
    "webhook_worker_errors_total", "Errors nobody thought of, which a worker went on after, by what it did.", ["part"]
)
COMMIT = Histogram(
    "webhook_commit_duration_seconds",
    "Time of one group commit.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5),
)
BATCH = Histogram(
    "webhook_commit_batch_size", "Events in one group commit.", buckets=(1, 2, 5, 10, 25, 50, 100, 250, 500)
)

_DEBUG, _INFO, _WARNING, _ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR

#: Everything that is ever logged, and how loud.
_LEVELS: dict[str, int] = {
    # doors
    "started": _INFO,
    "start_refused": _ERROR,
    "setting_doubtful": _WARNING,
    "stopping": _INFO,
    "stopped": _INFO,
    # receiving
    "event_received": _INFO,
    "duplicate_received": _INFO,
    "delivery_rejected": _WARNING,
    "receiver_failed": _ERROR,
    "delivery_unavailable": _ERROR,
    "client_left": _DEBUG,
    # a twin endpoint on another API version
    "shadow_received": _INFO,
    "shadow_refused": _WARNING,
    # processing
    "event_processed": _INFO,
    "try_failed": _WARNING,
    "event_died": _ERROR,
    "worker_death_found": _ERROR,
    "batch_taken_apart": _INFO,
    "claim_lost": _WARNING,
    "order_undecided": _WARNING,
    "worker_turn_failed": _ERROR,
    "worker_failed": _ERROR,
    "claim_given_back": _INFO,
    "silent_sessions_ended": _WARNING,
    "event_loop_stuck": _ERROR,
    # database
    "database_away": _ERROR,
    "database_back": _INFO,
    "migrated": _INFO,
    "maintenance_failed": _WARNING,
    # asking Stripe
    "reconciling": _INFO,
    "reconciled": _INFO,
    "reconcile_refused": _INFO,
    "reconcile_failed": _WARNING,
    "objects_read": _INFO,
    "object_gone": _WARNING,
    "reads_wait": _WARNING,
    "read_refused": _ERROR,
    "tie_settled": _INFO,
    "reader_failed": _ERROR,
    "backfilled": _INFO,
    "row_refused": _WARNING,
    "object_unreadable": _WARNING,
    "audited": _INFO,
    # telling people
    "alert_told": _INFO,
    "alerts_failed": _ERROR,
    "alert_failed": _WARNING,
    "alert_channel_unusable": _ERROR,
    # traces
    "spans_lost": _WARNING,
    # by hand
    "admin_refused": _WARNING,
    "events_retried": _INFO,
    "events_pruned": _INFO,
}


def configure_logging(*, level: str = "info", log_format: str = "auto") -> None:
    """Say how loud this process logs (`debug` … `error`), and whether as `json` lines or for the `console`.

    Only Kamiyo's own logger is set up: a host application's structlog and logging stay as they are.
    """
    global _loudness, _words
    # The stream of this moment: who puts another in its place means it for what is set up from then on.
    stream = sys.stderr
    console = stream.isatty() if log_format == "auto" else log_format == "console"
    _loudness = logging.getLevelNamesMapping()[level.upper()]
    words = _for_reading(stream.isatty()) if console else _as_json

    def write(level: int, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        # A full disk or a closed pipe behind standard error must not cost an event.
        with contextlib.suppress(OSError, ValueError):
            stream.write(words(logging.getLevelName(level).lower(), name, lines))
            stream.flush()

    _words = write


_Words = Callable[[str, str, Iterable[Mapping[str, Any]]], str]


def _for_reading(colors: bool) -> _Words:
    render = structlog.dev.ConsoleRenderer(colors=colors)

    def words(level: str, name: str, lines: Iterable[Mapping[str, Any]]) -> str:
        told = ({"event": name, "level": level, "timestamp": _now(), **facts} for facts in lines)
        return "".join(f"{render(None, level, line)}\n" for line in told)

    return words


def _as_json(level: str, name: str, lines: Iterable[Mapping[str, Any]]) -> str:
    # The head is the same for all, and made once; the tail is encoded line by line, at about a microsecond each.
    head = f'{{"timestamp":"{_now()}","level":"{level}","event":"{name}"'
    return "".join(f"{head},{_encode(facts).decode()[1:]}\n" if facts else f"{head}}}\n" for facts in lines)


_encode = msgspec.json.Encoder(enc_hook=str).encode


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


_loudness = logging.INFO
_words: Callable[[int, str, Iterable[Mapping[str, Any]]], None]
configure_logging()


def happened(name: str, /, **facts: Any) -> None:
    """Log that something happened. Raises KeyError for a name that is not in the table above."""
    level = _LEVELS[name]
    if level >= _loudness:
        _words(level, name, (facts,))


def happened_to_each(name: str, /, each: Iterable[Mapping[str, Any]]) -> None:
    """Log that it happened to each of these, a line for each with its facts, all written at once.

    `each` is not looked at where the log is not that loud. Raises KeyError for a name that is not in the table above.
    """
    level = _LEVELS[name]
    if level >= _loudness:
        _words(level, name, each)


def place_of(error: BaseException) -> str:
    """Where an error nobody thought of came through this package last: file and line, and nothing of what it says."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_HERE)]
    return f"{Path(ours[-1].filename).relative_to(_HERE)}:{ours[-1].lineno}" if ours else ""


_HERE = Path(__file__).parent


def silence(logger: str) -> None:
    """Keep a library's own log lines out of the log: what they say is said here, without addresses and headers."""
    found = logging.getLogger(logger)
    found.addHandler(logging.NullHandler())
    found.propagate = False


def label_types(types: Iterable[str]) -> None:
    """Give these event types labels of their own in the metrics: those that handlers are registered for."""
    _labelled.update(name.removeprefix("v1.") for name in types)


def label(event_type: str) -> str:
    """The bounded `event_type` label. A thin event has its own where its snapshot has."""
    return event_type if event_type.removeprefix("v1.") in _labelled else "other"


class QueueGauges(Collector):
    """What only the database knows, as gauges: the same from every process, so take max(), not sum().

    `numbers` is replaced by the worker's maintenance turn and by each scrape that can reach the database.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}

    def collect(self) -> Iterable[Metric]:
        """The latest numbers."""
        for name, (key, text) in _GAUGES.items():
            if key in self.numbers:
                yield GaugeMetricFamily(name, text, value=self.numbers[key])


_GAUGES = {
    "webhook_backlog_events": ("backlog", "Events waiting or in work."),
    "webhook_oldest_due_seconds": ("oldest_due_seconds", "How long the oldest due event has waited."),
    "webhook_dead_events": ("dead", "Events that are dead: each needs a person."),
    "webhook_waiting_reads": ("waiting_reads", "Events that wait until their object is read from Stripe."),
    "webhook_oldest_unread_seconds": ("oldest_unread_seconds", "How long the oldest of them has waited for that."),
    "webhook_stripe_circuit_open": ("circuit_open", "1 while Stripe does not answer, and everybody who asks it waits."),
    "webhook_missed_events": ("missed", "Events Stripe had and we did not, in the last comparison with its lists."),
    "webhook_database_up": ("database_up", "1 while the database answers."),
}

QUEUE = QueueGauges()
REGISTRY.register(QUEUE)


def exposition() -> tuple[bytes, str]:
    """The page Prometheus scrapes, and its content type; over all processes of this server."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # untyped in the library
        registry.register(QUEUE)
        return generate_latest(registry), CONTENT_TYPE_LATEST
    return generate_latest(REGISTRY), CONTENT_TYPE_LATEST


def shared_metrics_directory() -> Path:
    """Make and announce the directory that several processes of one server share; the caller removes it."""
    directory = Path(tempfile.mkdtemp(prefix="kamiyo-metrics-"))
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    return directory


def remove_shared_metrics(directory: Path) -> None:
    """Remove what `shared_metrics_directory` made."""
    shutil.rmtree(directory, ignore_errors=True)
