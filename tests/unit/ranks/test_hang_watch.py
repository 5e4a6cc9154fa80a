"""A step hangs when it is old while this loop was awake; a freeze of the process itself is no hang."""

from __future__ import annotations

from pdserve.engine.engine_thread import Progress
from pdserve.ranks.hang_watch import HangWatch
from pdserve.runtime.timing import UNSCALED


def step(started: float, expected_s: float = 0.01) -> Progress:
    return Progress(step=1, name="forward", started=started, expected_s=expected_s)


def run(watch: HangWatch, progress: Progress | None, start: float, end: float) -> float:
    """Ticks every half second, as the loop does; what the last one said."""
    hung_s, now = 0.0, start
    while now <= end:
        hung_s = watch.hung_s(progress, now)
        now += 0.5
    return hung_s


def test_a_step_older_than_ten_seconds_hangs() -> None:
    watch, progress = HangWatch(UNSCALED), step(100.0)
    assert run(watch, progress, 100.0, 110.0) == 0.0
    assert run(watch, progress, 110.5, 111.0) > 10.0


def test_a_long_step_gets_ten_times_what_it_is_expected_to_take() -> None:
    watch, progress = HangWatch(UNSCALED), step(100.0, expected_s=3.0)
    assert run(watch, progress, 100.0, 129.0) == 0.0
    assert run(watch, progress, 129.5, 131.0) > 30.0


def test_each_step_is_counted_alone() -> None:
    watch = HangWatch(UNSCALED)
    assert run(watch, step(100.0), 100.0, 109.0) == 0.0
    assert run(watch, None, 109.5, 150.0) == 0.0
    assert run(watch, step(150.0), 150.0, 159.0) == 0.0
    assert run(watch, step(159.5), 159.5, 168.0) == 0.0


def test_a_freeze_of_this_process_is_no_hang() -> None:
    watch, progress = HangWatch(UNSCALED), step(100.0)
    assert run(watch, progress, 100.0, 101.0) == 0.0
    assert watch.hung_s(progress, 1000.0) == 0.0  # it slept for a quarter of an hour
    assert run(watch, progress, 1000.5, 1006.0) == 0.0
    assert run(watch, progress, 1006.5, 1012.0) > 10.0
