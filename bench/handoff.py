"""What the hand-off costs: two nodes against one that does both, on the same machine in the same run.

One factor at a time changes around 1k tokens, pages of 16, Mooncake TCP, overlap on; `--rows` picks some
of the rows. In each, the same requests go to both clusters in turns: time to the first token (TTFT) and the
second (TT2T), as the client sees it, and the server's own timeline. The clusters share dtype, chunk and page
size, prefix caches are off, and the engine that prefills has the same number of threads in both.

"Adds" is two nodes minus colocated, the median of the pairs. A bar is met, missed or "not told": by where the
interval lies that holds the true median with 90 % or more, whatever the distribution.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import numpy as np

from ..messages.timeline import Span, covered_s
from ..models.config import ModelConfig
from ..runtime.errors import StartupError
from .local_cluster import LocalCluster

_VOCAB_FLOOR = 100  # ids below may be special tokens
_DECODE_TOKENS = 17
_FIRST_TOKEN_BAR_MS = 5.0
_SECOND_TOKEN_BAR_MS = 5.0  # beside the wire time of the last chunk and one decode step
_COVERAGE = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row of the table."""

    name: str
    prompt_tokens: int = 1024
    page_size: int = 16
    backend: str = "mooncake"
    overlaps: bool = True

    @property
    def cluster_flags(self) -> tuple[str, ...]:
        """What both clusters are started with."""
        return ("--page-size", str(self.page_size))

    @property
    def transfer_flags(self) -> tuple[str, ...]:
        backend = ("--transfer-backend", self.backend)
        return backend if self.overlaps else (*backend, "--disable-transfer-overlap")


