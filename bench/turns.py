"""What decode's prefix cache saves a follow-up turn, and what local prefill costs running streams.

Three two-node clusters on this machine take turns: decode keeps nothing; decode keeps conversations and what
is missing comes from prefill; the default, which also prefills on decode where that is cheaper. Each gets the
same conversations. Prefill keeps its cache in all three. Then, for each chunk size, streams run while a
prompt is prefilled beside them on the decode node.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..models.config import ModelConfig
from ..runtime.errors import StartupError
from .handoff import ask
from .local_cluster import LocalCluster

_VOCAB_FLOOR = 100  # ids below may be special tokens
_SETUPS = {
    "decode keeps nothing": "decode:\n  disable-prefix-cache: true\n",
    "delta hand-off": "decode:\n  local-prefill-threshold: 0\n",
    "delta or local": "",
}
_ALWAYS_LOCAL = 1_000_000
_NUM_STREAMS = 2
_STREAM_TOKENS = 96
_NUM_TOKENS_BEFORE = 16  # of each stream, before the prompt comes


def random_prompt(rng: np.random.Generator, num_tokens: int, vocab_size: int) -> list[int]:
    return [int(token) for token in rng.integers(_VOCAB_FLOOR, vocab_size, num_tokens)]


def second_turn_s(cluster: LocalCluster, prompt: Sequence[int], num_output: int, new: Sequence[int]) -> float:
    """Seconds to the first token of the second turn of a conversation."""
    body = {"prompt": prompt, "max_tokens": num_output, "temperature": 0, "ignore_eos": True}
    first = cluster.post("/v1/completions", {**body, "return_token_ids": True})
    answer = first["choices"][0]["token_ids"]
    return ask(cluster.url, [*prompt, *answer, *new], 2).first_token_s


def measure_turns(options: argparse.Namespace, vocab_size: int, flags: Sequence[str]) -> None:
    """Prints a row for each setup: medians, and the ratio to the first one."""
    rng = np.random.default_rng(options.prompt_tokens)
    times: dict[str, list[float]] = {name: [] for name in _SETUPS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clusters = {}
        for number, (name, config) in enumerate(_SETUPS.items()):
            path = folder / f"{number}.yaml"
            path.write_text(config or "{}\n")
            clusters[name] = stack.enter_context(LocalCluster([*flags, "--config", str(path)]))
        for repeat in range(options.repeats + 1):  # the first one warms up
            prompt = random_prompt(rng, options.prompt_tokens, vocab_size)
            new = random_prompt(rng, options.new_tokens, vocab_size)
            for name, cluster in clusters.items():
                seconds = second_turn_s(cluster, prompt, options.output_tokens, new)
                if repeat:
                    times[name].append(seconds)
    print(
        f"second turn: {options.prompt_tokens} + {options.output_tokens} tokens of history, "
        f"{options.new_tokens} new; medians of {options.repeats}"
    )
    print("| | TTFT, ms | lowest to highest | ratio |\n|---|---|---|---|")
    base = statistics.median(next(iter(times.values())))
    for name, each in times.items():
        median = statistics.median(each)
        spread = f"{1000 * min(each):.0f} to {1000 * max(each):.0f}"
        print(f"| {name} | {1000 * median:.0f} | {spread} | {median / base:.2f} |")


def stream_gaps(
    cluster: LocalCluster, rng: np.random.Generator, vocab_size: int, num_beside: int
) -> tuple[list[float], list[float]]:
    """Seconds between tokens of running streams: alone, and while a prompt of `num_beside` is prefilled."""
    prompts = [random_prompt(rng, 32, vocab_size) for _ in range(_NUM_STREAMS)]
    beside = random_prompt(rng, num_beside, vocab_size)
    with ThreadPoolExecutor(_NUM_STREAMS) as pool:
        alone = [pool.submit(ask, cluster.url, prompt, _NUM_TOKENS_BEFORE) for prompt in prompts]
        quiet = [gap for future in alone for gap in future.result().gaps_s]
        running = [pool.submit(ask, cluster.url, prompt, _STREAM_TOKENS) for prompt in prompts]
        time.sleep(_NUM_TOKENS_BEFORE * statistics.median(quiet))  # until they run
        other = ask(cluster.url, beside, 2)
        during = []
        for future in running:
            stream = future.result()
            times = [stream.started + at for at in stream.token_times_s]
            during += [
                b - a
                for a, b in pairwise(times)
                if a >= other.started and b <= other.started + other.first_token_s
            ]
    return quiet, during


def measure_chunks(options: argparse.Namespace, vocab_size: int, flags: Sequence[str]) -> None:
    """Prints a row for each chunk size, over all gaps of all repeats."""
    print(f"\ngaps of {_NUM_STREAMS} streams while {options.beside_tokens} tokens are prefilled beside them")
    print("| chunk | alone, median ms | beside, median | p99 | gaps |\n|---|---|---|---|---|")
    for chunk in options.chunks:
        rng = np.random.default_rng(7)
        chosen = ["--local-prefill-chunk-size", str(chunk)] if chunk else []
        quiet: list[float] = []
        during: list[float] = []
        with LocalCluster([*flags, "--local-prefill-threshold", str(_ALWAYS_LOCAL), *chosen]) as cluster:
            for repeat in range(options.repeats + 1):
                alone, beside = stream_gaps(cluster, rng, vocab_size, options.beside_tokens)
                if repeat:
                    quiet += alone
                    during += beside
        p99 = statistics.quantiles(during, n=100)[98] if len(during) > 1 else float("nan")
        median = statistics.median(during) if during else float("nan")
        print(
            f"| {chunk or 'automatic'} | {1000 * statistics.median(quiet):.1f} | {1000 * median:.1f} "
            f"| {1000 * p99:.1f} | {len(during)} |",
            flush=True,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder, such as one of scripts/dev make_checkpoint small-llama")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="of the first turn")
    parser.add_argument("--output-tokens", type=int, default=64, metavar="N", help="of the first turn")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="of the second turn")
    parser.add_argument("--beside-tokens", type=int, default=256, metavar="N", help="beside streams")
    parser.add_argument(
        "--chunks", type=int, nargs="*", default=[0, 64, 256], metavar="N", help="0: as long as streams bear"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--num-threads", type=int, default=1, metavar="N", help="of each node")


def main(options: argparse.Namespace) -> int:
    """Raises StartupError for what cannot be run."""
    path = Path(options.model).expanduser()
    if not path.is_dir():
        raise StartupError(f"no model at {options.model}: a folder in Hugging Face format is expected")
    if options.repeats < 1:
        raise StartupError(f"--repeats {options.repeats}: 1 or more is expected")
    vocab_size = ModelConfig.from_dir(path).vocab_size
    flags = [options.model, "--num-threads", str(options.num_threads), "--log-level", "warning"]
    measure_turns(options, vocab_size, flags)
    measure_chunks(options, vocab_size, flags)
    return 0
