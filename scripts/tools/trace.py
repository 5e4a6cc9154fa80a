"""Which functions of pdserve a request passes: to its first token, to its second, and for each one later.

    scripts/dev trace [MODEL] [--requests N]
    scripts/dev trace --list                    # every function, in the order of the first visit

Starts a router, a prefill and a decode node whose Python calls are all written down, and streams completions,
one after the other, each with a prompt of its own, so that each is handed off. A function counts when more
than half of the requests passed it (of later tokens: more than half of the tokens): what a node does beside,
such as its heartbeats, falls out where the machine is quiet. Calls and changes of file are medians.
Comprehensions are part of the function that they are in; a coroutine that goes on is a call.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL

HOOK = Path(__file__).with_name("trace_hook")
FOLDER_VARIABLE = "PDSERVE_TRACE_FOLDER"  # as in the hook, which must not be imported here: it would trace us
FLAGS = ("--dtype", "float32", "--num-threads", "1", "--kv-cache-gb", "0.2")
NUM_WARMUP = 2
NUM_TOKENS = 16
SETTLED_S = 0.5  # after which a request leaves nothing to do
NUM_FILES_SHOWN = 12
PROMPT = '''# request {number} of a series
class Stack:
    """A stack of numbers, with a maximum."""

    def push(self, value):
'''
# By folder. All others are of the nodes.
PARTS = {
    "api": ("api", "links", "front"),
    "router": ("router",),
    "engine": ("engine", "kernels", "models"),
    "messages, runtime": ("messages", "runtime"),
}
REST = "both schedulers"


class Function(NamedTuple):
    file: str  # within pdserve
    name: str

    @property
    def part(self) -> str:
        folder = self.file.partition("/")[0]
        return next((part for part, folders in PARTS.items() if folder in folders), REST)


@dataclass(frozen=True, slots=True)
class Event:
    at_ns: int
    thread: str  # of which process
    is_call: bool
    function: Function


@dataclass(slots=True)
class Walk:
    """What was passed between two moments."""

    calls: Counter[Function] = field(default_factory=Counter)
    first_visits: list[Function] = field(default_factory=list)  # each once, in order
    entries: Counter[str] = field(default_factory=Counter)  # how often each file was come to from another one

    @property
    def num_file_changes(self) -> int:
        return self.entries.total()


def walk(events: Iterable[Event], start_ns: int, end_ns: int) -> Walk:
    """`events` in the order of their times. Where a thread is follows from all that came before."""
    found = Walk()
    stacks: defaultdict[str, list[Function]] = defaultdict(list)
    places: dict[str, str] = {}  # the file that each thread was in last
    for event in events:
        if event.at_ns >= end_ns:
            break
        is_inside = event.at_ns >= start_ns
        stack = stacks[event.thread]
        if event.is_call:
            stack.append(event.function)
            if is_inside:
                if event.function not in found.calls:
                    found.first_visits.append(event.function)
                found.calls[event.function] += 1
        elif stack:
            stack.pop()
        if stack and places.get(event.thread) != stack[-1].file:
            places[event.thread] = stack[-1].file
            if is_inside:
                found.entries[stack[-1].file] += 1
    return found


@dataclass(frozen=True, slots=True)
class Usual:
    """What most of several walks have in common."""

    functions: tuple[Function, ...]  # in the order of the first visit
    num_calls: dict[str, float]  # medians, by part
    entries: dict[str, float]  # medians, by file
    num_file_changes: float


def usual(walks: Sequence[Walk]) -> Usual:
    times_seen = Counter(function for each in walks for function in each.first_visits)
    order = dict.fromkeys(function for each in walks for function in each.first_visits)
    functions = tuple(function for function in order if 2 * times_seen[function] > len(walks))
    return Usual(
        functions,
        {
            part: statistics.median(
                sum(count for function, count in each.calls.items() if function.part == part)
                for each in walks
            )
            for part in (*PARTS, REST)
        },
        {
            file: statistics.median(each.entries[file] for each in walks)
            for file in sorted({file for each in walks for file in each.entries})
        },
        statistics.median(each.num_file_changes for each in walks),
    )


def idle(events: Sequence[Event], times: Iterable[Sequence[int]]) -> list[Function]:
    """What is passed while there is no request: in the half of the pause before each that is nearer to it."""
    pause_ns = round(SETTLED_S / 2 * 1e9)
    walks = [walk(events, each[0] - pause_ns, each[0]) for each in times]
    return list(dict.fromkeys(function for each in walks for function in each.first_visits))


def read_events(folder: Path) -> list[Event]:
    events: list[Event] = []
    for path in folder.glob("*.tsv"):
        for line in path.read_text().splitlines():
            at_ns, thread, kind, file, name = line.split("\t")
            events.append(Event(int(at_ns), f"{path.stem} {thread}", kind == "call", Function(file, name)))
    events.sort(key=lambda event: event.at_ns)
    return events


def stream(url: str, prompt: str) -> list[int]:
    """Monotonic nanoseconds: when it was sent, and when each token came."""
    target = urlsplit(url)
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
    try:
        times = [time.monotonic_ns()]
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        times += [time.monotonic_ns() for line in response if line.startswith(b"data: {")]
    finally:
        connection.close()
    if response.status != 200 or len(times) < NUM_TOKENS + 1:
        raise SystemExit(f"HTTP {response.status} and {len(times) - 1} tokens: all {NUM_TOKENS} are expected")
    return times[: NUM_TOKENS + 1]


def traced(model: str, num_requests: int) -> tuple[list[Event], list[list[int]]]:
    """All events of a cluster, and the times of each request."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER_VARIABLE] = folder
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HOOK), os.environ.get("PYTHONPATH"))))
        times = []
        with LocalCluster([model, *FLAGS], Path(folder) / "log") as cluster:
            for number in range(NUM_WARMUP + num_requests):
                times.append(stream(cluster.url, PROMPT.format(number=number)))
                time.sleep(SETTLED_S)
        return read_events(Path(folder)), times[NUM_WARMUP:]


