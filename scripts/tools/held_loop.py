"""For how long one large request holds a router, and what it does to the router's memory.

    scripts/dev held_loop --repeats 3

Starts a cluster on the shipped model and sends large requests, one at a time. Meanwhile another process asks
for `GET /live` every 5 ms, and reads a stream of tokens. Told are the most processor time that the router's
loop spent before it answered a `/live`; the longest round trip of one and the longest pause between two
tokens, which include waiting for a core (see the first row), pauses also what the nodes compute; and the
router's memory (RSS) before, at its peak, and 8 s after the answer.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import multiprocessing
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL

FLAGS = ("--num-threads", "1", "--kv-cache-gb", "0.2")
PROBE_EVERY_S = 0.005
LARGEST = (31 << 20) - 200
SETTLED_S = 8.0  # after which memory has been returned, or is not
COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"


@dataclass(frozen=True, slots=True)
class Input:
    name: str
    path: str
    body: Callable[[], bytes]
    leaves_after_s: float = 0.0  # the client closes its connection then; 0: it waits for the answer


def body_of(**fields: object) -> Callable[[], bytes]:
    return lambda: json.dumps(fields).encode()


def listed(field: str, item: bytes, num_items: int, rest: bytes = b"") -> Callable[[], bytes]:
    """An object whose one field is a long list."""
    return lambda: b'{"%b":[%b]%b}' % (field.encode(), b",".join(itertools.repeat(item, num_items)), rest)


def ids(num_ids: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randrange(1, 4096) for _ in range(num_ids)]


def parts(num_parts: int) -> Callable[[], bytes]:
    part = b'{"type":"text","text":"a"}'
    return lambda: b'{"messages":[{"role":"user","content":[%b]}]}' % b",".join([part] * num_parts)


def scored(num_choices: int, **fields: object) -> dict[str, object]:
    return {"n": num_choices, "temperature": 1, "seed": 0, "ignore_eos": True, **fields}


INPUTS = [
    Input("a text of 31 MB", COMPLETIONS, lambda: b'{"prompt":"%b"}' % (b"abcde fg" * (LARGEST // 8))),
    Input("a text of 7.5 MB", COMPLETIONS, lambda: b'{"prompt":"%b"}' % (b"abcde fg" * 983_000)),
    Input("a text of 7.5 MB, escaped", COMPLETIONS, lambda: b'{"prompt":"%b"}' % (rb"a\n" * 2_600_000)),
    Input("31 MB of spaces as a text", COMPLETIONS, lambda: b'{"prompt":"%b"}' % (b" " * LARGEST)),
    Input("31 MB of blanks in the JSON", COMPLETIONS, lambda: b'{"prompt":"a"%b}' % (b" " * LARGEST)),
    Input("/tokenize of 31 MB", "/tokenize", lambda: b'{"prompt":"%b"}' % (b"abcde fg" * (LARGEST // 8))),
    Input("10^6 chat parts", CHAT, parts(1_000_000)),
    Input("20,000 chat parts", CHAT, parts(20_000)),
    Input("1,900 chat parts", CHAT, parts(1_900)),
    Input("14 M token ids", COMPLETIONS, listed("prompt", b"7", 14_000_000)),
    Input("0.99 M token ids", COMPLETIONS, listed("prompt", b"1234", 990_000)),
    Input("10^6 lists of ids", COMPLETIONS, listed("prompt", b"[7]", 1_000_000)),
    Input("49,000 lists of ids", COMPLETIONS, listed("prompt", b"[7]", 49_000)),
    Input("990 lists of 1,000 ids", COMPLETIONS, listed("prompt", json.dumps(ids(1000)).encode(), 990)),
    Input(
        "990 lists of 1,000 ids, client leaves",
        COMPLETIONS,
        listed("prompt", json.dumps(ids(1000)).encode(), 990),
        leaves_after_s=5.0,
    ),
    Input(
        "10^6 names",
        COMPLETIONS,
        lambda: b'{"prompt":"a","logit_bias":{%b}}' % b",".join(b'"%d":1' % i for i in range(1_000_000)),
    ),
    Input("/detokenize of 10 M ids", "/detokenize", listed("tokens", b"7", 10_000_000)),
    Input("/detokenize of 0.99 M ids", "/detokenize", body_of(tokens=ids(990_000))),
    Input("1,024 prompts, n 128", COMPLETIONS, body_of(prompt=["a"] * 1024, n=128, max_tokens=1)),
    Input("1,024 prompts, n 16", COMPLETIONS, body_of(prompt=["a"] * 1024, n=16, max_tokens=1)),
    Input(
        "1,024 prompts, 1,000 biases",
        COMPLETIONS,
        body_of(prompt=["a"] * 1024, max_tokens=1, logit_bias={str(i): 1 for i in range(1000)}),
    ),
    Input(
        "1,024 prompts, timeline",
        COMPLETIONS,
        body_of(prompt=["a"] * 1024, max_tokens=1, timeline=True),
    ),
    Input("1,024 embeddings", "/v1/embeddings", body_of(input=["a b c"] * 1024)),
    Input(
        "64 choices, echo, logprobs 20",
        COMPLETIONS,
        body_of(**scored(64, prompt=ids(1000), max_tokens=48, echo=True, logprobs=20)),
    ),
    Input(
        "4 prompts, n 16, echo, logprobs 20",
        COMPLETIONS,
        body_of(**scored(16, prompt=[ids(1900)] * 4, max_tokens=32, echo=True, logprobs=20)),
    ),
    Input(
        "2,000 prompt logprobs of 20, chat",
        CHAT,
        body_of(messages=[{"role": "user", "content": "a b " * 480}], prompt_logprobs=20, max_tokens=1),
    ),
    Input(
        "/generate, n 8, 1,900 tokens, cumulative",
        GENERATE,
        body_of(text="a", stream=True, sampling_params={"n": 8, "max_new_tokens": 1900, "ignore_eos": True}),
    ),
    Input(
        "/generate, 1,900 tokens, top 20, cumulative",
        GENERATE,
        body_of(
            text="a",
            stream=True,
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=20,
            sampling_params={"max_new_tokens": 1900, "ignore_eos": True},
        ),
    ),
]


def post(url: str, wanted: Input, body: bytes) -> str:
    """What came of it, in a word or two."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=300.0)
    try:
        connection.request("POST", wanted.path, body, {"Content-Type": "application/json"})
        if wanted.leaves_after_s:
            time.sleep(wanted.leaves_after_s)
            return "left"
        answer = connection.getresponse()
        num_bytes = 0
        while piece := answer.read(1 << 20):
            num_bytes += len(piece)
        return f"{answer.status}, {num_bytes / 1e6:.1f} MB"
    except OSError as error:  # a refusal that does not wait for the body
        return type(error).__name__
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class Stood:
    """For how long at most, seconds."""

    loop: float  # the router's loop computed between a `/live` and its answer
    live: float  # a round trip of `/live` took
    stream: float  # nothing came between two tokens


