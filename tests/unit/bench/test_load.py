from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from pdserve.bench.load import Release, arrival_offsets_s, run_load


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_asked_rate_and_burstiness(burstiness: float) -> None:
    offsets = arrival_offsets_s(20_001, 50.0, burstiness, np.random.default_rng(7))
    gaps = np.diff(offsets)
    assert offsets[0] == 0.0
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(arrival_offsets_s(20_001, 1.0, 1.0, np.random.default_rng(3)))
    for at in (0.1, 0.7, 2.0):
        assert (gaps > at).mean() == pytest.approx(math.exp(-at), abs=0.015)


def test_the_seed_decides_and_infinite_rate_is_all_at_once() -> None:
    draws = [arrival_offsets_s(5, 2.0, 0.5, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert arrival_offsets_s(3, math.inf, 1.0, np.random.default_rng(0)) == [0.0, 0.0, 0.0]
    assert arrival_offsets_s(0, 1.0, 1.0, np.random.default_rng(0)) == []


async def test_open_loop_sends_everything_whatever_is_still_running() -> None:
    all_running = asyncio.Event()
    releases: list[Release] = []

    async def send(release: Release) -> int:
        releases.append(release)
        if len(releases) == 4:
            all_running.set()
        await all_running.wait()
        return release.index

    run = await run_load([0.0, 0.001, 0.002, 0.003], send, max_concurrency=None)
    assert run.results == [0, 1, 2, 3]
    assert [release.released_s for release in releases] == [release.due_s for release in releases]
    dues = [release.due_s - releases[0].due_s for release in releases]
    assert dues == pytest.approx([0.0, 0.001, 0.002, 0.003], abs=1e-9)
    assert run.duration_s >= 0.003


async def test_closed_loop_keeps_to_its_slots_and_to_the_order() -> None:
    num_running = 0
    peak = 0
    started: list[Release] = []

    async def send(release: Release) -> int:
        nonlocal num_running, peak
        started.append(release)
        num_running += 1
        peak = max(peak, num_running)
        await asyncio.sleep(0.001)
        num_running -= 1
        return -release.index

    run = await run_load([0.0] * 7, send, max_concurrency=2)
    assert run.results == [0, -1, -2, -3, -4, -5, -6]
    assert peak == 2
    assert [release.index for release in started] == list(range(7))
    assert [release.released_s == release.due_s for release in started[:2]] == [True, True]
    assert all(release.released_s > release.due_s for release in started[2:])


async def test_lag_of_a_blocked_event_loop_is_seen() -> None:
    now_s = 0.0

    async def send(release: Release) -> None:
        nonlocal now_s
        await asyncio.sleep(0.002)
        now_s += 1.0
        await asyncio.sleep(0.03)

    run = await run_load([0.0], send, None, clock=lambda: now_s)
    assert max(run.loop_lags_s) == pytest.approx(0.99)
    assert run.duration_s == 1.0
