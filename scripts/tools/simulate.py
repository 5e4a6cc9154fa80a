"""Runs whole clusters in simulation: every seed is another set of nodes, requests and faults.

    scripts/dev simulate --seeds N [--jobs J] [--first-seed S] [--mutants all|none|NAME,NAME]
    scripts/dev simulate --replay SEED [--drop PART,PART] [--flavour F] [--mutants NAME]   prints every event

Prints how often each fault and each rare situation happened (one that never did in 300 seeds or more is a
failure), the smallest form found of a seed that fails with the command that replays it, and which planted
bugs were found. The last line is `SEEDS n VIOLATIONS v MUTANTS caught/planted`; the exit code is 1 unless v
is 0 and every planted bug was caught.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import time
from collections.abc import Iterator

from pdserve.simulation.mutants import MUTANTS, Mutant
from pdserve.simulation.runner import Caught, Result, run_seed, shrink, try_mutant
from pdserve.simulation.situations import Statistics

MAX_SHRUNK = 3  # of many failing seeds, so many are made small
MUTANT_SEEDS = 1000
CHUNK = 20
SEEDS_FOR_ALL_SITUATIONS = 300


def run_chunk(seeds: range) -> list[Result]:
    return [run_seed(seed) for seed in seeds]


def catch(name: str) -> Caught:
    return try_mutant(by_name(name), MUTANT_SEEDS)


def by_name(name: str) -> Mutant:
    for mutant in MUTANTS:
        if mutant.name == name:
            return mutant
    sys.exit(f"there is no mutant {name!r}; there are {', '.join(mutant.name for mutant in MUTANTS)}")


def selected(names: str) -> list[Mutant]:
    if names == "none":
        return []
    return list(MUTANTS) if names == "all" else [by_name(name) for name in names.split(",")]


def results(first: int, count: int, jobs: int) -> Iterator[Result]:
    chunks = [range(start, min(start + CHUNK, first + count)) for start in range(first, first + count, CHUNK)]
    if jobs == 1:
        for chunk in chunks:
            yield from run_chunk(chunk)
        return
    with multiprocessing.Pool(jobs) as pool:
        for done in pool.imap(run_chunk, chunks):
            yield from done


def run_seeds(first: int, count: int, jobs: int) -> tuple[Statistics, list[int]]:
    total, failed = Statistics(), []
    started = last_said = time.monotonic()
    for number, result in enumerate(results(first, count, jobs), start=1):
        total.counts.update(result.statistics.counts)
        if result.violation:
            failed.append(result.seed)
            print(f"seed {result.seed}: {result.violation}", flush=True)
        if time.monotonic() - last_said > 30.0:
            last_said = time.monotonic()
            print(f"  {number} seeds in {last_said - started:.0f} s", file=sys.stderr, flush=True)
    took_s = time.monotonic() - started
    print(f"{count} seeds in {took_s:.1f} s, {count / took_s:.1f} seeds/s, {jobs} jobs")
    return total, failed


def show_smallest(seed: int) -> None:
    small = shrink(seed)
    print(f"\nseed {seed}, made small: {small.result.violation}")
    drop = f" --drop {','.join(small.dropped)}" if small.dropped else ""
    print(f"replay it with: scripts/dev simulate --replay {seed}{drop}")


def try_mutants(mutants: list[Mutant], jobs: int) -> int:
    """How many were caught."""
    names = [mutant.name for mutant in mutants]
    if jobs == 1:
        found = [catch(name) for name in names]
    else:
        with multiprocessing.Pool(jobs) as pool:
            found = pool.map(catch, names, chunksize=1)
    print("\nplanted bugs, and the first seed that found each")
    for mutant, caught in zip(mutants, found, strict=True):
        where = f"seed {caught.seed}" if caught.seed is not None else f"not in {caught.num_seeds} seeds"
        where += f", {mutant.flavour}" if mutant.flavour else ""
        print(f"  {mutant.name:<26}{where:<20}{mutant.bug}")
        if caught.violation:
            print(f"  {'':<26}{'':<20}-> {caught.violation[:150]}")
    return sum(caught.seed is not None for caught in found)


def replay(seed: int, dropped: list[str], flavour: str, mutants: list[Mutant]) -> int:
    with contextlib.ExitStack() as planted:
        for mutant in mutants:
            planted.enter_context(mutant.planted())
        try:
            result = run_seed(seed, dropped, flavour=flavour, with_trace=True)
        except ValueError as error:
            sys.exit(str(error))
    print("\n".join(result.trace))
    print(f"\nseed {seed}: {result.violation or 'all that must hold does'}")
    return 1 if result.violation else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=500, metavar="N")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="processes")
    parser.add_argument("--mutants", default=None, help="all, none, or names; all by default")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run one seed and print its events")
    parser.add_argument("--drop", default="", metavar="PARTS", help="with --replay: what to leave out")
    parser.add_argument("--flavour", default="", help="with --replay: as the planted bug's seeds had it")
    args = parser.parse_args()
    if args.seeds < 0 or args.jobs < 1:
        parser.error("--seeds is 0 or more, --jobs is 1 or more")
    if args.replay is not None:
        dropped = [part for part in args.drop.split(",") if part]
        return replay(args.replay, dropped, args.flavour, selected(args.mutants or "none"))
    mutants = selected(args.mutants or "all")
    total, failed = run_seeds(args.first_seed, args.seeds, args.jobs)
    print(total.table())
    missing = total.missing() if args.seeds >= SEEDS_FOR_ALL_SITUATIONS else []
    for situation in missing:
        print(f"never happened: {situation}")
    for seed in failed[:MAX_SHRUNK]:
        show_smallest(seed)
    num_caught = try_mutants(mutants, args.jobs)
    # What never came about was not checked, which is as bad as a check that failed.
    num_violations = len(failed) + len(missing)
    print(f"SEEDS {args.seeds} VIOLATIONS {num_violations} MUTANTS {num_caught}/{len(mutants)}")
    return 0 if num_violations == 0 and num_caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