# In an order in which rows that can share their clusters are neighbours.
CASES = (
    Case(name="1k"),
    Case(name="128", prompt_tokens=128),
    Case(name="4k", prompt_tokens=4096),
    Case(name="16k", prompt_tokens=16384),
    Case(name="overlap-off", overlaps=False),
    Case(name="shm", backend="shm"),
    Case(name="page-32", page_size=32),
    Case(name="page-64", page_size=64),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One request: seconds since it was sent, and the spans that the server reports."""

    first_token_s: float
    second_token_s: float
    last_token_s: float
    num_tokens: int
    spans: tuple[Span, ...]
    started: float  # on the clock of `time.perf_counter`
    token_times_s: tuple[float, ...]  # since then, of each token

    def stage_s(self, name: str) -> float:
        """The spans of one stage, added up."""
        return sum(span.duration_s for span in self.spans if span.name == name)

    @property
    def wires(self) -> list[Span]:
        """One a chunk, in their order; none of a node that prefills itself."""
        return [span for span in self.spans if span.name == "wire"]

    @property
    def wire_busy_s(self) -> float:
        return covered_s(self.wires, 0.0, math.inf)

    @property
    def last_wire_s(self) -> float:
        """Of the pages that became ready with the end of the prefill."""
        return self.wires[-1].duration_s if self.wires else 0.0

    @property
    def first_left_s(self) -> float:
        """What is left of TTFT without the engine's time: the control plane."""
        return self.first_token_s - self.stage_s("prefill_chunk")

    @property
    def second_left_s(self) -> float:
        """What is left of TT2T without the engine's time and the last chunk's wire time."""
        accounted = self.stage_s("prefill_chunk") + self.stage_s("first_decode_step") + self.last_wire_s
        return self.second_token_s - accounted

    @property
    def itl_s(self) -> float:
        """Mean gap between tokens from the second one on: the hand-off is not in it."""
        return (self.last_token_s - self.second_token_s) / (self.num_tokens - 2)

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens, from the second one on."""
        return [b - a for a, b in pairwise(self.token_times_s[1:])]


@dataclass(frozen=True, slots=True)
class Pair:
    """The same prompt on both clusters, one after the other."""

    split: Measured
    joined: Measured


class _Event(msgspec.Struct):
    """What is read of a chunk of the stream."""

    choices: list[_Choice] = []
    timeline: _Timeline | None = None
    error: dict[str, object] | None = None


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _SpanBody(msgspec.Struct):
    name: str
    start_s: float
    duration_s: float
    num_bytes: int = 0
    num_tokens: int = 0


class _Timeline(msgspec.Struct):
    spans: list[_SpanBody]


def ask(url: str, prompt: Sequence[int], max_tokens: int) -> Measured:
    """Stream one greedy completion and time its tokens. Raises StartupError when it does not end properly."""
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname or "127.0.0.1", target.port, timeout=600)
    body = json.dumps(
        {
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "timeline": True,
            "return_token_ids": True,
        }
    )
    decoder = msgspec.json.Decoder(_Event)
    started = time.perf_counter()
    times: list[float] = []
    spans: list[Span] = []
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise StartupError(f"HTTP {response.status}: {response.read().decode(errors='replace')}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter() - started
            event = decoder.decode(line[6:])
            if event.error is not None:
                raise StartupError(f"a request failed: {event.error.get('message')}")
            for choice in event.choices:
                times += [now] * len(choice.token_ids or [])
            for span in event.timeline.spans if event.timeline is not None else []:
                spans.append(Span(span.name, span.start_s, span.duration_s, span.num_bytes, span.num_tokens))
    except (http.client.HTTPException, OSError) as error:
        raise StartupError(f"{url}: the stream broke: {error!r}") from error
    finally:
        connection.close()
    if len(times) != max_tokens:
        raise StartupError(f"{len(times)} tokens came instead of {max_tokens}")
    return Measured(times[0], times[1], times[-1], len(times), tuple(spans), started, tuple(times))


def measure(two_nodes: str, colocated: str, case: Case, repeats: int, vocab_size: int) -> list[Pair]:
    """Alternates the two clusters, A B then B A, after one warm-up each."""
    rng = np.random.default_rng(case.prompt_tokens)
    pairs: list[Pair] = []
    for repeat in range(repeats + 1):
        prompt = [int(token) for token in rng.integers(_VOCAB_FLOOR, vocab_size, case.prompt_tokens)]
        order = (two_nodes, colocated) if repeat % 2 else (colocated, two_nodes)
        by_url = {url: ask(url, prompt, _DECODE_TOKENS) for url in order}
        if repeat:
            pairs.append(Pair(by_url[two_nodes], by_url[colocated]))
    return pairs


@dataclass(frozen=True, slots=True)
class Interval:
    """A median, and between which of the values the true one lies with at least 90 % (5 values: all)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """By order statistics: no distribution is assumed. Of fewer than five values, all and no promise."""
        ordered = sorted(values)
        count = len(ordered)
        dropped = 0  # at either end
        # The true median lies outside of what is kept when `dropped` or fewer values lie on one side of it.
        while 2 * dropped + 2 < count and _coverage(count, dropped + 1) >= _COVERAGE:
            dropped += 1
        return cls(statistics.median(ordered), ordered[dropped], ordered[count - 1 - dropped])

    def verdict(self, bar: float) -> str:
        if self.high <= bar:
            return "met"
        return "missed" if self.low > bar else "not told"

    def __str__(self) -> str:
        return f"{self.median:+.1f} ({self.low:+.1f} … {self.high:+.1f})"


def _coverage(count: int, dropped: int) -> float:
    """How surely the true median lies between the values left when `dropped` are left out at either end."""
    return 1.0 - 2.0 * sum(math.comb(count, k) for k in range(dropped + 1)) / 2.0**count


@dataclass(frozen=True, slots=True)
class Row:
    """What one case showed. Times in milliseconds, medians."""

    case: Case
    first: float
    first_colocated: float
    first_adds: Interval
    second: float
    second_colocated: float
    second_adds: Interval
    wire: float
    wire_mib: float
    last_wire: float
    num_chunks: int
    step: float
    first_left: float
    first_left_adds: Interval
    second_left: float
    second_left_adds: Interval
    itl: float
    itl_colocated: float

    @property
    def second_bar(self) -> float:
        return self.last_wire + self.step + _SECOND_TOKEN_BAR_MS

    @property
    def cells(self) -> tuple[str, ...]:
        # What the engine takes varies by more than the bars; what is left without it is told apart.
        second_bar_left = self.second_bar - self.last_wire
        return (
            self.case.name,
            f"{self.first:.1f}",
            f"{self.first_colocated:.1f}",
            str(self.first_adds),
            self.first_adds.verdict(_FIRST_TOKEN_BAR_MS),
            f"{self.second:.1f}",
            f"{self.second_colocated:.1f}",
            str(self.second_adds),
            f"{self.second_bar:.1f}: {self.second_adds.verdict(self.second_bar)}",
            f"{self.wire:.1f}",
            f"{self.wire_mib:.1f}",
            f"{self.last_wire:.1f}",
            f"{self.first_left:.1f}",
            f"{self.first_left_adds} {self.first_left_adds.verdict(_FIRST_TOKEN_BAR_MS)}",
            f"{self.second_left:.1f}",
            f"{self.second_left_adds} {self.second_left_adds.verdict(second_bar_left)}",
            f"{self.itl:.1f}",
            f"{self.itl_colocated:.1f}",
        )


COLUMNS = (
    *("row", "TTFT", "colocated", "adds", "bar 5"),
    *("TT2T", "colocated", "adds", "bar"),
    *("wire busy", "MiB", "last chunk's wire"),
    *("TTFT left", "adds", "TT2T left", "adds"),
    *("ITL", "colocated"),
)


def summarize(case: Case, pairs: Sequence[Pair]) -> Row:
    def median_ms(of: Callable[[Measured], float], *, joined: bool = False) -> float:
        return 1000 * statistics.median(of(pair.joined if joined else pair.split) for pair in pairs)

    def adds_ms(of: Callable[[Measured], float]) -> Interval:
        return Interval.of([1000 * (of(pair.split) - of(pair.joined)) for pair in pairs])

    return Row(
        case=case,
        first=median_ms(lambda m: m.first_token_s),
        first_colocated=median_ms(lambda m: m.first_token_s, joined=True),
        first_adds=adds_ms(lambda m: m.first_token_s),
        second=median_ms(lambda m: m.second_token_s),
        second_colocated=median_ms(lambda m: m.second_token_s, joined=True),
        second_adds=adds_ms(lambda m: m.second_token_s),
        wire=median_ms(lambda m: m.wire_busy_s),
        wire_mib=sum(span.num_bytes for span in pairs[0].split.wires) / 2**20,
        last_wire=median_ms(lambda m: m.last_wire_s),
        num_chunks=len(pairs[0].split.wires),
        step=median_ms(lambda m: m.stage_s("first_decode_step")),
        first_left=median_ms(lambda m: m.first_left_s),
        first_left_adds=adds_ms(lambda m: m.first_left_s),
        second_left=median_ms(lambda m: m.second_left_s),
        second_left_adds=adds_ms(lambda m: m.second_left_s),
        itl=median_ms(lambda m: m.itl_s),
        itl_colocated=median_ms(lambda m: m.itl_s, joined=True),
    )


def stages_of(pairs: Sequence[Pair]) -> Iterator[str]:
    """Where the control plane's time went: the median of each stage, two nodes and colocated."""
    names = dict.fromkeys(span.name for pair in pairs for span in pair.split.spans)
    for name in names:
        split, joined = (
            1000 * statistics.median(measured.stage_s(name) for measured in side)
            for side in ([pair.split for pair in pairs], [pair.joined for pair in pairs])
        )
        yield f"  {name:<20}{split:>10.2f}{joined:>10.2f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder, such as one of scripts/dev make_checkpoint small-llama")
    names = [case.name for case in CASES]
    parser.add_argument("--rows", nargs="+", default=names, choices=names, help="of the table (default: all)")
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", metavar="N", help="these lengths instead of the rows"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--chunked-prefill-size", type=int, default=512, metavar="N")
    parser.add_argument("--num-threads", type=int, default=1, metavar="N", help="of each node")
    parser.add_argument("--stages", action="store_true", help="print the median of every stage below a row")


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The rows that are asked for. Raises StartupError for what cannot be run."""
    if options.prompt_tokens:
        return [Case(name=str(length), prompt_tokens=length) for length in options.prompt_tokens]
    return [case for case in CASES if case.name in options.rows]


def main(options: argparse.Namespace) -> int:
    """Starts both clusters, measures, prints a Markdown table. Raises StartupError for what cannot be run."""
    path = Path(options.model).expanduser()
    if not path.is_dir():
        raise StartupError(f"no model at {options.model}: a folder in Hugging Face format is expected")
    config = ModelConfig.from_dir(path)
    if options.repeats < 1:
        raise StartupError(f"--repeats {options.repeats}: 1 or more is expected")
    cases = cases_of(options)
    longest = config.max_model_len - _DECODE_TOKENS
    for case in cases:
        if not 1 <= case.prompt_tokens <= longest:
            raise StartupError(
                f"a prompt of {case.prompt_tokens} tokens: 1 to {longest} are expected of this model, "
                f"{_DECODE_TOKENS} more are generated"
            )
    needed = max(case.prompt_tokens for case in cases) + _DECODE_TOKENS
    flags = [options.model, "--disable-prefix-cache", "--log-level", "warning"]
    flags += ["--num-threads", str(options.num_threads), "--max-model-len", str(needed)]
    flags += ["--chunked-prefill-size", str(options.chunked_prefill_size)]
    print(
        f"milliseconds, medians of {options.repeats} (and the interval of the median), chunks of "
        f"{options.chunked_prefill_size}, {options.num_threads} thread(s) a node"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for _, group in groupby(cases, key=lambda s: (s.cluster_flags, s.transfer_flags)):
        rows = list(group)
        common = [*flags, *rows[0].cluster_flags]
        with (
            LocalCluster([*common, *rows[0].transfer_flags]) as two_nodes,
            LocalCluster([*common, "--colocated"]) as colocated,
        ):
            for case in rows:
                pairs = measure(two_nodes.url, colocated.url, case, options.repeats, config.vocab_size)
                print(f"| {' | '.join(summarize(case, pairs).cells)} |", flush=True)
                if options.stages:
                    print("\n".join(stages_of(pairs)), flush=True)
    return 0
