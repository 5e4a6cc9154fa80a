"""`scripts/dev trace`: what it counts, on walks that are known, and what its hook writes of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.scripts.tools.trace import (
    FOLDER_VARIABLE,
    HOOK,
    PARTS,
    REST,
    Event,
    Function,
    Walk,
    read_events,
    table,
    usual,
    walk,
)
from pdserve.tests.unit.test_layout import ROOT

HANDLE = Function("api/http/server.py", "handle")
CHECK = Function("api/http/server.py", "check")
STEP = Function("decode/scheduler.py", "DecodeScheduler.step")
TAKE = Function("decode/batching.py", "take")
BEAT = Function("router/members.py", "Members._ping_who_is_due")


def events(*moves: tuple[str, Function | None]) -> list[Event]:
    """Of threads, a nanosecond each; None is a return."""
    found: list[Event] = []
    stacks: dict[str, list[Function]] = {}
    for at_ns, (thread, function) in enumerate(moves):
        stack = stacks.setdefault(thread, [])
        if function is not None:
            stack.append(function)
        found.append(Event(at_ns, thread, function is not None, function or stack.pop()))
    return found


def test_calls_first_visits_and_changes_of_file() -> None:
    found = walk(
        events(("a", HANDLE), ("a", CHECK), ("a", None), ("b", STEP), ("b", TAKE), ("b", None), ("b", TAKE)),
        0,
        100,
    )
    assert found.first_visits == [HANDLE, CHECK, STEP, TAKE]
    assert found.calls == {HANDLE: 1, CHECK: 1, STEP: 1, TAKE: 2}
    # To the scheduler twice: from outside, and back from batching.
    assert found.entries == {"api/http/server.py": 1, "decode/scheduler.py": 2, "decode/batching.py": 2}
    assert found.num_file_changes == 5


def test_only_what_lies_between_the_moments_counts_and_who_was_inside_is_known() -> None:
    moves = events(("a", STEP), ("a", TAKE), ("a", None), ("a", CHECK), ("a", None), ("a", TAKE))
    found = walk(moves, 2, 5)
    assert found.first_visits == [CHECK]
    assert found.entries == {"decode/scheduler.py": 2, "api/http/server.py": 1}


def test_a_return_from_before_the_record_is_passed_over() -> None:
    found = walk([Event(0, "a", False, STEP), *events(("a", TAKE))], 0, 10)
    assert found.first_visits == [TAKE]


def test_what_most_walks_passed_counts_and_heartbeats_do_not() -> None:
    with_beat = walk(events(("a", HANDLE), ("c", BEAT), ("b", STEP)), 0, 10)
    without = walk(events(("a", HANDLE), ("b", STEP), ("b", TAKE), ("b", None)), 0, 10)
    found = usual([without, with_beat, without])
    assert found.functions == (HANDLE, STEP, TAKE)
    assert found.num_calls == dict.fromkeys((*PARTS, REST), 0) | {"api": 1, "both schedulers": 2}
    assert found.num_file_changes == 4
    rows = list(table({"to the first token": found}))
    assert "| both schedulers | 2 / 2 / 2 |" in rows
    assert "| all | 3 / 3 / 3 |" in rows


def test_a_file_is_in_the_part_of_its_folder() -> None:
    assert [function.part for function in (HANDLE, STEP, BEAT)] == ["api", "both schedulers", "router"]
    assert Function("runtime/logs.py", "configure_logging").part == "messages, runtime"
    assert Function("node/loop.py", "RoleLoop.step").part == REST == "both schedulers"
    assert Walk().num_file_changes == 0


# In place of the command: a node that knows the packages of the real one.
PROGRAM = """
import threading
from pdserve.runtime.completions import Completions

def node():
    completions = Completions()
    completions.push([number for number in range(3)])
    completions.drain()

if __name__ == "__main__":  # the import above imports this again, as a package
    thread = threading.Thread(target=node)
    thread.start()
    thread.join()
"""


def hooked(tmp_path: Path, *arguments: str) -> list[Event]:
    (tmp_path / "pdserve.py").write_text(f"__path__ = [{str(ROOT)!r}]\n{PROGRAM}")
    done = subprocess.run(
        [sys.executable, "-m", "pdserve", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HOOK), FOLDER_VARIABLE: str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return read_events(tmp_path)


@pytest.mark.process
def test_the_hook_writes_calls_and_returns_of_every_thread_of_a_node(tmp_path: Path) -> None:
    found = hooked(tmp_path, "decode", "--port", "0")
    moves = [(event.is_call, event.function) for event in found]
    steps = [Function("runtime/completions.py", f"Completions.{name}") for name in ("push", "drain")]
    assert [move for move in moves if move[1] in steps] == [
        (is_call, step) for step in steps for is_call in (True, False)
    ]
    assert {event.thread.split("-")[0] for event in found} == {"decode"}
    assert not any("<" in function.name for _, function in moves)  # modules and comprehensions


@pytest.mark.process
def test_the_hook_is_silent_in_other_processes(tmp_path: Path) -> None:
    assert hooked(tmp_path, "node-front", "--role", "decode") == []