def processor_s(pid: int) -> float:
    """Of a process's main thread so far, in which its loop runs."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def probe(url: str, pid: int, pipe: Connection) -> None:
    """Says that it has begun and, once told to end, how long the router of this `pid` stood."""
    address = urlsplit(url)
    has_begun, is_over = threading.Event(), threading.Event()
    pauses: list[float] = []
    reader = threading.Thread(target=lambda: pauses.append(longest_pause(url, has_begun, is_over)))
    connection = http.client.HTTPConnection(address.hostname or "", address.port)
    loop_s = live_s = 0.0
    reader.start()
    has_begun.wait()
    pipe.send(None)
    while not pipe.poll():
        began, computed_s = time.perf_counter(), processor_s(pid)
        connection.request("GET", "/live")
        connection.getresponse().read()
        live_s = max(live_s, time.perf_counter() - began)
        loop_s = max(loop_s, processor_s(pid) - computed_s)
        time.sleep(PROBE_EVERY_S)
    is_over.set()
    reader.join()
    pipe.send(Stood(loop_s, live_s, max(pauses)))


def longest_pause(url: str, has_begun: threading.Event, is_over: threading.Event) -> float:
    """Between two tokens of streams, one after the other; has begun with the second token."""
    address = urlsplit(url)
    longest = 0.0
    while not is_over.is_set():
        connection = http.client.HTTPConnection(address.hostname or "", address.port)
        body = {"prompt": "def", "max_tokens": 1500, "stream": True, "ignore_eos": True}
        connection.request("POST", COMPLETIONS, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:  # the queue is long
            is_over.wait(0.2)
        last: float | None = None
        for line in iter(answer.readline, b""):
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                if last is not None:
                    longest = max(longest, now - last)
                    has_begun.set()
                last = now
            if is_over.is_set():
                break
        connection.close()
    return longest


class Peak(threading.Thread):
    """The largest RSS of a process while this runs, looked at every 10 ms."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._is_over = threading.Event()
        self.num_bytes = 0

    def run(self) -> None:
        while not self._is_over.wait(0.01):
            self.num_bytes = max(self.num_bytes, rss(self._process))

    def end(self) -> int:
        self._is_over.set()
        self.join()
        return self.num_bytes


