from __future__ import annotations

import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from queue import Queue
from threading import Event

import pytest

from pdserve.api.text.timelines import Timeline
from pdserve.messages.timeline import Span
from pdserve.router import trace_export
from pdserve.router.trace_export import TraceExporter
from pdserve.runtime.errors import StartupError
from pdserve.runtime.timing import UNSCALED
from pdserve.tests.deadline import DEADLINE_S
from pdserve.tests.http_server import serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def timeline(traceparent: str = "") -> Timeline:
    return Timeline(
        request_id="cmpl-mine",
        received_unix_s=1000.0,
        ended_unix_s=1002.0,
        first_token_unix_s=1000.5,
        num_attempts=1,
        num_prompt_tokens=7,
        num_cached_tokens=4,
        spans=(Span("queue", 1000.0, 0.25), Span("wire", 1000.25, 0.5, num_bytes=64)),
        traceparent=traceparent,
    )


class _Collector(BaseHTTPRequestHandler):
    """Puts the body of each request into the server's `bodies`."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
        vars(self.server)["bodies"].put((self.path, body))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Queue[tuple[str, bytes]]]]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    bodies: Queue[tuple[str, bytes]] = Queue()
    with serving(_Collector) as server:
        vars(server)["bodies"] = bodies
        yield f"{server.url}/v1/traces", bodies


def test_a_collector_receives_the_request_and_its_stages(
    collector: tuple[str, Queue[tuple[str, bytes]]],
) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    url, bodies = collector
    exporter = TraceExporter(url, "tiny", UNSCALED)
    exporter.export(timeline(f"00-{TRACE}-{PARENT}-01"))
    exporter.close()
    path, body = bodies.get(timeout=DEADLINE_S)
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "pdserve"
    spans = {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert spans.keys() == {"request", "queue", "wire"}
    request = spans["request"]
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert (request.start_time_unix_nano, request.end_time_unix_nano) == (1000 * 10**9, 1002 * 10**9)
    attributes = {a.key: a.value for a in request.attributes}
    assert attributes["gen_ai.request.id"].string_value == "cmpl-mine"
    assert attributes["gen_ai.latency.time_to_first_token"].double_value == 0.5
    assert attributes["pdserve.unaccounted_s"].double_value == 0.25
    for name in ("queue", "wire"):
        assert spans[name].parent_span_id == request.span_id
        assert spans[name].trace_id == request.trace_id
    assert spans["wire"].start_time_unix_nano == 1000_250_000_000
    attributes = {a.key: a.value for a in spans["wire"].attributes}
    assert (attributes["pdserve.bytes"].int_value, attributes["pdserve.overlaps"].bool_value) == (64, True)


@pytest.mark.parametrize("traceparent", ["", "no traceparent", f"00-{TRACE}-{PARENT}-00"])
def test_a_request_without_a_sampled_parent(
    collector: tuple[str, Queue[tuple[str, bytes]]], traceparent: str
) -> None:
    """None, or one that cannot be read: a trace of its own. One that its client does not sample: no trace."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    url, bodies = collector
    exporter = TraceExporter(url, "tiny", UNSCALED)
    exporter.export(timeline(traceparent))
    exporter.close()
    if traceparent.startswith("00"):
        assert bodies.empty()
        return
    (resource,) = ExportTraceServiceRequest.FromString(bodies.get(timeout=DEADLINE_S)[1]).resource_spans
    spans = {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert spans["request"].parent_span_id == b""
    assert spans["request"].trace_id.hex() != TRACE


def test_the_loop_never_waits_for_the_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    is_stuck, goes_on = Event(), Event()

    def hang(*_: object) -> None:
        is_stuck.set()
        goes_on.wait()

    monkeypatch.setattr(trace_export, "emit", hang)
    monkeypatch.setattr(trace_export, "_MAX_WAITING", 2)
    exporter = TraceExporter("http://127.0.0.1:1/v1/traces", "tiny", UNSCALED)
    exporter.export(timeline())
    assert is_stuck.wait(DEADLINE_S)
    for _ in range(5):
        exporter.export(timeline())
    assert exporter.num_dropped == 3
    goes_on.set()
    exporter.close()


def test_what_cannot_be_exported_to_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match="--otlp-traces-endpoint host:4318: a URL is expected"):
        TraceExporter("host:4318", "tiny", UNSCALED)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartupError, match=r"pip install 'pdserve\[otel\]'"):
        TraceExporter("http://127.0.0.1:4318/v1/traces", "tiny", UNSCALED)
