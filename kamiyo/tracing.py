"""OpenTelemetry traces: the life of an event as one trace, whichever processes it goes through.

    receive      a delivery, from its signature to its answer; the root of the trace (further copies are its children)
    └ commit     the group commit that stored it
    └ process    a try, from the claim's batch to its commit
      └ project  the billing rows of the batch
      └ handle   one handler; the current span while it runs, so that spans of the user's own are its children
      └ settle   `processed`, or the failure, and the commit

The ids of trace and root are made from the event's id, so no process has to be told them, nothing is kept with the
event, and whoever knows the event knows the trace (docs/decisions/0023). Attributes are ids, types, counts and reasons.

OpenTelemetry is an extra (`kamiyo-webhooks[otel]`), loaded only where KAMIYO_TRACES is on. A host application's own
tracer provider is used if there is one; otherwise spans go out by OTLP over HTTP, as OpenTelemetry's own variables
(OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME, …) say.
"""

import asyncio
import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from dotenv import dotenv_values

from kamiyo import __version__, telemetry
from kamiyo.errors import SettingsError
from kamiyo.settings import Settings
from kamiyo.telemetry import happened

_NOT_INSTALLED = "KAMIYO_TRACES is on, but OpenTelemetry is not installed: pip install 'kamiyo-webhooks[otel]'"


def trace_id_of(event_id: str) -> str:
    """The id of an event's trace, as trace viewers write it: 32 hexadecimal digits."""
    return _digest(event_id)[:32]


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(["kamiyo", *map(str, parts)]).encode()).hexdigest()


def now() -> int:
    """Nanoseconds since 1970, as spans count time."""
    return time.time_ns()


def start(settings: Settings) -> "Traces | None":
    """What records spans in this process; None where KAMIYO_TRACES is off.

    Raises SettingsError when it is on and OpenTelemetry is not installed.
    """
    if not settings.traces:
        return None
    try:
        api = import_module("opentelemetry.trace")
        sdk = import_module("opentelemetry.sdk.trace")
        otlp = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError:
        raise SettingsError(_NOT_INSTALLED) from None
    provider = api.get_tracer_provider()
    if isinstance(provider, api.ProxyTracerProvider):
        provider = _provider(sdk, otlp)
        # So that what a handler's own libraries record has somewhere to go.
        api.set_tracer_provider(provider)
    return Traces(api, provider)


def collector_answers() -> bool:
    """Whether the collector takes an export without spans within three seconds. Blocks meanwhile.

    Raises SettingsError when OpenTelemetry is not installed.
    """
    try:
        otlp = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        export = import_module("opentelemetry.sdk.trace.export")
    except ImportError:
        raise SettingsError(_NOT_INSTALLED) from None
    _read_variables()
    telemetry.silence("opentelemetry.exporter.otlp")
    try:
        return bool(otlp.OTLPSpanExporter(timeout=3).export([]) is export.SpanExportResult.SUCCESS)
    except Exception:
        return False


def _read_variables() -> None:
    for name, value in dotenv_values(".env").items():
        if name.startswith("OTEL_") and value is not None:
            os.environ.setdefault(name, value)


def _provider(sdk: Any, otlp: Any) -> Any:
    _read_variables()
    resource = import_module("opentelemetry.sdk.resources").Resource.create()
    named = resource.attributes["service.name"]
    about = {"service.version": __version__}
    if named.startswith("unknown_service"):
        about["service.name"] = "kamiyo-webhooks"
    # Left to exit handlers, a collector that is away would hold up the end of the process.
    provider = sdk.TracerProvider(resource=resource.merge(type(resource)(about)), shutdown_on_exit=False)
    export = import_module("opentelemetry.sdk.trace.export")
    telemetry.silence("opentelemetry.exporter.otlp")
    telemetry.silence("opentelemetry.sdk._shared_internal")

    class Exporter(otlp.OTLPSpanExporter):  # type: ignore[misc]  # a class that may not be installed
        def export(self, spans: Sequence[Any]) -> Any:
            try:
                result = super().export(spans)
            except Exception as error:
                happened("spans_lost", count=len(spans), error=type(error).__name__)
                return export.SpanExportResult.FAILURE
            if result is not export.SpanExportResult.SUCCESS:
                happened("spans_lost", count=len(spans), error="the collector did not take them")
            return result

    provider.add_span_processor(export.BatchSpanProcessor(Exporter()))
    return provider


