from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from itertools import groupby

import pytest

from pdserve.bench import handoff
from pdserve.messages.timeline import Span
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.errors import StartupError
from pdserve.runtime.listen import bind_http
from pdserve.tests.http_server import serving


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    handoff.add_arguments(parser)
    return parser.parse_args(list(words))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("/no/such",), "no model at /no/such"),
        ((str(SHIPPED_MODEL), "--repeats", "0"), "--repeats 0"),
        ((str(SHIPPED_MODEL), "--prompt-tokens", "128", "2048"), "2048 tokens: 1 to 2031"),
        ((str(SHIPPED_MODEL), "--prompt-tokens", "0"), "0 tokens: 1 to 2031"),
        ((str(SHIPPED_MODEL), "--rows", "1k", "16k"), "16384 tokens: 1 to 2031"),
    ],
)
def test_what_cannot_be_run_is_one_line_before_a_cluster_starts(
    words: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoff, "LocalCluster", None)
    with pytest.raises(StartupError, match=named):
        handoff.main(parse(*words))


class _Answers(BaseHTTPRequestHandler):
    """Answers with the server's `status` and `body`, then closes the connection."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(getattr(self.server, "status", 200))
        self.end_headers()
        self.wfile.write(getattr(self.server, "body", b""))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[int, bytes], str]]:
    with serving(_Answers) as server:

        def answer(status: int, body: bytes) -> str:
            vars(server).update(status=status, body=body)
            return server.url

        yield answer


TOKEN = b'data: {"choices": [{"text": "a", "token_ids": [7]}]}\n\n'
WIRES = b"""
    {"name": "wire", "start_s": 5, "duration_s": 2, "num_bytes": 8, "overlaps": true},
    {"name": "wire", "start_s": 6, "duration_s": 2, "num_bytes": 4, "overlaps": true}
"""
SPANS = b'data: {"choices": [], "timeline": {"spans": [' + WIRES.replace(b"\n", b"") + b"]}}\n\n"
DONE = b"data: [DONE]\n\n"


def test_each_token_is_timed(serve: Callable[[int, bytes], str]) -> None:
    measured = handoff.ask(serve(200, TOKEN * 4 + SPANS + DONE), [1, 2], 4)
    assert measured.num_tokens == 4
    assert 0 < measured.first_token_s <= measured.second_token_s <= measured.last_token_s
    assert (measured.wire_busy_s, measured.last_wire_s, measured.stage_s("wire")) == (3, 2, 4)
    assert [span.num_bytes for span in measured.wires] == [8, 4]


@pytest.mark.parametrize(
    ("status", "body", "named"),
    [
        (503, b"no pair", "HTTP 503: no pair"),
        (200, TOKEN + b'data: {"error": {"message": "node lost"}}\n\n', "node lost"),
        (200, TOKEN, "1 tokens came instead of 4"),
    ],
)
def test_a_request_that_fails_ends_the_run_with_the_reason(
    serve: Callable[[int, bytes], str], status: int, body: bytes, named: str
) -> None:
    with pytest.raises(StartupError, match=named):
        handoff.ask(serve(status, body), [1, 2], 4)


def test_nobody_there_is_one_line() -> None:
    with bind_http("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(StartupError, match="the stream broke"):
        handoff.ask(f"http://127.0.0.1:{port}", [1], 4)


# ---- the table --------------------------------------------------------------------------------------


def measured(first_ms: float, second_ms: float, *spans: Span) -> handoff.Measured:
    return handoff.Measured(first_ms / 1000, second_ms / 1000, 0.5, 17, spans, 0.0, ())


def spans(chunk_ms: float, step_ms: float, wire_ms: float = 0.0) -> tuple[Span, ...]:
    chunk = Span("prefill_chunk", 0.0, chunk_ms / 1000)
    step = Span("first_decode_step", 0.2, step_ms / 1000)
    return (chunk, Span("wire", 0.1, wire_ms / 1000, 2**20), step) if wire_ms else (chunk, step)


def test_a_row_says_what_two_nodes_add_and_what_the_engine_did_not_take() -> None:
    pairs = [
        handoff.Pair(
            measured(104 + noise, 140 + noise, *spans(100 + noise, 20, 10)),
            measured(102, 122, *spans(99, 19)),
        )
        for noise in (0, 1, 2, 3, 4)
    ]
    row = handoff.summarize(handoff.Case(name="1k"), pairs)
    assert (row.first, row.first_colocated, row.second) == pytest.approx((106, 102, 142))
    assert (row.wire, row.wire_mib, row.last_wire, row.step) == pytest.approx((10, 1, 10, 20))
    assert row.second_bar == pytest.approx(35)
    assert str(row.first_adds) == "+4.0 (+2.0 … +6.0)"
    # 104 - 100 here, 102 - 99 there; 140 - 100 - 20 - 10 here, 122 - 99 - 19 there.
    assert (row.first_left, row.second_left) == pytest.approx((4, 10))
    assert str(row.first_left_adds) == "+1.0 (+1.0 … +1.0)"
    assert str(row.second_left_adds) == "+6.0 (+6.0 … +6.0)"
    assert [cell for cell in row.cells if "told" in cell or "met" in cell] == [
        "not told",
        "35.0: met",
        "+1.0 (+1.0 … +1.0) met",
        "+6.0 (+6.0 … +6.0) met",
    ]
    assert len(row.cells) == len(handoff.COLUMNS)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([5, 1, 4, 2, 3], 1, 5),  # 94 %
        (list(range(7)), 0, 6),  # 98 %; without the ends 87 %
        (list(range(8)), 1, 6),  # 93 %
        (list(range(20)), 5, 14),  # 96 %
        ([2], 2, 2),
    ],
)
def test_the_interval_of_a_median(values: list[float], low: float, high: float) -> None:
    interval = handoff.Interval.of(values)
    assert (interval.low, interval.high) == (low, high)


@pytest.mark.parametrize(("bar", "verdict"), [(3.0, "met"), (2.9, "not told"), (0.9, "missed")])
def test_a_bar_is_told_by_the_whole_interval(bar: float, verdict: str) -> None:
    assert handoff.Interval(2.0, 1.0, 3.0).verdict(bar) == verdict


def test_rows_change_one_factor_and_neighbours_share_their_clusters() -> None:
    base = handoff.Case(name="1k")
    for case in handoff.CASES:
        fields = ("prompt_tokens", "page_size", "backend", "overlaps")
        assert sum(getattr(case, name) != getattr(base, name) for name in fields) <= 1
    started = [(s.cluster_flags, s.transfer_flags) for s in handoff.CASES]
    assert len(list(groupby(started))) == len(set(started))
    chosen = handoff.cases_of(parse(str(SHIPPED_MODEL), "--rows", "shm", "1k"))
    assert [case.name for case in chosen] == ["1k", "shm"]
    assert chosen[1].transfer_flags == ("--transfer-backend", "shm")
