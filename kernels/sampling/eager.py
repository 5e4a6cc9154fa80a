"""Vectorised over rows; the vocabulary is sorted only as far as a row's top_k or top_p reaches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..philox import group_words
from ..row_sum import row_sum

GUMBEL_MIN = -math.log(-math.log(0.5 * 2.0**-32))
GUMBEL_MAX = -math.log(-math.log1p(-0.5 * 2.0**-32))
# A hair more than the range, so that float32's rounding of a logit cannot prune a winner.
GUMBEL_RANGE = GUMBEL_MAX - GUMBEL_MIN + 0.01

# Counters whose noise is computed at once: what stays in a core's second-level cache.
_NOISE_BLOCK = 8192

# How far to sort for top_p at first; most of a peaked distribution lies within.
_FIRST_REACH = 256


@dataclass(frozen=True, slots=True)
class LogProbs:
    """``normalizer [N]``: log of the sum of exponentials; ``top_ids, top_values [N, K]``, best first."""

    normalizer: Tensor
    top_ids: Tensor
    top_values: Tensor


def greedy(logits: Tensor) -> Tensor:
    """``[N, V]`` → ``[N]`` int64, the lowest id among equals."""
    return logits.argmax(dim=-1)


def log_probs(logits: Tensor, num_top: int) -> LogProbs:
    """The `num_top` most likely tokens of each row of ``logits [N, V]`` (raw, float32)."""
    best = logits.amax(dim=-1)
    normalizer = row_sum((logits - best[:, None]).exp_()).log_().add_(best)
    values, ids = logits.topk(min(num_top, logits.shape[-1]), dim=-1)
    return LogProbs(normalizer, ids, values - normalizer[:, None])


def add_bias_(logits: Tensor, rows: Tensor, tokens: Tensor, bias: Tensor) -> None:
    """``logits[rows[i], tokens[i]] += bias[i]``."""
    logits.index_put_((rows, tokens), bias, accumulate=True)


def forbid_(logits: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """``logits[rows[i], tokens[i]] = -inf``."""
    logits[rows, tokens] = float("-inf")


def apply_penalties_(
    logits: Tensor,
    row: int,
    prompt: Tensor,
    output: Tensor,
    *,
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    """Penalize one row in place. ``prompt, output [*]`` int64: the tokens so far, repeats included."""
    penalized = logits[row]
    if repetition != 1.0:
        seen = torch.unique(torch.cat((prompt, output)))
        values = penalized[seen]
        penalized[seen] = torch.where(values > 0, values / repetition, values * repetition)
    if frequency != 0.0 or presence != 0.0:
        generated, counts = torch.unique(output, return_counts=True)
        penalized[generated] -= frequency * counts + presence


def keep_threshold(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest logit each row keeps.

    ``scaled [N, V]`` float32, already divided by the temperature; ``top_k [N]`` int64, 0 keeps all;
    ``top_p, min_p [N]`` float32. → ``[N]`` float32.
    """
    best = scaled.amax(dim=-1)
    threshold = best + min_p.log()
    if bool((top_k > 0).any()):
        threshold = torch.maximum(threshold, _kth_largest(scaled, top_k))
    if bool((top_p < 1.0).any()):
        threshold = torch.maximum(threshold, _top_p_threshold(scaled, best, threshold, top_p))
    return threshold


def _kth_largest(scaled: Tensor, top_k: Tensor) -> Tensor:
    vocab_size = scaled.shape[-1]
    limit = top_k.clamp(max=vocab_size)
    largest = scaled.topk(int(limit.max()), dim=-1).values
    kth = largest.gather(1, (limit - 1).clamp(min=0)[:, None])[:, 0]
    return torch.where(top_k > 0, kth, float("-inf"))


def _top_p_threshold(scaled: Tensor, best: Tensor, threshold: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit of the fewest most likely tokens whose share, of what `threshold` keeps, reaches
    top_p."""
    vocab_size = scaled.shape[-1]
    # Relative to the best token, so that nothing overflows.
    weights = (scaled - best[:, None]).exp_().masked_fill_(scaled < threshold[:, None], 0)
    total = row_sum(weights.double())
    reach = min(_FIRST_REACH, vocab_size)
    while True:
        largest = scaled.topk(reach, dim=-1).values
        share = (largest - best[:, None]).exp_().masked_fill_(largest < threshold[:, None], 0)
        before = (share.double().cumsum(dim=-1) - share) / total[:, None]
        kept = before < top_p[:, None]  # the first always is
        num_kept = kept.sum(dim=-1).clamp(min=1)
        reached = (num_kept < reach) | (top_p >= 1.0)
        if reach == vocab_size or bool(reached.all()):
            last = largest.gather(1, (num_kept - 1)[:, None])[:, 0]
            return torch.where(top_p < 1.0, last, float("-inf"))
        reach = min(reach * 8, vocab_size)


def gumbel_argmax(
    scaled: Tensor, threshold: Tensor, seeds: Tensor, choices: Tensor, positions: Tensor
) -> Tensor:
    """The token each row draws.

    ``scaled [N, V]`` float32; ``threshold [N]`` float32; ``seeds, choices, positions [N]`` int64, the
    position being the one that the drawn token will have in its sequence. → ``[N]`` int64.
    """
    num_rows, vocab_size = scaled.shape
    floor = torch.maximum(threshold, scaled.amax(dim=-1) - GUMBEL_RANGE)
    # One counter gives the noise of four neighbours, so candidates are taken by fours.
    fours = F.pad(scaled, (0, -vocab_size % 4), value=float("-inf")).view(num_rows, -1, 4)
    in_play = fours >= floor[:, None, None]
    rows, groups = in_play.any(dim=-1).nonzero(as_tuple=True)
    scores = torch.full(fours.shape, float("-inf"), dtype=torch.float64, device=scaled.device)
    for row, group in zip(torch.split(rows, _NOISE_BLOCK), torch.split(groups, _NOISE_BLOCK), strict=True):
        words = group_words(seeds[row], choices[row], positions[row], group)
        # float64: in float32 the largest words would round to u = 1 and to infinite noise.
        noise = words.double().add_(0.5).mul_(2.0**-32).log_().neg_().log_().neg_()
        scores[row, group] = noise.add_(fours[row, group]).masked_fill_(~in_play[row, group], float("-inf"))
    return scores.view(num_rows, -1).argmax(dim=-1)
