"""Starts `pdserve up`, asks it for one streamed completion and one streamed chat, and prints what happened.

    pdserve demo [--once] [arguments of `pdserve up`]

Exits non-zero unless both answers ended properly: a finish reason, then [DONE].
"""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from .runtime.tls import SYSTEM_TRUST, TlsFiles, Trust

COMPLETION = {"prompt": "def read_config(path):", "max_tokens": 96, "seed": 2}
CHAT = {
    "messages": [{"role": "user", "content": "Return the number of words in a text."}],
    "max_tokens": 96,
    "seed": 2,
}
STAGES = (
    *(
        "receive",
        "tokenize",
        "prepare",
        "queue",
        "pairing",
        "to_decode",
        "decode_queue",
        "reserve",
        "to_prefill",
    ),
    *("prefill_queue", "engine_queue", "prefill_chunk", "first_token", "from_prefill", "relay", "to_router"),
    *("deliver", "detokenize", "stream_out"),
)
BEHIND = ("wire", "handoff", "last_pages", "decode_wait", "first_decode_step")


@dataclass
class Answer:
    """One streamed answer: what the server said of it, and when its tokens came."""

    started: float
    token_times: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    is_done: bool = False
    error: str = ""
    stage_s: dict[str, float] = field(default_factory=dict)  # spans of one stage added up
    num_bytes: int = 0
    unaccounted_s: float | None = None

    @property
    def ended_properly(self) -> bool:
        return bool(self.finish_reason and self.is_done and self.token_times and not self.error)


def events(response: http.client.HTTPResponse) -> Iterator[str]:
    """The data of each server-sent event."""
    for line in response:
        if line.startswith(b"data: "):
            yield line[6:].decode().strip()


def ask(url: str, path: str, body: dict[str, Any], api_key: str = "", trust: Trust = SYSTEM_TRUST) -> Answer:
    """Stream one answer, printing its text as it comes."""
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    connection = _connection(url, trust)
    body = {**body, "stream": True, "timeline": True, "temperature": 0.6, "top_p": 0.9}
    answer = Answer(started=time.monotonic())
    try:
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            answer.error = f"HTTP {response.status}: {response.read().decode(errors='replace')}"
            return answer
        for data in events(response):
            if data == "[DONE]":
                answer.is_done = True
                break
            take(answer, json.loads(data))
    except (http.client.HTTPException, OSError, ValueError) as error:
        answer.error = answer.error or f"the stream broke: {error!r}"
    finally:
        connection.close()
    return answer


def _connection(url: str, trust: Trust) -> http.client.HTTPConnection:
    target, timeout_s = urlsplit(url), 120
    if (context := trust.of(url)) is None:
        return http.client.HTTPConnection(target.hostname or "", target.port, timeout=timeout_s)
    return http.client.HTTPSConnection(target.hostname or "", target.port, timeout=timeout_s, context=context)


def take(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.error = event["error"]["message"]
        return
    timeline = event.get("timeline", {})
    answer.unaccounted_s = timeline.get("unaccounted_s", answer.unaccounted_s)
    for span in timeline.get("spans", []):
        answer.stage_s[span["name"]] = answer.stage_s.get(span["name"], 0.0) + span["duration_s"]
        if span["name"] == "handoff":
            answer.num_bytes += span.get("num_bytes", 0)
    for choice in event.get("choices", []):
        text = choice.get("text") or choice.get("delta", {}).get("content") or ""
        if text:
            answer.token_times.append(time.monotonic())
            print(text, end="", flush=True)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


def row(name: str, values: list[str]) -> None:
    print(f"  {name:<28}" + "".join(f"{value:>14}" for value in values))


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.2f} ms"


def print_table(answers: list[Answer]) -> None:
    row("", ["completion", "chat"])
    row("TTFT", [milliseconds(answer.token_times[0] - answer.started) for answer in answers])
    gaps = [
        (answer.token_times[-1] - answer.token_times[0]) / max(1, len(answer.token_times) - 1)
        for answer in answers
    ]
    row("ITL, mean", [milliseconds(gap) for gap in gaps])
    print("on the way to the first token:")
    for name in STAGES:
        row(name, [milliseconds(answer.stage_s.get(name)) for answer in answers])
    row("unaccounted", [milliseconds(answer.unaccounted_s) for answer in answers])
    print("beside it, and behind it:")
    for name in BEHIND:
        row(name, [milliseconds(answer.stage_s.get(name)) for answer in answers])
    row("KV bytes handed off", [f"{answer.num_bytes:,}" for answer in answers])


def show(url: str, api_key: str = "", trust: Trust = SYSTEM_TRUST) -> bool:
    """The demo. False when an answer did not end properly."""
    print("\n--- /v1/completions: " + repr(COMPLETION["prompt"]))
    print(COMPLETION["prompt"], end="")
    answers = [ask(url, "/v1/completions", COMPLETION, api_key, trust)]
    print("\n\n--- /v1/chat/completions: " + repr(CHAT["messages"][0]["content"]))  # type: ignore[index]
    answers.append(ask(url, "/v1/chat/completions", CHAT, api_key, trust))
    print("\n")
    for answer in answers:
        if not answer.ended_properly:
            print(f"an answer did not end properly: {answer.error or 'the stream was cut'}", file=sys.stderr)
            return False
    print_table(answers)
    return True


def wait_ready(up: subprocess.Popen[str]) -> str | None:
    """The URL that `pdserve up` prints when the cluster is ready; None if it ended instead."""
    assert up.stdout is not None
    for line in up.stdout:
        print(line, end="", flush=True)
        if line.startswith("pdserve is ready at "):
            return line.split()[-1]
    return None


def wait_for_end(up: subprocess.Popen[str]) -> int:
    """The exit code: of `up` when that ends, 0 after Ctrl-C. Signals are taken here, one by one: an exception
    that a handler raises within `Popen.wait` may leave its lock held, and no later wait would end."""
    signals = {signal.SIGTERM, signal.SIGCHLD}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell's background job has it
        signals.add(signal.SIGINT)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # what nobody handles may be dropped unseen
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        while (code := up.poll()) is None:
            number = signal.sigwait(signals)
            if number != signal.SIGCHLD:
                return 0 if number == signal.SIGINT else 128 + number
        return code
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_demo(arguments: Sequence[str], *, once: bool, api_key: str, tls: TlsFiles) -> int:
    """Around `pdserve up ARGUMENTS…`, which ends with it: after the answers when `once`, else at Ctrl-C.
    Returns the exit code. `api_key`: one that the cluster takes, if it asks for any. `tls`: its files."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without the `finally`
    up = subprocess.Popen(
        [sys.executable, "-P", "-m", "pdserve", "up", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        url = wait_ready(up)
        if url is None:
            return up.wait() or 1
        if not show(url, api_key, Trust(tls)):
            return 1
        if once:
            return 0
        body = json.dumps({"prompt": "class Stack:", "max_tokens": 64})
        print(f"\nThe cluster goes on at {url} until Ctrl-C. Try:")
        authorization = "-H 'Authorization: Bearer KEY' " if api_key else ""
        ca = f"--cacert {tls.ca_certs or tls.certfile} " if tls.certfile else ""
        json_type = "-H 'Content-Type: application/json'"
        print(f"  curl -N {ca}{url}/v1/completions {authorization}{json_type} -d '{body}'")
        return wait_for_end(up)
    except KeyboardInterrupt:
        return 0
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait()
