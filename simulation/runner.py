"""Runs seeds, finds the smallest form of one that fails, and proves with mutants that bugs are found."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .clock import EventQueue, SimulationLoop
from .cluster import SimulatedCluster
from .mutants import Mutant
from .plan import Plan, make_plan
from .situations import Statistics


@dataclass(frozen=True, slots=True)
class Result:
    """Of one seed. `violation` is empty when all that must hold did."""

    seed: int
    violation: str
    statistics: Statistics
    fingerprint: int
    num_events: int
    trace: tuple[str, ...] = ()


def run_seed(
    seed: int, dropped: Collection[str] = (), *, flavour: str = "", with_trace: bool = False
) -> Result:
    """Raises ValueError when `dropped` names what the seed does not have, or there is no such flavour."""
    return run_plan(make_plan(seed, dropped, flavour), with_trace=with_trace)


def run_plan(plan: Plan, *, with_trace: bool = False) -> Result:
    events, statistics = EventQueue(), Statistics()
    events.trace = [] if with_trace else None
    violation, fingerprint = "", 0
    with _loop(events) as loop:
        cluster = SimulatedCluster(plan, events, statistics)
        try:
            loop.run_until_complete(cluster.run())
        except Exception as error:  # whatever a scheduler raises is a finding
            violation = _describe(error)
        fingerprint = cluster.fingerprint()
    return Result(plan.seed, violation, statistics, fingerprint, events.num_run, tuple(events.trace or ()))


@contextlib.contextmanager
def _loop(events: EventQueue) -> Iterator[SimulationLoop]:
    loop = SimulationLoop(events)
    loop.set_exception_handler(lambda *_: None)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    asyncio.set_event_loop(loop)
    try:
        yield loop
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        asyncio.set_event_loop(None)
        loop.close()
        logging.disable(disabled)


def _describe(error: Exception) -> str:
    """What is wrong, and where it was seen."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "asyncio" not in frame.filename]
    places = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(ours[-4:]))
    return f"{type(error).__name__}: {error} [{places}]"


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The smallest form of a failing seed that was found: what can be left out of it."""

    dropped: tuple[str, ...]
    result: Result


def shrink(seed: int, flavour: str = "") -> Shrunk:
    """Leave out one part after the other, as long as something is still wrong without it."""
    kept_out: list[str] = []
    smallest = run_seed(seed, flavour=flavour)
    assert smallest.violation, f"seed {seed} does not fail"
    has_shrunk = True
    while has_shrunk:
        has_shrunk = False
        for part in make_plan(seed, kept_out, flavour).parts():
            try:
                result = run_seed(seed, [*kept_out, part], flavour=flavour)
            except ValueError:  # it cannot be left out
                continue
            if result.violation:
                kept_out.append(part)
                smallest, has_shrunk = result, True
    return Shrunk(tuple(kept_out), smallest)


@dataclass(frozen=True, slots=True)
class Caught:
    """Whether a planted bug was found, by which seed, and as what."""

    seed: int | None
    num_seeds: int
    violation: str


def try_mutant(mutant: Mutant, max_seeds: int) -> Caught:
    """Run seeds, of the flavour in which the bug shows soonest, until one fails."""
    with mutant.planted():
        for number in range(max_seeds):
            result = run_seed((mutant.found_by + number) % max_seeds, flavour=mutant.flavour)
            if result.violation:
                return Caught(result.seed, number + 1, result.violation)
    return Caught(None, max_seeds, "")
