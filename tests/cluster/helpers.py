"""What end-to-end tests share: a client that records whole streams, waiting, metrics, processes."""

from __future__ import annotations

import http.client
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import psutil

from pdserve.bench.local_cluster import LocalCluster

T = TypeVar("T")
Body = dict[str, Any]

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
VOCAB_SIZE = 4096  # of the shipped model
GREEDY: Body = {"temperature": 0, "ignore_eos": True}


def random_ids(seed: int, num_tokens: int) -> list[int]:
    """A prompt of the shipped model's ids, without its EOS (0)."""
    return [int(token) for token in np.random.default_rng(seed).integers(1, VOCAB_SIZE, num_tokens)]


def wait_until(condition: Callable[[], T], timeout_s: float, what: str) -> T:
    """The first result of `condition` that is true."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
    return result


@contextmanager
def clean_cluster(arguments: Sequence[str], log_path: Path) -> Iterator[LocalCluster]:
    """A cluster whose processes log no traceback until they have ended."""
    with LocalCluster(arguments, log_path=log_path) as cluster:
        yield cluster
    log = log_path.read_text()
    assert "Traceback" not in log, log


# ---- HTTP -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """An answer that is not streamed, whatever its status."""

    status: int
    headers: http.client.HTTPMessage
    text: str

    @property
    def json(self) -> Any:  # noqa: ANN401  JSON is what it is
        return json.loads(self.text)


def _open(
    url: str, method: str, path: str, body: object, headers: dict[str, str] | None, timeout_s: float
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=timeout_s)
    payload = None if body is None else json.dumps(body)
    connection.request(method, path, payload, {"Content-Type": "application/json", **(headers or {})})
    return connection, connection.getresponse()


def request(
    url: str,
    path: str,
    body: object = None,
    *,
    headers: dict[str, str] | None = None,
    timeout_s: float = 120.0,
) -> Reply:
    """GET, or POST when there is a body."""
    connection, response = _open(url, "GET" if body is None else "POST", path, body, headers, timeout_s)
    try:
        return Reply(response.status, response.headers, response.read().decode())
    finally:
        connection.close()


@dataclass
class Answer:
    """All that a client saw of one streamed completion."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)  # by choice
    texts: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)  # of the ids, where asked for
    finish_reasons: dict[int, str] = field(default_factory=dict)
    weight_version: str = ""
    error: Body | None = None  # of an error answer, or of an error event in mid-stream
    is_done: bool = False  # `[DONE]` came
    is_cut: bool = False  # the connection ended before the body's end

    @property
    def is_proper(self) -> bool:
        """The stream ended as one that is complete does."""
        ended = self.finish_reasons.keys() == self.token_ids.keys()
        return self.status == 200 and self.is_done and ended and self.error is None and not self.is_cut


