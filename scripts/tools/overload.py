"""What a cluster answers in time when more is asked of it than it can do, and what refusing the rest costs.

    scripts/dev overload --rates 34,42,126,420 --at-once 2000 -- --max-queue-wait 1 --nodes-nice 10

Starts a cluster on the shipped model, or with `--pdserve` that of another version, and has `pdserve bench
serve` ask at each rate, then with so many requests at once. Beside it a second process asks some ten times
a second and times what is refused: blocking sockets, before others where we may (nice), so that little but
the server is in its times, while the harness's have its own loop's lag in them. Told too is the share of a
core that each process took, and for how long the router could have gone on and had none: they all have
one machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

from pdserve.runtime.process import end

OURS = Path(sys.executable).with_name("pdserve")
READY = b"pdserve is ready at "
NUM_INPUT, NUM_OUTPUT = 64, 16  # tokens
NUM_PROBES = 3  # one that is taken in waits for its answer, while the others go on
PROBE_EVERY_S = 0.2  # each of them
PROBE_NICE = -10
COLUMNS = (
    *("requests a second", "good/s", "answered", "TTFT p50, p99, ms", "refused"),
    *(
        "time to refusal p50, p99, ms",
        "harness's loop lag p99, max, ms",
        "probe's time to refusal p50, p99, ms",
    ),
    *("router's RSS, MiB", "router waits for a core, % of the time", "% of a core"),
)


@contextmanager
def cluster(pdserve: Path, flags: Sequence[str], log_path: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Its URL, and the process whose children are the router and the nodes."""
    with log_path.open("wb") as log:
        process = subprocess.Popen([pdserve, "up", "--port", "0", *flags], stdout=subprocess.PIPE, stderr=log)
    assert process.stdout is not None
    try:
        ready = next((line for line in process.stdout if line.startswith(READY)), None)
        if ready is None:
            raise SystemExit(f"the cluster ended instead of serving:\n{log_path.read_text()}")
        yield ready.removeprefix(READY).decode().strip(), psutil.Process(process.pid)
    finally:
        end(process, 30.0)


def probe(url: str, pipe: Connection) -> None:
    """Sends the seconds to each refusal, once told to end."""
    with suppress(PermissionError):
        os.nice(PROBE_NICE)
    refused_s: list[float] = []
    is_over = threading.Event()
    probes = [
        threading.Thread(target=ask_and_ask, args=(url, refused_s, is_over), daemon=True)
        for _ in range(NUM_PROBES)
    ]
    for each in probes:
        each.start()
    pipe.recv()
    is_over.set()
    for each in probes:
        each.join()
    pipe.send(refused_s)


