"""Tests of the `unit` lane run in this process alone; those that start others say so."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn")
_must_start_nothing = False


def _refuse_starts(event: str, _: object) -> None:
    if _must_start_nothing and event in _STARTS:
        raise RuntimeError("this test starts a process: mark it with @pytest.mark.process")


sys.addaudithook(_refuse_starts)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """pytest asks us for the tests of other folders too, where they are in one session with ours."""
    global _must_start_nothing
    is_ours = item.path.is_relative_to(_HERE)
    _must_start_nothing = is_ours and item.get_closest_marker("process") is None
    try:
        return (yield)
    finally:
        _must_start_nothing = False