def table(columns: dict[str, Usual]) -> Iterator[str]:
    titles = [f"{title}: functions / files / calls" for title in columns]
    yield f"| part | {' | '.join(titles)} |"
    yield f"|---|{'---|' * len(titles)}"
    for part in (*PARTS, REST):
        cells = []
        for column in columns.values():
            functions = [function for function in column.functions if function.part == part]
            files = {function.file for function in functions}
            cells.append(f"{len(functions)} / {len(files)} / {column.num_calls[part]:.0f}")
        yield f"| {part} | {' | '.join(cells)} |"
    cells = [
        f"{len(each.functions)} / {len({function.file for function in each.functions})} "
        f"/ {sum(each.num_calls.values()):.0f}"
        for each in columns.values()
    ]
    yield f"| all | {' | '.join(cells)} |"
    yield f"| changes of file | {' | '.join(f'{each.num_file_changes:.0f}' for each in columns.values())} |"


def files(column: Usual) -> Iterator[str]:
    """Those that are come to most often."""
    yield "| file | come to | functions |"
    yield "|---|---|---|"
    most = sorted(column.entries.items(), key=lambda item: -item[1])[:NUM_FILES_SHOWN]
    for file, count in most:
        yield f"| `{file}` | {count:.0f} | {sum(function.file == file for function in column.functions)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=str(SHIPPED_MODEL), help="[the shipped one]")
    parser.add_argument("--requests", type=int, default=9, metavar="N", help="[9]")
    parser.add_argument(
        "--list",
        action="store_true",
        help="every function, in the order of the first visit; then those of the time without a request",
    )
    options = parser.parse_args()
    events, times = traced(options.model, options.requests)
    columns = {
        "to the first token": usual([walk(events, each[0], each[1]) for each in times]),
        "to the second": usual([walk(events, each[0], each[2]) for each in times]),
        "a later token": usual(
            [walk(events, start, end) for each in times for start, end in pairwise(each[2:])]
        ),
    }
    print(*table(columns), "", *files(columns["to the second"]), sep="\n")
    if options.list:
        lists = {title: column.functions for title, column in columns.items()}
        for title, functions in {**lists, "without a request": idle(events, times)}.items():
            print(f"\n{title}:")
            print(*(f"{function.file}: {function.name}" for function in functions), sep="\n")


if __name__ == "__main__":
    main()
