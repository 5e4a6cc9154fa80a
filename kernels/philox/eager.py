"""Both products of a round as one tensor: the state is two [2, N] halves, (c0, c2) and (c1, c3)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

NUM_ROUNDS = 10
LOW = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


@cache
def _pair(numbers: tuple[int, int], device: torch.device) -> Tensor:
    """``[2, 1]``, filled where it is: nothing is copied there."""
    pair = torch.full((2, 1), numbers[0], device=device)
    pair[1] = numbers[1]
    return pair


@cache
def _bumps(device: torch.device) -> Tensor:
    """Of the key before each round, ``[NUM_ROUNDS, 2, 1]``."""
    return torch.arange(NUM_ROUNDS, device=device)[:, None, None] * _pair(WEYL, device)


def philox(counter: Tensor, key: Tensor) -> Tensor:
    keys = (key + _bumps(key.device)) & LOW
    multipliers = _pair(MULTIPLIERS, counter.device)
    factors, others = counter[0::2], counter[1::2]
    for round_key in keys:
        products = (factors * multipliers).flip(0)  # M1·c2 first
        factors = ((products >> 32) & LOW) ^ others ^ round_key
        others = products & LOW
    return torch.stack((factors, others), dim=1).flatten(0, 1)


def group_words(seeds: Tensor, choices: Tensor, positions: Tensor, groups: Tensor) -> Tensor:
    """The 32 random bits of the four tokens ``4·g … 4·g + 3`` of each of N groups. All inputs ``[N]`` int64;
    a seed of 2⁶³ or more is its two's complement. → ``[N, 4]`` int64 in [0, 2³²)."""
    counter = torch.stack((groups, positions, choices, torch.zeros_like(groups)))
    key = torch.stack((seeds & LOW, (seeds >> 32) & LOW))
    return philox(counter, key).T
