"""Timelines as OpenTelemetry traces, over OTLP/HTTP.

The router has every span of a request, so it alone exports. The event loop puts a timeline into a bounded
queue, and does no more; one thread makes spans of it, the SDK's own thread sends them in batches. A collector
that is slow or away costs traces, never a request.

Needs the optional packages of ``pdserve[otel]``.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING

from ..api.text.timelines import Timeline
from ..messages.timeline import OVERLAPPING, Span
from ..runtime.errors import StartupError
from ..runtime.timing import Timing
from ..runtime.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

_log = logging.getLogger(__name__)

_MAX_WAITING = 1000  # timelines


class TraceExporter:
    """``export`` never waits. ``close`` sends what is left, for a few seconds."""

    def __init__(self, endpoint: str, model_name: str, timing: Timing) -> None:
        """`endpoint` is the whole URL, such as ``http://host:4318/v1/traces``. Raises StartupError."""
        if not endpoint.startswith(("http://", "https://")):
            raise StartupError(
                f"--otlp-traces-endpoint {endpoint}: a URL is expected, such as http://host:4318/v1/traces"
            )
        self._provider = _provider(endpoint, model_name, timing)
        self._timing = timing
        self._tracer = self._provider.get_tracer("pdserve", VERSION)
        self._waiting: queue.Queue[Timeline | None] = queue.Queue(_MAX_WAITING)
        self.num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="trace-export", daemon=True)
        self._thread.start()

    def export(self, timeline: Timeline) -> None:
        try:
            self._waiting.put_nowait(timeline)
        except queue.Full:
            self.num_dropped += 1
            if self.num_dropped == 1:
                _log.warning("traces are dropped: more requests end than the exporter can follow")

    def close(self) -> None:
        try:
            self._waiting.put(None, timeout=self._timing.trace_export_s)
        except queue.Full:
            return
        self._thread.join(self._timing.trace_export_s)
        self._provider.shutdown()

    def _run(self) -> None:
        while (timeline := self._waiting.get()) is not None:
            emit(self._tracer, timeline)


def emit(tracer: Tracer, timeline: Timeline) -> None:
    """One trace: the request, as a child of the client's span if it named one, and a child for each span."""
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers = {"traceparent": timeline.traceparent, "tracestate": timeline.tracestate}
    parent = TraceContextTextMapPropagator().extract({key: value for key, value in headers.items() if value})
    attributes: dict[str, str | int | float] = {
        "gen_ai.request.id": timeline.request_id,
        "gen_ai.usage.prompt_tokens": timeline.num_prompt_tokens,
        "pdserve.cached_tokens": timeline.num_cached_tokens,
        "pdserve.attempts": timeline.num_attempts,
    }
    if timeline.ttft_s is not None:
        attributes["gen_ai.latency.time_to_first_token"] = timeline.ttft_s
        attributes["pdserve.unaccounted_s"] = timeline.unaccounted_s or 0.0
    request = tracer.start_span(
        "request",
        parent,
        kind=trace.SpanKind.SERVER,
        attributes=attributes,
        start_time=_ns(timeline.received_unix_s),
    )
    inside = trace.set_span_in_context(request)
    for span in timeline.spans:
        child = tracer.start_span(
            span.name, inside, attributes=_attributes(span), start_time=_ns(span.start_unix_s)
        )
        child.end(_ns(span.end_unix_s))
    request.end(_ns(timeline.ended_unix_s))


def _attributes(span: Span) -> dict[str, int | bool]:
    attributes: dict[str, int | bool] = {"pdserve.overlaps": span.name in OVERLAPPING}
    if span.num_bytes:
        attributes["pdserve.bytes"] = span.num_bytes
    if span.num_tokens:
        attributes["pdserve.tokens"] = span.num_tokens
    return attributes


def _ns(unix_s: float) -> int:
    return int(unix_s * 1e9)


def _provider(endpoint: str, model_name: str, timing: Timing) -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise StartupError(
            f"--otlp-traces-endpoint needs OpenTelemetry ({error.name} is missing): "
            "pip install 'pdserve[otel]', or leave the flag out"
        ) from None
    resource = Resource.create({"service.name": "pdserve", "pdserve.model": model_name})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=timing.trace_export_s)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