class _Ids:
    """Ids for the next span: those it was told, or random ones."""

    def __init__(self, otherwise: Any) -> None:
        self._otherwise = otherwise
        self.trace: str | None = None
        self.span: str | None = None

    def generate_trace_id(self) -> int:
        trace, self.trace = self.trace, None
        return int(trace, 16) if trace else int(self._otherwise.generate_trace_id())

    def generate_span_id(self) -> int:
        span, self.span = self.span, None
        return int(span, 16) if span else int(self._otherwise.generate_span_id())

    def is_trace_id_random(self) -> bool:
        # Digits of a good hash are as evenly spread as samplers need them.
        return True


class Traces:
    """The spans of one process. Its methods cost some 20 µs a span; where it is None, nothing."""

    def __init__(self, api: Any, provider: Any) -> None:
        self._api = api
        self._provider = provider
        self._tracer = provider.get_tracer("kamiyo", __version__)
        # A context of nothing but the parent: what happens to be current has nothing to do with the event.
        self._nothing = import_module("opentelemetry.context").Context()
        self._read = import_module("opentelemetry.trace.propagation.tracecontext").TraceContextTextMapPropagator()
        self._ids: _Ids | None = None
        if hasattr(self._tracer, "id_generator"):
            # A tracer of our own, so nobody else's spans get these ids.
            otherwise = self._tracer.id_generator
            self._ids = self._tracer.id_generator = _Ids(getattr(otherwise, "_otherwise", otherwise))

    # ── A delivery ──────────────────────────────────────────────────────────────────────────────────────────────

    def received(
        self, event_id: str, event_type: str, *, began: int, said: str, copy: bool, error: bool, caller: str | None
    ) -> None:
        """A delivery was answered: `said` is what the sender was told. `caller` is its `traceparent`, if it has one."""
        if not self._sampled(event_id, event_type):
            return
        attributes = {**_about(event_id, event_type), "kamiyo.answer": said, "kamiyo.copy": copy}
        kind = self._api.SpanKind.SERVER
        links = self._links(caller)
        name = f"receive {telemetry.label(event_type)}"
        if copy or error:
            span = self._begin(event_id, name, began, attributes, kind=kind, links=links)
        else:
            span = self._begin_root(event_id, name, began, attributes, kind=kind, links=links)
        if error:
            span.set_status(self._api.StatusCode.ERROR, said)
        span.end()

    def committed(self, event_id: str, event_type: str, *, began: int, ended: int, group: int, processed: bool) -> None:
        """A new event was stored by a commit that it shared with a `group` of deliveries."""
        if self._sampled(event_id, event_type):
            about = _about(event_id, event_type) | {"kamiyo.group": group, "kamiyo.processed": processed}
            self._begin(event_id, "commit", began, about).end(ended)

    # ── A try ───────────────────────────────────────────────────────────────────────────────────────────────────

    def trying(self, event_id: str, event_type: str, claim: int, attempt: int) -> "Try | None":
        """A try begins; None when the event's trace is not sampled."""
        return Try(self, event_id, event_type, claim, attempt) if self._sampled(event_id, event_type) else None

    # ── The end ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def flush(self, seconds: float) -> None:
        """Hand over what is recorded, within `seconds`; what a collector that is away did not take by then is lost."""
        if not hasattr(self._provider, "force_flush"):
            return
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def work() -> None:
            with contextlib.suppress(Exception):
                self._provider.force_flush(int(seconds * 1000))
            # The loop is gone where this took too long.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(done.set)

        # A daemon, because whoever waits for threads at the end of a process would wait for the collector.
        threading.Thread(target=work, name="kamiyo traces", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await done.wait()

    # ── Spans ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _sampled(self, event_id: str, event_type: str) -> bool:
        sampler = getattr(self._tracer, "sampler", None)
        if sampler is None:
            return True
        name = f"receive {telemetry.label(event_type)}"
        decided = sampler.should_sample(None, int(trace_id_of(event_id), 16), name, self._api.SpanKind.SERVER)
        return bool(decided.decision.is_sampled())

    def _begin_root(self, event_id: str, name: str, began: int, attributes: dict[str, Any], **more: Any) -> Any:
        if self._ids is None:
            return self._begin(event_id, name, began, attributes, **more)
        digest = _digest(event_id)
        self._ids.trace, self._ids.span = digest[:32], digest[32:48]
        return self._tracer.start_span(
            name, context=self._within(None), attributes=attributes, start_time=began, **more
        )

    def _begin(
        self,
        event_id: str,
        name: str,
        began: int,
        attributes: dict[str, Any],
        *,
        parent: str | None = None,
        span_id: str | None = None,
        **more: Any,
    ) -> Any:
        digest = _digest(event_id)
        if self._ids is not None:
            self._ids.span = span_id
        context = self._within(self._span_context(digest[:32], parent or digest[32:48]))
        return self._tracer.start_span(name, context=context, attributes=attributes, start_time=began, **more)

    def _within(self, parent: Any) -> Any:
        span = self._api.INVALID_SPAN if parent is None else self._api.NonRecordingSpan(parent)
        return self._api.set_span_in_context(span, self._nothing)

    def _span_context(self, trace_id: str, span_id: str) -> Any:
        flags = self._api.TraceFlags(self._api.TraceFlags.SAMPLED)
        return self._api.SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=flags)

    def _links(self, caller: str | None) -> list[Any]:
        # The trace of whoever handed the request on: the host application's, or a proxy's.
        here = self._api.get_current_span().get_span_context()
        if not here.is_valid and caller:
            context = self._read.extract({"traceparent": caller}, self._nothing)
            here = self._api.get_current_span(context).get_span_context()
        return [self._api.Link(here)] if here.is_valid else []


