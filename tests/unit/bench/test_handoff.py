from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from pdserve.bench import handoff
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.errors import StartupError
from pdserve.runtime.listen import bind_http


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    handoff.add_arguments(parser)
    return parser.parse_args(list(words))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("/no/such",), "no model at /no/such"),
        ((str(SHIPPED_MODEL), "--repeats", "0"), "--repeats 0"),
        ((str(SHIPPED_MODEL), "--prompt-tokens", "128", "2048"), "--prompt-tokens: 1 to 1983"),
        ((str(SHIPPED_MODEL), "--prompt-tokens", "0"), "--prompt-tokens: 1 to 1983"),
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
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def answer(status: int, body: bytes) -> str:
        vars(server).update(status=status, body=body)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield answer
    server.shutdown()
    server.server_close()
    thread.join()


TOKEN = b'data: {"choices": [{"text": "a", "token_ids": [7]}]}\n\n'
WIRES = (
    b'{"name": "wire", "duration_s": 1, "num_bytes": 8}, {"name": "wire", "duration_s": 2, "num_bytes": 4}'
)
SPANS = b'data: {"choices": [], "timeline": {"spans": [' + WIRES + b"]}}\n\n"
DONE = b"data: [DONE]\n\n"


def test_each_token_is_timed(serve: Callable[[int, bytes], str]) -> None:
    measured = handoff.ask(serve(200, TOKEN * 4 + SPANS + DONE), [1, 2], 4)
    assert measured.num_tokens == 4
    assert 0 < measured.first_token_s <= measured.second_token_s <= measured.last_token_s
    assert (measured.stage_s, measured.num_bytes) == ({"wire": 3}, 12)


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
