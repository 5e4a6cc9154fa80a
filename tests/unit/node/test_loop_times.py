"""Times of the loop, by kind of message."""

from __future__ import annotations

import time

import pytest

from pdserve.messages.node import Ping
from pdserve.node.loop_times import LoopTimes


def test_percentiles_are_of_the_last_ones_and_the_longest_is_of_all() -> None:
    times = LoopTimes()
    times.add("ping", 9.0, 8.0)
    for number in range(256):
        times.add("ping", number / 256, 1 - number / 256)
    found = times.summary()["ping"]
    assert (found.count, found.last_s, found.max_s) == (257, 255 / 256, 9.0)
    assert (found.p50_s, found.p99_s, found.own_p99_s) == (127 / 256, 253 / 256, 254 / 256)


def test_one_is_its_own_percentile() -> None:
    times = LoopTimes()
    times.add("turn", 0.5, 0.25)
    found = times.summary()["turn"]
    assert (found.p50_s, found.p99_s, found.own_p99_s, found.max_s) == (0.5, 0.5, 0.25, 0.5)


def test_who_stands_aside_for_others_holds_the_loop_but_takes_no_processor() -> None:
    times = LoopTimes()
    with times.handling(Ping(call_id=1)):
        time.sleep(0.05)
    found = times.summary()["ping"]
    assert found.p99_s >= 0.05
    assert found.own_p99_s < 0.05
    with pytest.raises(KeyError), times.measured("turn"):
        raise KeyError
    assert "turn" not in times.summary()
