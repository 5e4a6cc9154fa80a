"""A slice of scripts/dev disturbed_answers: writes that go wrong, clients that leave."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pdserve.tests.scripts import load_script

NUM_BODIES = 24


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("disturbed_answers")


@pytest.fixture(scope="module")
def bodies(script: ModuleType) -> list[dict[str, Any]]:
    return list(script.make_bodies(0)[:NUM_BODIES])


@pytest.fixture(scope="module")
def expected(
    script: ModuleType, bodies: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> list[Any]:
    return list(script.undisturbed_answers(tmp_path_factory.mktemp("undisturbed"), bodies, ()))


def test_every_fault_in_a_fifth_of_the_writes(
    script: ModuleType, bodies: list[dict[str, Any]], expected: list[Any], tmp_path: Path
) -> None:
    # The seed draws one of each within 17 writes. Without caches, or most pages would not travel again.
    plan = "fail=0.05,late=0.05,half=0.04,delay=0.02,duplicate=0.04,delay_s=4,seed=44"
    tally = script.run(
        tmp_path,
        bodies,
        expected,
        num_clients=72,
        leave=0.0,
        concurrency=24,
        faulty=plan,
        flags=("--disable-prefix-cache",),
    )
    assert tally.failures == []
    assert tally.num_equal == 72
    assert tally.faults.keys() >= {"fail", "late", "half", "duplicate"}
    assert tally.rooms["failed"] >= 0.1 * tally.rooms.total()
    log = (tmp_path / "disturbed.log").read_text()
    assert log.count("is ready") >= 1
    assert "is lost" not in log, "a failed write fails a room, not the pair"


@pytest.mark.slow
def test_corrupt_pages_are_found_and_sent_again(
    script: ModuleType, bodies: list[dict[str, Any]], expected: list[Any], tmp_path: Path
) -> None:
    tally = script.run(
        tmp_path,
        bodies,
        expected,
        num_clients=48,
        leave=0.0,
        concurrency=16,
        faulty="corrupt=0.15,seed=5",
        flags=("--verify-pages", "all"),
    )
    assert tally.failures == []
    assert tally.num_equal == 48
    assert tally.faults["corrupt"] > 0
    log = (tmp_path / "disturbed.log").read_text()
    assert log.count("verified KV pages arrived corrupt") > 0
    assert "is lost" not in log, "a corrupt page fails its room, not the pair"


@pytest.mark.slow
def test_a_third_of_the_clients_leaves_while_writes_fail(
    script: ModuleType, bodies: list[dict[str, Any]], expected: list[Any], tmp_path: Path
) -> None:
    plan = "fail=0.02,late=0.01,half=0.01,duplicate=0.01,seed=4"
    tally = script.run(tmp_path, bodies, expected, num_clients=150, leave=0.3, concurrency=75, faulty=plan)
    assert tally.failures == []
    assert tally.num_equal + tally.num_left == 150
    assert tally.num_left > 25
    assert tally.num_early > 5
    assert tally.faults.total() > 0


@pytest.mark.slow
def test_long_streams_outlive_kills_and_rolling_restarts(script: ModuleType, tmp_path: Path) -> None:
    bodies = list(script.make_bodies(0, 1900)[:4])
    expected = list(script.undisturbed_answers(tmp_path, bodies, ()))
    losses = script.planned_losses(3, 1)
    tally = script.run(tmp_path, bodies, expected, num_clients=8, leave=0.0, concurrency=4, losses=losses)
    assert tally.failures == []
    assert tally.num_equal == tally.num_asked >= 8
    assert len(tally.under_way) == 5