def rss(process: psutil.Process) -> int:
    num_bytes: int = process.memory_info().rss
    return num_bytes


@dataclass(frozen=True, slots=True)
class Run:
    stood: Stood
    rss: tuple[int, int, int]  # bytes: before, at the peak, after
    took_s: float
    outcome: str


def measured(cluster: LocalCluster, wanted: Input | None) -> Run:
    router = cluster.process("router")
    ours, theirs = multiprocessing.Pipe()
    prober = multiprocessing.get_context("spawn").Process(
        target=probe, args=(cluster.url, router.pid, theirs)
    )
    body = b"" if wanted is None else wanted.body()
    prober.start()
    ours.recv()
    before = rss(router)
    peak = Peak(router)
    peak.start()
    began = time.perf_counter()
    if wanted is None:
        time.sleep(5.0)
        outcome = ""
    else:
        outcome = post(cluster.url, wanted, body)
    took_s = time.perf_counter() - began
    time.sleep(0.5)
    ours.send(None)
    stood = ours.recv()
    prober.join()
    at_peak = peak.end()
    time.sleep(SETTLED_S)
    return Run(stood, (before, at_peak, rss(router)), took_s, outcome)


def rows(options: argparse.Namespace, cluster: LocalCluster) -> Iterator[Sequence[str]]:
    inputs: list[Input | None] = [None, *(each for each in INPUTS if options.only in each.name)]
    for wanted in inputs:
        runs = [measured(cluster, wanted) for _ in range(options.repeats)]
        memory = [max(run.rss[each] for run in runs) / 2**20 for each in range(3)]
        yield (
            "nothing, for 5 s" if wanted is None else wanted.name,
            runs[-1].outcome,
            f"{max(run.took_s for run in runs):.1f}",
            " / ".join(f"{1000 * run.stood.loop:.0f}" for run in runs),
            " / ".join(f"{1000 * run.stood.live:.0f}" for run in runs),
            " / ".join(f"{1000 * run.stood.stream:.0f}" for run in runs),
            " → ".join(f"{each:.0f}" for each in memory),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of each input (default: 3)")
    parser.add_argument("--only", default="", metavar="TEXT", help="inputs whose name has it (default: all)")
    options = parser.parse_args()
    print("| input | answer | took, s | loop, ms | `/live`, ms | stream, ms | RSS, MiB |")
    print("|---|---|---|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as work_dir,
        LocalCluster([str(SHIPPED_MODEL), *FLAGS], Path(work_dir) / "log") as cluster,
    ):
        for row in rows(options, cluster):
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
