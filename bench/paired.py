"""Two servers in turn: who runs when, and how their numbers compare.

Requests are cut into rounds. Each round goes to both servers with the same prompts and arrival times, and
the order flips from round to round (A B, B A, A B, …), so that a drift of the machine hits both alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import TypeGuard


def turns(num_targets: int, num_rounds: int) -> list[tuple[int, int]]:
    """`(round, target)` in the order to run them."""
    order = range(num_targets)
    return [
        (number, target)
        for number in range(num_rounds)
        for target in (order if number % 2 == 0 else reversed(order))
    ]


def blocks(num_requests: int, num_rounds: int) -> list[range]:
    """Consecutive, near-equal ranges of requests, one a round."""
    bounds = [number * num_requests // num_rounds for number in range(num_rounds + 1)]
    return [range(start, end) for start, end in pairwise(bounds)]


def ratios(values: Mapping[str, object], baseline: Mapping[str, object]) -> dict[str, float]:
    """value / baseline of every number in both, where the baseline is not zero."""
    return {
        key: value / base
        for key, value in values.items()
        if _is_number(value) and _is_number(base := baseline.get(key)) and base != 0
    }


def median_ratios(
    rounds: Sequence[Mapping[str, object]], baseline_rounds: Sequence[Mapping[str, object]]
) -> dict[str, float]:
    """The median over rounds of each round's ratio: one bad round does not move it."""
    per_round = [ratios(ours, base) for ours, base in zip(rounds, baseline_rounds, strict=True)]
    keys = dict.fromkeys(key for of_round in per_round for key in of_round)
    return {key: median(of_round[key] for of_round in per_round if key in of_round) for key in keys}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
