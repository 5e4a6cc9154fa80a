"""Slices of scripts/dev killed_updates: a decode node dies in an update; router, node and trainer do."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.tests.scripts import load_script


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("seed", "victims"),
    [
        pytest.param(7, ("decode",), id="decode"),
        pytest.param(283, ("router", "decode", "trainer"), id="each"),
    ],
)
def test_the_cluster_ends_on_one_version_whoever_dies(
    seed: int, victims: tuple[str, ...], tmp_path: Path
) -> None:
    script = load_script("killed_updates")
    times = len(victims)
    tally = script.run(times, seed, tmp_path)
    assert tally.failures == []
    assert (tally.num_kills, tally.num_one_version, tally.num_hangs) == (times, times, 0)
    assert {end.split(":")[0] for end in tally.ends} == set(victims)
