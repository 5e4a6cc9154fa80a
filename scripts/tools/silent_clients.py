"""What clients that read nothing, or send nothing more, cost the others, and when they are cut off.

    scripts/dev silent_clients

Starts a cluster on the shipped model that generates for 16 requests at a time. Then there come, in turn:

* 60 clients that have answers of 1,900 tokens streamed, each with 20 log probabilities, and read nothing;
* 8,000 connections, of which every second one sends nothing, and the others half a header;
* 40 bodies of 31 MB, each without its last byte.

Meanwhile an ordinary completion of 16 tokens is asked for again and again. Told are how long the first and
the slowest one took (with the waits that refusals asked for), when the last of the silent was cut off, what
the log said of them, and the router's memory (RSS) before, at its peak, and 8 s after. Exit code 1 when
somebody was not cut off within 10 minutes, or an ordinary completion was not answered.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import resource
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL

FLAGS = ("--num-threads", "1", "--max-running-requests", "16")
CUT_OFF_WITHIN_S = 600.0
SETTLED_S = 8.0  # after which memory has been returned, or is not
BODY_BYTES = 31 << 20
RECEIVED_BYTES = 64 << 10  # that a client's kernel takes; by itself it takes 6 MB, most of such an answer
_CUT_OFF = re.compile(r"cut off: (it reads nothing|no \w+ for [\d.]+ s)")


@dataclass(frozen=True, slots=True)
class Silent:
    name: str
    num_clients: int
    sends: Callable[[int], bytes]  # of a client, by its number


def post(body: bytes, length: int) -> bytes:
    """A completion's request, whose body has so many bytes in all."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + body


def whole(**fields: object) -> bytes:
    body = json.dumps(fields).encode()
    return post(body, len(body))


UNREAD = whole(prompt="def", max_tokens=1900, stream=True, ignore_eos=True, logprobs=20)
HALF_A_HEADER = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le"
KINDS = (
    Silent("answers that nobody reads", 60, lambda _: UNREAD),
    Silent("nothing, or half a header", 8000, lambda number: HALF_A_HEADER if number % 2 else b""),
    Silent("bodies that do not end", 40, lambda _: post(b" " * (BODY_BYTES - 1), BODY_BYTES)),
)


class Ordinary(threading.Thread):
    """Completions, one after the other."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._address = urlsplit(url)
        self._is_over = threading.Event()
        self.took_s: list[float] = []  # with the waits that refusals asked for
        self.refusals: Counter[int] = Counter()  # by status
        self.failures: list[str] = []

    def run(self) -> None:
        while not self._is_over.is_set():
            began_s = time.monotonic()
            try:
                while (retry_after_s := self._ask()) and time.monotonic() - began_s < CUT_OFF_WITHIN_S:
                    time.sleep(retry_after_s)
            except OSError as error:
                self.failures.append(f"an ordinary completion: {error!r}")
                return
            self.took_s.append(time.monotonic() - began_s)
            if retry_after_s:
                self.failures.append("an ordinary completion was refused to the end")
            self._is_over.wait(0.5)

    def end(self) -> None:
        self._is_over.set()
        self.join()

    def _ask(self) -> float:
        """0 when it was answered; otherwise in how many seconds to ask again."""
        connection = http.client.HTTPConnection(
            self._address.hostname or "", self._address.port, timeout=CUT_OFF_WITHIN_S
        )
        try:
            body = json.dumps({"prompt": "class Stack:", "max_tokens": 16, "ignore_eos": True})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status == 200:
            return 0.0
        self.refusals[answer.status] += 1
        if answer.status not in (429, 503):
            self.failures.append(f"an ordinary completion: {answer.status}: {text[:200]!r}")
        return float(answer.headers.get("Retry-After", 1.0))


def connect(url: str, sends: bytes) -> socket.socket:
    """A client that has sent this, or as much of it as was taken within a second."""
    address = urlsplit(url)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVED_BYTES)
    client.settimeout(30.0)
    client.connect((address.hostname, address.port))
    client.settimeout(1.0)
    with contextlib.suppress(OSError):  # the server takes no more: a body too many
        client.sendall(sends)
    return client


@dataclass
class Outcome:
    kind: Silent
    first_s: float = 0.0  # of ordinary completions
    slowest_s: float = 0.0
    num_ordinary: int = 0
    refusals: Counter[int] = field(default_factory=Counter)
    last_cut_s: float = 0.0  # after the last of the silent came
    log: Counter[str] = field(default_factory=Counter)
    rss: tuple[int, int, int] = (0, 0, 0)  # bytes: before, at the peak, after
    failures: list[str] = field(default_factory=list)


class Router:
    """What an operator sees of it."""

    def __init__(self, process: psutil.Process, log_path: Path) -> None:
        self._process = process
        self._log_path = log_path

    @property
    def rss(self) -> int:
        num_bytes: int = self._process.memory_info().rss
        return num_bytes

    @property
    def num_open(self) -> int:
        """Files and connections."""
        num: int = self._process.num_fds()
        return num

    def said(self) -> Counter[str]:
        """Why it cut connections off, so far."""
        return Counter(_CUT_OFF.findall(self._log_path.read_text()))


def met(kind: Silent, url: str, router: Router) -> Outcome:
    """These clients come, and stay until they are cut off."""
    outcome = Outcome(kind)
    num_before, said_before, rss_before = router.num_open, router.said(), router.rss
    at_peak = rss_before
    clients = [connect(url, kind.sends(number)) for number in range(kind.num_clients)]
    came_s = time.monotonic()
    ordinary = Ordinary(url)
    ordinary.start()
    while router.num_open > num_before + 1:  # the ordinary client's own
        at_peak = max(at_peak, router.rss)
        if time.monotonic() - came_s > CUT_OFF_WITHIN_S:
            outcome.failures.append(f"{kind.name}: {router.num_open - num_before} are not cut off")
            break
        time.sleep(0.05)
    outcome.last_cut_s = time.monotonic() - came_s
    ordinary.end()
    for client in clients:
        client.close()
    time.sleep(SETTLED_S)
    outcome.first_s, outcome.slowest_s = ordinary.took_s[0], max(ordinary.took_s)
    outcome.num_ordinary, outcome.refusals = len(ordinary.took_s), ordinary.refusals
    outcome.log = router.said() - said_before
    outcome.rss = rss_before, at_peak, router.rss
    outcome.failures += ordinary.failures
    return outcome


def row(outcome: Outcome) -> Sequence[str]:
    said = ", ".join(f"{num:,} x {reason}" for reason, num in outcome.log.most_common())
    refused = ", ".join(f"{num} x {status}" for status, num in outcome.refusals.items())
    return (
        f"{outcome.kind.num_clients:,} x {outcome.kind.name}",
        f"{outcome.first_s:.2f}, {outcome.slowest_s:.2f} ({outcome.num_ordinary} in all)",
        refused or "none",
        f"{outcome.last_cut_s:.0f}",
        said,
        " → ".join(f"{num / 2**20:.0f}" for num in outcome.rss),
    )


def main() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print("| silent | ordinary: first, slowest, s | refused | last cut off after, s | log | RSS, MiB |")
    print("|---|---|---|---|---|---|")
    failures = []
    with tempfile.TemporaryDirectory() as work_dir:
        log_path = Path(work_dir) / "log"
        with LocalCluster([str(SHIPPED_MODEL), *FLAGS, *sys.argv[1:]], log_path) as cluster:
            router = Router(cluster.process("router"), log_path)
            for kind in KINDS:
                outcome = met(kind, cluster.url, router)
                print("|", " | ".join(row(outcome)), "|", flush=True)
                failures += outcome.failures
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