class Stream:
    """One streamed completion, read by a thread of its own from now on."""

    def __init__(
        self, url: str, body: Body, *, path: str = COMPLETIONS, headers: dict[str, str] | None = None
    ) -> None:
        self._answer = Answer()
        body = {"stream": True, "return_token_ids": True, **body}
        self._thread = threading.Thread(target=self._read, args=(url, path, body, headers), daemon=True)
        self._thread.start()

    @property
    def num_tokens(self) -> int:
        """Of all choices, so far."""
        return sum(len(ids) for ids in list(self._answer.token_ids.values()))

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait_for_tokens(self, num_tokens: int, timeout_s: float = 60.0) -> None:
        wait_until(
            lambda: self.num_tokens >= num_tokens or self.is_over,
            timeout_s,
            f"{num_tokens} tokens of a stream",
        )
        assert self.num_tokens >= num_tokens, f"the stream ended before: {self._answer}"

    def answer(self, timeout_s: float = 90.0) -> Answer:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"the stream has not ended within {timeout_s:g} s: {self._answer}"
        return self._answer

    def _read(self, url: str, path: str, body: Body, headers: dict[str, str] | None) -> None:
        answer = self._answer
        connection, response = _open(url, "POST", path, body, headers, timeout_s=120.0)
        answer.status = response.status
        answer.headers = {name.lower(): value for name, value in response.headers.items()}
        try:
            if response.status != 200:
                answer.error = json.loads(response.read())["error"]
                return
            pending = b""
            while piece := response.read1():  # its readline takes a connection that was cut for a clean end
                *lines, pending = (pending + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: "):
                        self._take(line.removeprefix(b"data: "))
        except (http.client.HTTPException, ConnectionError):
            answer.is_cut = True
        finally:
            connection.close()

    def _take(self, data: bytes) -> None:
        answer = self._answer
        if data == b"[DONE]":
            answer.is_done = True
            return
        chunk = json.loads(data)
        answer.error = chunk.get("error", answer.error)
        answer.weight_version = chunk.get("weight_version", answer.weight_version)
        for choice in chunk.get("choices", ()):
            index = choice["index"]
            answer.token_ids.setdefault(index, []).extend(choice["token_ids"])
            answer.texts[index] = answer.texts.get(index, "") + choice["text"]
            if choice["logprobs"] is not None:
                answer.logprobs.setdefault(index, []).extend(choice["logprobs"]["token_logprobs"])
            if choice["finish_reason"] is not None:
                assert index not in answer.finish_reasons, "a choice has finished twice"
                answer.finish_reasons[index] = choice["finish_reason"]


@contextmanager
def slowed(url: str, per_forward_s: float = 0.01) -> Iterator[None]:
    """Forwards that take at least so long on any machine: a short stream is still there when looked at."""
    assert request(url, "/slow_down", {"forward_sleep_time": per_forward_s}).status == 200
    try:
        yield
    finally:
        assert request(url, "/slow_down", {"forward_sleep_time": None}).status == 200


def stream_all(url: str, bodies: Sequence[Body]) -> list[Answer]:
    """All at once; each must end properly."""
    streams = [Stream(url, body) for body in bodies]
    answers = [stream.answer() for stream in streams]
    assert all(answer.is_proper for answer in answers), answers
    return answers


def greedy_ids(url: str, prompt: Sequence[int], max_tokens: int, **fields: object) -> list[int]:
    """The ids of a greedy completion that is not streamed."""
    body = {"prompt": list(prompt), "max_tokens": max_tokens, "return_token_ids": True, **GREEDY, **fields}
    reply = request(url, COMPLETIONS, body)
    assert reply.status == 200, reply.text
    ids: list[int] = reply.json["choices"][0]["token_ids"]
    return ids


def in_background(work: Callable[[], T]) -> tuple[Callable[[], bool], Callable[[], T]]:
    """Runs `work` in a thread; returns (whether it is done, its result, waited for)."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future.done, future.result


def metric(text: str, name: str, **labels: str) -> float:
    """The sum over a page of metrics of all samples of this name that have these labels."""
    total = 0.0
    for line in text.splitlines():
        match = re.match(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)$", line)
        if match and all(f'{label}="{value}"' in (match[1] or "") for label, value in labels.items()):
            total += float(match[2])
    return total


# ---- nodes ------------------------------------------------------------------------------------------


def num_busy(cluster: LocalCluster) -> int:
    """Requests that run or wait, and pages that are in use by them; what is in quarantine left out."""
    names = (
        "num_running_reqs",
        "num_waiting_reqs",
        "num_locked_pages",
        "num_reserved_pages",
        "num_exposed_pages",
    )
    return sum(worker["load"][name] for worker in cluster.workers() for name in names)


def num_quarantined(cluster: LocalCluster) -> int:
    return sum(int(worker["load"]["num_quarantined_pages"]) for worker in cluster.workers())


def all_paired(cluster: LocalCluster, num_prefill: int, num_decode: int) -> bool:
    """Whether so many nodes are registered, and every decode node can use every prefill node."""
    prefills, decodes = cluster.workers("prefill"), cluster.workers("decode")
    ids = {worker["incarnation"] for worker in prefills}
    return (
        len(prefills) == num_prefill
        and len(decodes) == num_decode
        and all(worker["is_ready"] for worker in prefills)
        and all(worker["is_ready"] and set(worker["ready_peers"]) == ids for worker in decodes)
    )


def scheduler_process(cluster: LocalCluster, url: str) -> psutil.Process:
    """The scheduler of the node at `url`: the parent of the front that serves there."""
    for process in psutil.Process(cluster.pid).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:  # ended meanwhile, or a zombie
            continue
        if "node-front" in words and url in words:
            parent = process.parent()
            assert parent is not None
            return parent
    raise AssertionError(f"no process of this cluster serves {url}")


def is_alive(process: psutil.Process) -> bool:
    """A zombie is not: a nursery (tests/nursery.py) that outlived who had it is nobody's to wait for."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def fronts_of(scheduler: psutil.Process) -> list[psutil.Process]:
    """One, or none between two."""
    return [child for child in scheduler.children() if "node-front" in child.cmdline()]


def router_process(cluster: LocalCluster) -> psutil.Process:
    return next(child for child in psutil.Process(cluster.pid).children() if "router" in child.cmdline())


@contextmanager
def frozen(process: psutil.Process) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        if process.is_running():
            process.send_signal(signal.SIGCONT)


def kill_nodes(cluster: LocalCluster, urls: Sequence[str], *, with_fronts: bool = False) -> None:
    """kill -9 of the schedulers, or of all processes of the nodes; returns when those are gone.

    A front whose scheduler dies takes leave of the router; with both dead, the router learns it by itself.
    """
    schedulers = [scheduler_process(cluster, url) for url in urls]
    fronts = [front for scheduler in schedulers for front in fronts_of(scheduler)]
    for process in (*(fronts if with_fronts else ()), *schedulers):
        process.kill()
    wait_until(
        lambda: not any(is_alive(process) for process in (*schedulers, *fronts)),
        20.0,
        "the end of killed nodes and of their fronts",
    )