class Try:
    """The spans of one try of one event."""

    def __init__(self, traces: Traces, event_id: str, event_type: str, claim: int, attempt: int) -> None:
        self._traces = traces
        self._event_id, self._event_type = event_id, event_type
        self._about = {**_about(event_id, event_type), "kamiyo.attempt": attempt, "kamiyo.claim": claim}
        # Spans within it may be on their way before it ends, so its id must be known from the beginning.
        self._id = _digest(event_id, claim, attempt)[:16]
        self._began = now()
        self._settling: int | None = None

    def projected(self) -> None:
        """The billing rows of its batch are written."""
        self._within("project", self._began).end()

    @contextlib.contextmanager
    def handling(self, handler: str) -> Iterator[None]:
        """The current span while a handler runs."""
        span = self._within("handle", now(), {"kamiyo.handler": handler})
        try:
            with self._traces._api.use_span(span, record_exception=False, set_status_on_exception=False):
                yield
        except BaseException as error:
            # Never the message: it may quote the customer.
            span.set_attribute("error.type", type(error).__qualname__)
            span.set_status(self._traces._api.StatusCode.ERROR, type(error).__qualname__)
            raise
        finally:
            span.end()

    def settling(self) -> None:
        """What is left is to settle it."""
        self._settling = now()

    def ended(self, outcome: str, error: str | None = None, fingerprint: str | None = None) -> None:
        """It is committed: `outcome` is what it came to, `error` the type of what went wrong."""
        if self._settling is not None:
            self._within("settle", self._settling).end()
        about = self._about | {"kamiyo.outcome": outcome}
        if error is not None:
            about |= {"error.type": error, "kamiyo.fingerprint": fingerprint}
        name = f"process {telemetry.label(self._event_type)}"
        kind = self._traces._api.SpanKind.CONSUMER
        span = self._traces._begin(self._event_id, name, self._began, about, span_id=self._id, kind=kind)
        if error is not None:
            span.set_status(self._traces._api.StatusCode.ERROR, error)
        span.end()

    def _within(self, name: str, began: int, more: dict[str, Any] | None = None) -> Any:
        about = _about(self._event_id, self._event_type) | (more or {})
        return self._traces._begin(self._event_id, name, began, about, parent=self._id)


def _about(event_id: str, event_type: str) -> dict[str, Any]:
    return {"webhook.event.id": event_id, "webhook.event.type": event_type}
