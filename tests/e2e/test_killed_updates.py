"""A slice of scripts/killed_updates: the router, a node and the trainer are killed in an update, one each."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "killed_updates.py"
SEED = 283  # draws each of the three


@pytest.mark.timeout(600)  # three processes are started again; 40 s on two cores of their own
def test_the_cluster_ends_on_one_version_whoever_dies(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("killed_updates", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up there
    spec.loader.exec_module(script)
    tally = script.run(3, SEED, tmp_path)
    assert tally.failures == []
    assert (tally.num_kills, tally.num_one_version, tally.num_hangs) == (3, 3, 0)
    assert {end.split(":")[0] for end in tally.ends} == {"router", "decode", "trainer"}
