"""The scripts: shell that parses; and a demo that says whether both answers ended properly."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

import pdserve
from pdserve import demo
from pdserve.runtime.listen import bind_http
from pdserve.runtime.tls import Trust
from pdserve.scripts.tools import __main__ as tools
from pdserve.tests.certificates import Certificates
from pdserve.tests.http_server import serving
from pdserve.tests.scripts import load_script

ROOT = Path(pdserve.__file__).resolve().parent
SHELL = sorted(
    path
    for folder in (ROOT / "scripts", ROOT / ".ci")
    for path in folder.iterdir()
    if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")
)
Serve = Callable[..., str]


# ---- shell --------------------------------------------------------------------------------------------


def test_the_promised_scripts_are_there() -> None:
    names = {"setup", "run", "test", "check", "dev", "launch_router", "launch_prefill", "launch_decode"}
    assert names <= {path.name for path in SHELL}


@pytest.mark.process
@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_a_shell_script_parses_and_can_be_run(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text()


def test_the_tools_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert tools.main([]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    assert set(listed) == {path.stem for path in (ROOT / "scripts" / "tools").glob("[a-z]*.py")}
    assert listed["simulate"].endswith("every seed is another set of nodes, requests and faults.")


def test_a_tool_that_is_not_there_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert tools.main(["simulat", "--seeds", "1"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (
        "",
        "scripts/dev: there is no tool 'simulat'; did you mean simulate?\n",
    )


def test_every_script_that_is_named_is_there() -> None:
    """In prose, docstrings and messages: `scripts/NAME`, `scripts/dev NAME`."""
    texts = [ROOT / "README.md"]
    for folder in ("assets", "bench", "docs", "scripts", "tests"):
        texts += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".py")]
    pattern = r"\bscripts/(dev [a-z]\w+|(?!dev )[a-z]\w+)(?![\w./])"
    named = {name for path in texts for name in re.findall(pattern, path.read_text())}
    assert {"dev simulate", "check"} <= named
    paths = {name: re.sub(r"dev (.*)", r"tools/\1.py", name) for name in named}
    assert {name for name, path in paths.items() if not (ROOT / "scripts" / path).exists()} == set()


# ---- the demo against a server that holds its line, or does not ---------------------------------------


def event(body: object) -> bytes:
    return b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n"


def piece(text: str, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"text": text, "finish_reason": finish_reason}]})


DONE = event(b"[DONE]")
TIMELINE = event(
    {
        "choices": [],
        "timeline": {"spans": [{"name": "handoff", "num_bytes": 8, "duration_s": 1}], "unaccounted_s": 0.5},
    }
)
WHOLE = [piece("def"), piece(" f", "stop"), TIMELINE, DONE]


class _Streams(BaseHTTPRequestHandler):
    """Streams the server's `pieces` in chunks; without the last, empty chunk when `is_cut`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        getattr(self.server, "authorizations", []).append(self.headers["Authorization"])
        self.send_response(getattr(self.server, "status", 200))
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for data in getattr(self.server, "pieces", []):
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if not getattr(self.server, "is_cut", False):
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Serve]:
    with serving(_Streams) as server:

        def stream(
            pieces: list[bytes],
            *,
            status: int = 200,
            is_cut: bool = False,
            authorizations: list[str | None] | None = None,
        ) -> str:
            kept = [] if authorizations is None else authorizations
            vars(server).update(pieces=pieces, status=status, is_cut=is_cut, authorizations=kept)
            return server.url

        yield stream


