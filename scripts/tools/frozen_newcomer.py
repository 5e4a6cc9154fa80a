"""What a frozen newcomer costs the hand-offs of the others.

    scripts/dev frozen_newcomer --requests 200

Times requests of two tokens, one after the other, each with a hand-off of its own, over one prefill and one
decode node: first alone, then while a further prefill and a further decode node stand still, each frozen
(SIGSTOP) as soon as the router knows it. Exit code 1 when p99 grows to twice what it was, or more.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.process import end

FLAGS = ("--dtype", "float32", "--num-threads", "1", "--disable-prefix-cache")
NUM_PROMPT_TOKENS = 256
NUM_WARMUP = 20
MAX_RATIO = 2.0
START_S = 120.0


def measure(cluster: LocalCluster, num_requests: int, rng: random.Random) -> list[float]:
    """Seconds of each request."""
    durations = []
    for _ in range(num_requests):
        prompt = [rng.randrange(1, 4096) for _ in range(NUM_PROMPT_TOKENS)]
        body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        started_s = time.perf_counter()
        cluster.post("/v1/completions", body)
        durations.append(time.perf_counter() - started_s)
    return durations


@contextlib.contextmanager
def frozen_newcomer(cluster: LocalCluster, role: str) -> Iterator[None]:
    """A node that stands still from the moment at which the router knows it."""
    command = [sys.executable, "-P", "-m", "pdserve", role, str(SHIPPED_MODEL), *FLAGS, "--port", "0"]
    process = subprocess.Popen([*command, "--router", cluster.url], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while len(cluster.workers(role)) < 2:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no second {role} node within {START_S:g} s")
            time.sleep(0.005)
        psutil.Process(process.pid).suspend()
        yield
    finally:
        psutil.Process(process.pid).resume()
        end(process, grace_s=30.0)


def shown(what: str, durations: Sequence[float]) -> str:
    p99 = statistics.quantiles(durations, n=100)[98]
    return f"{what:<24} p50 {1000 * statistics.median(durations):6.1f} ms   p99 {1000 * p99:6.1f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="in each part (default: 200)")
    options = parser.parse_args()
    rng = random.Random(0)
    with (
        tempfile.TemporaryDirectory() as work_dir,
        LocalCluster([str(SHIPPED_MODEL), *FLAGS], log_path=Path(work_dir) / "log") as cluster,
    ):
        measure(cluster, NUM_WARMUP, rng)
        alone = measure(cluster, options.requests, rng)
        with frozen_newcomer(cluster, "prefill"), frozen_newcomer(cluster, "decode"):
            beside = measure(cluster, options.requests, rng)
    print(shown("alone", alone))
    print(shown("beside frozen newcomers", beside))
    ratio = statistics.quantiles(beside, n=100)[98] / statistics.quantiles(alone, n=100)[98]
    print(f"P99 RATIO {ratio:.2f}")
    return 0 if ratio < MAX_RATIO else 1


if __name__ == "__main__":
    raise SystemExit(main())