def ask_and_ask(url: str, refused_s: list[float], is_over: threading.Event) -> None:
    address = urlsplit(url)
    body = json.dumps({"prompt": list(range(5, 5 + NUM_INPUT)), "max_tokens": 1}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    connection: socket.socket | None = None
    while not is_over.wait(PROBE_EVERY_S):
        connection = connection or socket.create_connection((address.hostname, address.port))
        connection.settimeout(10.0)
        began = time.perf_counter()
        answer = b""
        with suppress(OSError):
            connection.sendall(request)
            answer = connection.recv(1 << 16)
        if answer.startswith((b"HTTP/1.1 429", b"HTTP/1.1 503")):
            refused_s.append(time.perf_counter() - began)
            while not answer.endswith(b"}"):
                answer += connection.recv(1 << 16)
        else:
            connection.close()
            connection = None


def name_of(process: psutil.Process) -> str:
    """`router`, `prefill`, `node-front decode`: the command, and its role where it has one."""
    words = process.cmdline()
    if "pdserve" not in words:
        return process.name()
    roles = [words[number + 1] for number, word in enumerate(words[:-1]) if word == "--role"]
    return " ".join([words[words.index("pdserve") + 1], *roles])


@dataclass(frozen=True, slots=True)
class Usage:
    processor_s: float
    rss: int  # bytes


def usage(up: psutil.Process) -> dict[psutil.Process, Usage]:
    found = {}
    for process in up.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found[process] = Usage(times.user + times.system, process.memory_info().rss)
    return found


def waited_s(up: psutil.Process) -> float:
    """Seconds for which the router's loop so far could have gone on and had no core."""
    router = next((child for child in up.children() if name_of(child) == "router"), None)
    if router is None:
        return 0.0
    return int(Path(f"/proc/{router.pid}/task/{router.pid}/schedstat").read_text().split()[1]) / 1e9


def harness(url: str, result: Path, num_prompts: int, rate: str) -> float:
    """Seconds of a processor that it took, its start included."""
    lengths = ("--random-input-len", str(NUM_INPUT), "--random-output-len", str(NUM_OUTPUT))
    report = ("--goodput", "ttft:2000", "--disable-tqdm", "--result-filename", str(result))
    load = ("--num-prompts", str(num_prompts), "--request-rate", rate)
    process = subprocess.Popen(
        [OURS, "bench", "serve", "--base-url", url, *load, *lengths, *report], stdout=subprocess.DEVNULL
    )
    _, status, taken = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("the harness failed")
    return taken.ru_utime + taken.ru_stime


def in_ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def percentiles(samples_ms: Sequence[float]) -> str:
    """The median, the 99th, and of how many."""
    if not samples_ms:
        return "-"
    return f"{np.median(samples_ms):.0f}, {np.percentile(samples_ms, 99):.0f} of {len(samples_ms)}"


def row(
    url: str, up: psutil.Process, result: Path, num_prompts: int, rate: str, start_s: float
) -> Sequence[str]:
    """`start_s`: of a processor, what the harness takes before it asks for anything."""
    ours, theirs = multiprocessing.Pipe()
    prober = multiprocessing.get_context("spawn").Process(target=probe, args=(url, theirs), daemon=True)
    prober.start()
    before, waited_before_s = usage(up), waited_s(up)
    harness_s = harness(url, result, num_prompts, rate) - start_s
    after, router_waited_s = usage(up), waited_s(up) - waited_before_s
    ours.send(None)
    probed_ms = [1000 * each for each in ours.recv()]
    prober.join()
    told: dict[str, Any] = json.loads(result.read_text())
    took_s = told["duration"]
    shares = {"harness": harness_s / took_s} | {
        name_of(process): (used.processor_s - before[process].processor_s) / took_s
        for process, used in after.items()
        if process in before
    }
    router = next((used for process, used in after.items() if name_of(process) == "router"), None)
    statuses = told["outcomes"]
    return (
        f"{num_prompts} at once" if rate == "inf" else rate,
        f"{told['request_goodput']:.1f}",
        f"{told['completed']}",
        f"{in_ms(told['median_ttft_ms'])}, {in_ms(told['p99_ttft_ms'])}",
        f"{statuses['http_4xx'] + statuses['http_5xx']}",
        f"{in_ms(told['median_time_to_refusal_ms'])}, {in_ms(told['p99_time_to_refusal_ms'])}",
        f"{in_ms(told['p99_loop_lag_ms'])}, {in_ms(told['max_loop_lag_ms'])}",
        percentiles(probed_ms),
        "-" if router is None else f"{router.rss / 2**20:.0f}",
        f"{100 * router_waited_s / took_s:.0f}",
        ", ".join(f"{name} {100 * share:.0f}" for name, share in shares.items() if share > 0.005),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", default="34,42,126,420", help="requests a second, comma separated")
    parser.add_argument("--at-once", type=int, default=2000, metavar="N", help="0: leave that out")
    parser.add_argument("--seconds", type=float, default=8.0, help="at each rate")
    parser.add_argument("--pdserve", type=Path, default=OURS, help="the cluster's (default: this version's)")
    parser.add_argument("flags", nargs="*", help="of the cluster, behind --")
    options = parser.parse_args()
    loads = [(max(1, round(float(rate) * options.seconds)), rate) for rate in options.rates.split(",")]
    if options.at_once:
        loads.append((options.at_once, "inf"))
    print("|", " | ".join(COLUMNS), "|")
    print("|" + "---|" * len(COLUMNS))
    with (
        tempfile.TemporaryDirectory() as work_dir,
        cluster(options.pdserve, options.flags, Path(work_dir) / "log") as (url, up),
    ):
        result = Path(work_dir) / "result.json"
        start_s = harness(url, result, 1, "inf")
        for num_prompts, rate in loads:
            cells = row(url, up, result, num_prompts, rate, start_s)
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
