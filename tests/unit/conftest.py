"""Tests of the `unit` lane run in this process alone; those that start others say so."""

from __future__ import annotations

import sys
from collections.abc import Generator

import pytest

_STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn")
_running: pytest.Item | None = None


def _refuse_starts(event: str, _: object) -> None:
    if event in _STARTS and _running is not None and _running.get_closest_marker("process") is None:
        raise RuntimeError("this test starts a process: mark it with @pytest.mark.process")


sys.addaudithook(_refuse_starts)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    global _running
    _running = item
    try:
        return (yield)
    finally:
        _running = None
