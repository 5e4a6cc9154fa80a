"""Full collections: in a moment of rest, none in vain, and one after ten minutes without such a moment."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest

from pdserve.runtime import garbage
from pdserve.runtime.garbage import LONGEST_S, FullCollections, collect_when_idle, only_young

LONG = LONGEST_S / 2


@pytest.mark.parametrize(
    ("looks", "due"),  # (seconds since the last look, young collections since, whether nothing is in flight)
    [
        ([(2, 0, True)] * 3, [False, False, False]),  # nothing was made that lives
        ([(2, 5, False)] * 3, [False, False, False]),  # somebody waits
        ([(2, 5, False), (2, 0, True), (2, 0, True)], [False, True, False]),
        ([(2, 1, True), (2, 5, False), (2, 1, True)], [True, False, True]),
        (
            [(LONG, 1, False), (LONG, 1, False), (2, 1, False)],
            [False, True, False],
        ),  # no rest for ten minutes
        ([(LONG, 0, True), (LONG, 0, True), (2, 9, False)], [False, False, False]),  # there was rest till now
    ],
)
def test_when_a_full_collection_is_due(looks: list[tuple[float, int, bool]], due: list[bool]) -> None:
    now, num_young = 100.0, 7
    full = FullCollections(now, num_young)
    told = []
    for seconds, more, is_idle in looks:
        now, num_young = now + seconds, num_young + more
        told.append(full.due(now, num_young, is_idle=is_idle))
    assert told == due


@pytest.fixture
def collector() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)


class Ring:
    """Lives until the collector finds it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.usefixtures("collector")
async def test_old_cycles_wait_for_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "INTERVAL_S", 0.001)
    full = asyncio.Event()

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            full.set()

    only_young()
    gc.callbacks.append(note)
    is_idle = False
    collecting = asyncio.create_task(collect_when_idle(lambda: is_idle))
    try:
        await asyncio.sleep(0)  # it counts from here
        kept = [Ring() for _ in range(200_000)]  # so many bring a full collection by the default thresholds
        await asyncio.sleep(0.02)
        assert not full.is_set()
        is_idle = True
        await full.wait()
        del kept
    finally:
        collecting.cancel()
        gc.callbacks.remove(note)
