"""The simulation of whole clusters: a slice of its seeds, its mutants, and that it can be trusted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.simulation.mutants import MUTANTS, Mutant
from pdserve.simulation.plan import make_plan
from pdserve.simulation.runner import run_seed, shrink, try_mutant
from pdserve.simulation.situations import SITUATIONS

MAX_SEEDS = 300  # until everything has happened at least once
NUM_SEEDS_OF_TODAY = 500
MUTANT_SEEDS = 300


def by_name(name: str) -> Mutant:
    return next(mutant for mutant in MUTANTS if mutant.name == name)


@pytest.mark.timeout(600)
def test_nothing_that_must_hold_is_violated_and_everything_happens() -> None:
    missing, seeds = set(SITUATIONS), iter(range(MAX_SEEDS))
    while missing:
        seed = next(seeds, None)
        assert seed is not None, f"these never happened: {missing}"
        result = run_seed(seed)
        assert result.violation == "", f"replay it with: scripts/dev simulate --replay {seed}"
        missing -= {situation for situation, times in result.statistics.counts.items() if times}


@pytest.mark.timeout(600)
def test_nothing_is_violated_in_seeds_that_only_today_has(first_seed_of_today: int) -> None:
    """Rare things are met by chance, and early. What fails here fails again by the number that it names."""
    for seed in range(first_seed_of_today, first_seed_of_today + NUM_SEEDS_OF_TODAY):
        violation = run_seed(seed).violation
        assert violation == "", f"replay it with: scripts/dev simulate --replay {seed}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_found(mutant: Mutant) -> None:
    assert try_mutant(mutant, MUTANT_SEEDS).seed is not None


def test_a_mutant_leaves_nothing_behind() -> None:
    before = [[getattr(patch.owner, patch.attribute) for patch in mutant.patches] for mutant in MUTANTS]
    for mutant, originals in zip(MUTANTS, before, strict=True):
        with mutant.planted():
            planted = [getattr(patch.owner, patch.attribute) for patch in mutant.patches]
        assert all(one is not other for one, other in zip(planted, originals, strict=True))
    after = [[getattr(patch.owner, patch.attribute) for patch in mutant.patches] for mutant in MUTANTS]
    assert after == before


def test_there_are_enough_mutants_and_each_says_what_is_wrong() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 15
    assert all(mutant.bug for mutant in MUTANTS)


@pytest.mark.process
@pytest.mark.timeout(600)
def test_a_seed_is_the_same_in_every_process() -> None:
    code = (
        "from pdserve.simulation.runner import run_seed; "
        "print([run_seed(seed).fingerprint for seed in range(10)])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-P", "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=250,
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {f"{[run_seed(seed).fingerprint for seed in range(10)]}\n"}


def test_a_replay_with_its_trace_is_the_same_run() -> None:
    plain, traced = run_seed(7), run_seed(7, with_trace=True)
    assert plain.fingerprint == traced.fingerprint
    assert plain.trace == ()
    assert any("PrefillRequest" in line for line in traced.trace)


def test_a_seed_is_no_larger_than_it_may_be() -> None:
    for seed in range(300):
        plan = make_plan(seed)
        assert len(plan.roles) <= 4
        assert len(plan.requests) <= 8
        assert plan.settings.prefill_pages <= 64
        assert plan.settings.decode_pages <= 64


def test_a_failing_seed_is_made_small_and_still_fails_without_what_was_left_out() -> None:
    mutant = by_name("no-settling")
    seed, flavour = try_mutant(mutant, MUTANT_SEEDS).seed, mutant.flavour
    assert seed is not None
    with mutant.planted():
        small = shrink(seed, flavour)
        again = run_seed(seed, small.dropped, flavour=flavour)
    assert again.violation == small.result.violation != ""
    left = make_plan(seed, small.dropped, flavour).parts()
    assert len(left) < len(make_plan(seed, flavour=flavour).parts())
    assert run_seed(seed, small.dropped, flavour=flavour).violation == ""


def test_what_a_seed_does_not_have_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match="has no part f77"):
        make_plan(0, ["f77"])
    with pytest.raises(ValueError, match="there is no flavour 'sour'"):
        make_plan(0, flavour="sour")
    with pytest.raises(ValueError, match="a prefill and a decode node are needed"):
        make_plan(0, ["n0", "n1", *(f"n{node}" for node in make_plan(0).roles if node > 1)])


@pytest.mark.process
def test_several_processes_share_seeds_and_planted_bugs() -> None:
    script = Path(__file__).parents[3] / "scripts" / "tools" / "simulate.py"
    bugs = ",".join(mutant.name for mutant in MUTANTS[:2])
    command = [sys.executable, "-P", str(script), "--seeds", "4", "--jobs", "2", "--mutants", bugs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "SEEDS 4 VIOLATIONS 0 MUTANTS 2/2", done.stdout + done.stderr
    assert done.returncode == 0