def test_both_answers_are_shown_with_their_table(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.show(serve(WHOLE))
    shown = capsys.readouterr().out
    assert shown.count("def f") >= 2
    assert "TTFT" in shown
    assert re.search(r"^ +handoff +1000\.00 ms +1000\.00 ms$", shown, re.MULTILINE)
    assert re.search(r"^ +unaccounted +500\.00 ms +500\.00 ms$", shown, re.MULTILINE)
    assert re.search(r"^ +KV bytes handed off +8 +8$", shown, re.MULTILINE)
    assert re.search(r"^ +KV bytes handed off +8 +8$", shown, re.MULTILINE)


def test_an_answer_is_read_event_by_event(serve: Serve) -> None:
    chat = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    words = event({"choices": [{"delta": {"content": "hi"}, "finish_reason": None}]})
    last = event({"choices": [{"delta": {}, "finish_reason": "length"}]})
    answer = demo.ask(serve([chat, words, b": a comment\n\n", last, DONE]), "/v1/chat/completions", {})
    assert answer.ended_properly
    assert (len(answer.token_times), answer.finish_reason, answer.stage_s) == (1, "length", {})


BROKEN: dict[str, tuple[list[bytes], bool]] = {
    "cut-in-the-middle": ([piece("def")], True),
    "cut-before-done": ([piece("def", "stop")], True),
    "ended-without-done": ([piece("def", "stop")], False),
    "no-finish-reason": ([piece("def"), DONE], False),
    "no-token": ([piece("", "stop"), DONE], False),
    "nothing": ([], False),
    "error-event": ([piece("def", "stop"), event({"error": {"message": "lost the node"}}), DONE], False),
    "half-an-event": ([piece("def", "stop"), b'data: {"cho\n\n'], True),
}


@pytest.mark.parametrize(("pieces", "is_cut"), BROKEN.values(), ids=BROKEN.keys())
def test_an_answer_that_did_not_end_properly_is_a_failure(
    serve: Serve, pieces: list[bytes], is_cut: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not demo.show(serve(pieces, is_cut=is_cut))
    assert "an answer did not end properly: " in capsys.readouterr().err


def test_a_refusal_is_shown(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    assert not demo.show(serve([b'{"error": "no pair"}'], status=503))
    assert "HTTP 503" in capsys.readouterr().err


def test_nobody_there_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with bind_http("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    assert not demo.show(f"http://127.0.0.1:{port}")
    assert "the stream broke" in capsys.readouterr().err


def test_a_router_that_speaks_tls_is_asked_so(certificates: Certificates) -> None:
    """At an address that its certificate does not name: it is ours."""
    files = certificates.issue("router.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certfile, files.keyfile)

    class Streams(_Streams):
        def setup(self) -> None:
            self.request = context.wrap_socket(self.request, server_side=True)
            super().setup()

    with serving(Streams) as server:
        vars(server).update(pieces=WHOLE)
        url = server.url.replace("http:", "https:")
        assert demo.show(url, trust=Trust(files))
        assert not demo.show(url), "of a CA that nobody knows"


# ---- the demo as a process, around an `up` of ours ----------------------------------------------------

FAKE_UP = """
import pathlib, signal, sys, time
folder = pathlib.Path(__file__).parent
def end(*_):
    (folder / "ended").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
(folder / "arguments").write_text(" ".join(sys.argv[1:]))
url = (folder / "url").read_text()
if url:
    print("pdserve is ready at", url, flush=True)
    for _ in range(6000):
        time.sleep(0.1)  # a signal that comes just before a sleep is heard after it
sys.exit(7)
"""


@pytest.fixture
def fake_pdserve(tmp_path: Path) -> Path:
    """A folder that holds a `pdserve` module in place of ours, of which the demo's child is then one."""
    (tmp_path / "pdserve.py").write_text(FAKE_UP)
    return tmp_path


RUN_DEMO = """
import os, signal, sys
from pdserve import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
os.environ["PYTHONPATH"] = sys.argv.pop(1)
sys.exit(cli.main(["demo", *sys.argv[1:]]))
"""


def start_demo(folder: Path, url: str, *arguments: str) -> subprocess.Popen[str]:
    (folder / "url").write_text(url)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", RUN_DEMO, str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.process
def test_once_ends_the_cluster_and_says_that_all_is_well(fake_pdserve: Path, serve: Serve) -> None:
    process = start_demo(fake_pdserve, serve(WHOLE), "--once", "--port", "9000")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "def f" in output
    assert (fake_pdserve / "ended").exists()
    assert (fake_pdserve / "arguments").read_text() == "up --port 9000"


@pytest.mark.process
def test_a_cluster_with_keys_is_asked_with_the_first(fake_pdserve: Path, serve: Serve) -> None:
    sent: list[str | None] = []
    arguments = ["--api-key=k=1", "--once", "--api-key", "k2"]
    process = start_demo(fake_pdserve, serve(WHOLE, authorizations=sent), *arguments)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert sent == ["Bearer k=1"] * 2
    assert (fake_pdserve / "arguments").read_text() == "up --api-key=k=1 --api-key k2"


@pytest.mark.process
def test_once_fails_when_a_stream_is_cut(fake_pdserve: Path, serve: Serve) -> None:
    process = start_demo(fake_pdserve, serve(WHOLE[:1], is_cut=True), "--once")
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert (fake_pdserve / "ended").exists()


@pytest.mark.process
def test_a_cluster_that_does_not_start_gives_its_exit_code(fake_pdserve: Path) -> None:
    process = start_demo(fake_pdserve, "", "--once")
    process.communicate(timeout=60)
    assert process.returncode == 7


@pytest.mark.process
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_the_cluster_ends_with_the_demo(
    fake_pdserve: Path, serve: Serve, number: signal.Signals, code: int
) -> None:
    process = start_demo(fake_pdserve, serve(WHOLE))
    assert process.stdout is not None
    deadline = time.monotonic() + 60
    while "The cluster goes on at" not in process.stdout.readline():
        assert time.monotonic() < deadline
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert (fake_pdserve / "ended").exists()


@pytest.mark.process
def test_the_demo_ends_with_the_cluster() -> None:
    wait = "import sys; from pdserve import demo; from subprocess import Popen; "
    wait += "sys.exit(demo.wait_for_end(Popen(['sh', '-c', 'sleep 0.2; exit 5'])))"
    assert subprocess.run([sys.executable, "-P", "-c", wait], timeout=60, check=False).returncode == 5


# ---- disturbed_answers -------------------------------------------------------------------------------


async def test_clients_ask_until_the_last_node_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("disturbed_answers")
    ends = iter(["done", "left", "done", "done", "status 503: gone"])

    async def ask(*_: object) -> tuple[object, str]:
        await asyncio.sleep(0)
        return script.Answer(), next(ends, "done")

    monkeypatch.setattr(script, "ask", ask)
    bodies = [{"prompt": [number]} for number in range(3)]
    asked = await script.ask_all("http://h", bodies, [None] * 3, 1, goes_on=lambda: True)
    assert [one.client for one in asked] == [0, 0, 1, 1, 2], "and nobody asks on after a failure"
    assert len(await script.ask_all("http://h", bodies, [None] * 3, 2)) == 3, "each once without losses"


def test_a_loss_counts_for_the_answers_that_it_met() -> None:
    script = load_script("disturbed_answers")
    spans = [("done", 0.0, 5.0), ("done", 1.5, 9.0), ("status 503: gone", 0.0, 9.0)]
    asked = [script.Asked(0, script.Answer(), *span) for span in spans]
    assert script.under_way(asked, [1.0, 2.0, 6.0, 10.0]) == [2, 3, 2, 0]
    assert script.most_outlived(asked, [1.0, 2.0, 6.0, 10.0]) == 2
