"""docs/life_of_a_token.md: the way of real requests, file by file."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

from pdserve.tests.unit.test_layout import ROOT

PAGE = ROOT / "docs" / "life_of_a_token.md"
OURSELVES = "tests/cluster/test_life_of_a_token.py"
BESIDE = "## Beside it"  # what nodes and router do whether or not there is a request


@dataclass(frozen=True)
class Trace:
    usual: list[
        str
    ]  # "FILE: FUNCTION" that most requests pass to their second token, in order of the first visit
    later: list[str]  # the same, for each token after that
    idle: list[str]  # what is passed without a request

    @property
    def files(self) -> set[str]:
        return {function.partition(": ")[0] for function in (*self.usual, *self.later)}


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Its processes are executed, not forked: the tracer begins when an interpreter starts."""
    command = [sys.executable, "-P", "scripts/tools/trace.py", "--requests", "5", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    sections = re.split(
        r"\n(to the first token|to the second|a later token|without a request):\n", done.stdout
    )
    lists = dict(zip(sections[1::2], sections[2::2], strict=True))
    titles = ("to the second", "a later token", "without a request")
    return Trace(*(lists[title].splitlines() for title in titles))


def named(text: str) -> list[str]:
    return [path for path in re.findall(r"`([\w/]+\.py)`", text) if path != OURSELVES]


def test_every_file_that_a_request_passes_is_on_the_page_and_no_other(trace: Trace) -> None:
    way, beside = map(named, PAGE.read_text().split(BESIDE))
    assert trace.files - {*way, *beside} == set()
    assert set(way) - trace.files == set()
    assert set(way) & set(beside) == set()


def test_the_steps_are_in_the_order_of_the_way(trace: Trace) -> None:
    """Those of a section, and the sections: the last steps of one may run beside the first of the next."""
    page = PAGE.read_text()
    sections = [
        [": ".join(stop) for stop in re.findall(r"^### \d+\. .*\n`(.+)` `(.+)`$", section, re.MULTILINE)]
        for section in page.partition(BESIDE)[0].split("\n## ")[1:]
    ]
    assert sum(map(len, sections)) == page.count("\n### ")
    # What is passed without a request may be come to before its step. Only the first has none before it.
    assert {step for steps in sections for step in steps} & set(trace.idle) <= {sections[0][0]}
    assert sections == [sorted(steps, key=trace.usual.index) for steps in sections]
    assert sections == sorted(sections, key=lambda steps: trace.usual.index(steps[0]))


def test_all_that_the_page_names_is_there() -> None:
    for path in named(PAGE.read_text()):
        assert (ROOT / path).is_file(), path
