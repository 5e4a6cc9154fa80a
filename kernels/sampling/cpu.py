"""What gains by looking at values on the way, which costs nothing where the host is the device.

The vocabulary is sorted only as far as a row's top_p reaches, and noise is computed only where it can decide.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..philox import group_words
from .eager import (
    GUMBEL_RANGE,
    combined_threshold,
    gumbel_noise,
    kept_weight,
    last_of_share,
)

# Counters whose noise is computed at once: what stays in a core's second-level cache.
_NOISE_BLOCK = 8192

# How far to sort for top_p at first; most of a peaked distribution lies within.
_FIRST_REACH = 256


def keep_threshold(
    scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, largest_top_k: int, some_top_p: bool
) -> Tensor:
    """As `eager.keep_threshold`, bit for bit."""
    return combined_threshold(scaled, top_k, top_p, min_p, largest_top_k, some_top_p, top_p_threshold)


def top_p_threshold(scaled: Tensor, best: Tensor, threshold: Tensor, top_p: Tensor) -> Tensor:
    vocab_size = scaled.shape[-1]
    total = kept_weight(scaled, best, threshold)
    reach = min(_FIRST_REACH, vocab_size)
    while True:
        largest = scaled.topk(reach, dim=-1).values
        last, num_kept = last_of_share(largest, best, threshold, total, top_p)
        if reach == vocab_size or bool(((num_kept < reach) | (top_p >= 1.0)).all()):
            return last
        reach = min(reach * 8, vocab_size)


def gumbel_argmax(
    scaled: Tensor, threshold: Tensor, seeds: Tensor, choices: Tensor, positions: Tensor
) -> Tensor:
    """As `eager.gumbel_argmax`."""
    num_rows, vocab_size = scaled.shape
    floor = torch.maximum(threshold, scaled.amax(dim=-1) - GUMBEL_RANGE)
    # One counter gives the noise of four neighbours, so candidates are taken by fours.
    fours = F.pad(scaled, (0, -vocab_size % 4), value=float("-inf")).view(num_rows, -1, 4)
    in_play = fours >= floor[:, None, None]
    rows, groups = in_play.any(dim=-1).nonzero(as_tuple=True)
    scores = torch.full(fours.shape, float("-inf"), dtype=torch.float64)
    for row, group in zip(torch.split(rows, _NOISE_BLOCK), torch.split(groups, _NOISE_BLOCK), strict=True):
        noise = gumbel_noise(group_words(seeds[row], choices[row], positions[row], group))
        scores[row, group] = noise.add_(fours[row, group]).masked_fill_(~in_play[row, group], float("-inf"))
    return scores.view(num_rows, -1).argmax(dim=-1)
