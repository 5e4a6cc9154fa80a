"""What the hand-off costs: two nodes against one that does both, on the same machine in the same run.

For each prompt length the same requests go to both clusters in turn: time to the first token (TTFT), to the
second token, the wire time of the pages, and from them what disaggregation adds. Then the speeds of prefill
and decode alone. Medians; the clusters share dtype, chunk, page size and threads, prefix caches are off.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from ..engine.model_config import ModelConfig
from ..runtime.errors import StartupError
from .local_cluster import LocalCluster

_VOCAB_FLOOR = 100  # ids below may be special tokens
_DECODE_TOKENS = 65


@dataclass(frozen=True, slots=True)
class Measured:
    """One request: seconds since it was sent, and the spans that the server reports."""

    first_token_s: float
    second_token_s: float
    last_token_s: float
    num_tokens: int
    stage_s: dict[str, float]  # spans of one stage added up
    num_bytes: int  # handed off

    @property
    def itl_s(self) -> float:
        """Mean gap between tokens from the second one on: the hand-off is not in it."""
        return (self.last_token_s - self.second_token_s) / (self.num_tokens - 2)


@dataclass(frozen=True, slots=True)
class Row:
    """Medians for one prompt length. Times in milliseconds."""

    prompt_tokens: int
    ttft_ms: float
    ttft_colocated_ms: float
    second_ms: float
    second_colocated_ms: float
    wire_ms: float
    wire_mib: float
    prefill_tokens_per_s: float
    itl_ms: float
    itl_colocated_ms: float


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
    started = time.perf_counter()
    times: list[float] = []
    stage_s: dict[str, float] = {}
    num_bytes = 0
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise StartupError(f"HTTP {response.status}: {response.read().decode(errors='replace')}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter() - started
            event = json.loads(line[6:])
            if "error" in event:
                raise StartupError(f"a request failed: {event['error']['message']}")
            for span in event.get("timeline", {}).get("spans", []):
                stage_s[span["name"]] = stage_s.get(span["name"], 0.0) + span["duration_s"]
                num_bytes += span.get("num_bytes", 0) if span["name"] == "wire" else 0
            for choice in event["choices"]:
                times += [now] * len(choice.get("token_ids") or [])
    except (http.client.HTTPException, OSError) as error:
        raise StartupError(f"{url}: the stream broke: {error!r}") from error
    finally:
        connection.close()
    if len(times) != max_tokens:
        raise StartupError(f"{len(times)} tokens came instead of {max_tokens}")
    return Measured(times[0], times[1], times[-1], len(times), stage_s, num_bytes)


def measure(two_nodes: str, colocated: str, prompt_tokens: int, repeats: int, vocab_size: int) -> Row:
    """Alternates the two clusters, after one warm-up each."""
    rng = np.random.default_rng(prompt_tokens)
    split: list[Measured] = []
    joined: list[Measured] = []
    for repeat in range(repeats + 1):
        prompt = [int(token) for token in rng.integers(_VOCAB_FLOOR, vocab_size, prompt_tokens)]
        turns = [(two_nodes, split), (colocated, joined)]
        for url, results in turns if repeat % 2 else reversed(turns):
            result = ask(url, prompt, _DECODE_TOKENS)
            if repeat:
                results.append(result)

    def median_ms(values: Sequence[float]) -> float:
        return 1000 * statistics.median(values)

    return Row(
        prompt_tokens=prompt_tokens,
        ttft_ms=median_ms([m.first_token_s for m in split]),
        ttft_colocated_ms=median_ms([m.first_token_s for m in joined]),
        second_ms=median_ms([m.second_token_s for m in split]),
        second_colocated_ms=median_ms([m.second_token_s for m in joined]),
        wire_ms=median_ms([m.stage_s["wire"] for m in split]),
        wire_mib=split[0].num_bytes / 2**20,
        prefill_tokens_per_s=prompt_tokens / statistics.median([m.stage_s["prefill_chunk"] for m in split]),
        itl_ms=median_ms([m.itl_s for m in split]),
        itl_colocated_ms=median_ms([m.itl_s for m in joined]),
    )


def print_rows(rows: Sequence[Row]) -> None:
    """A Markdown table. "Adds" is two nodes minus colocated."""
    names = ["prompt", "TTFT", "adds", "second token", "adds", "wire", "MiB", "ms/MiB"]
    names += ["prefill tok/s", "ITL", "colocated ITL"]
    print(f"| {' | '.join(names)} |")
    print(f"|{'---|' * len(names)}")
    for row in rows:
        print(
            f"| {row.prompt_tokens} | {row.ttft_ms:.1f} | {row.ttft_ms - row.ttft_colocated_ms:+.1f} "
            f"| {row.second_ms:.1f} | {row.second_ms - row.second_colocated_ms:+.1f} "
            f"| {row.wire_ms:.1f} | {row.wire_mib:.1f} | {row.wire_ms / row.wire_mib:.2f} "
            f"| {row.prefill_tokens_per_s:.0f} | {row.itl_ms:.2f} | {row.itl_colocated_ms:.2f} |"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder, such as one of scripts/make_checkpoint small-llama")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 512, 1024, 2048], metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--transfer-backend", default="mooncake", choices=("mooncake", "shm"))
    parser.add_argument("--chunked-prefill-size", type=int, default=512, metavar="N")
    parser.add_argument("--num-threads", type=int, default=1, metavar="N", help="of each node")


def main(options: argparse.Namespace) -> int:
    """Starts both clusters, measures, prints a Markdown table. Raises StartupError for what cannot be run."""
    path = Path(options.model).expanduser()
    if not path.is_dir():
        raise StartupError(f"no model at {options.model}: a folder in Hugging Face format is expected")
    config = ModelConfig.from_dir(path)
    if options.repeats < 1:
        raise StartupError(f"--repeats {options.repeats}: 1 or more is expected")
    longest = config.max_model_len - _DECODE_TOKENS
    if not all(1 <= num_tokens <= longest for num_tokens in options.prompt_tokens):
        raise StartupError(
            f"--prompt-tokens: 1 to {longest} are expected, {_DECODE_TOKENS} more are generated"
        )
    flags = [options.model, "--disable-prefix-cache", "--log-level", "warning"]
    flags += ["--num-threads", str(options.num_threads)]
    flags += ["--chunked-prefill-size", str(options.chunked_prefill_size)]
    with (
        LocalCluster([*flags, "--transfer-backend", options.transfer_backend]) as two_nodes,
        LocalCluster([*flags, "--colocated"]) as colocated,
    ):
        rows = [
            measure(two_nodes.url, colocated.url, prompt_tokens, options.repeats, config.vocab_size)
            for prompt_tokens in options.prompt_tokens
        ]
    how = f"{options.transfer_backend}, {options.num_threads} thread(s) a node"
    print(f"milliseconds, medians of {options.repeats}, {how}")
    print_rows(rows)
    return 0
