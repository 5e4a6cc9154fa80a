"""Nothing here reads a value on the host, so on a device all of it is only launched."""

from __future__ import annotations

import math
from collections.abc import Callable
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

# Counters of a row whose noise is computed at once: 150,000 tokens of 256 rows in float64 would take 300 MB.
_NOISE_GROUPS = 4096


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
    rows: Tensor,
    tokens: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Penalize ``logits[rows[i], tokens[i]]`` in place: each token that a row has seen, once.

    All ``[*]``, rows and tokens int64, the others float32; ``counts``: how often the token is in the output.
    """
    values = logits[rows, tokens]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[rows, tokens] = values - (frequency * counts + presence * (counts > 0))


def keep_threshold(
    scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, largest_top_k: int, some_top_p: bool
) -> Tensor:
    """The smallest logit each row keeps.

    ``scaled [N, V]`` float32, already divided by the temperature; ``top_k [N]`` int64, 0 keeps all;
    ``top_p, min_p [N]`` float32. What the host knows of them: the largest top_k, and whether any top_p is
    below 1. → ``[N]`` float32.
    """
    return combined_threshold(scaled, top_k, top_p, min_p, largest_top_k, some_top_p, top_p_threshold)


def combined_threshold(
    scaled: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    largest_top_k: int,
    some_top_p: bool,
    of_top_p: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    best = scaled.amax(dim=-1)
    threshold = best + min_p.log()
    if largest_top_k:
        threshold = torch.maximum(threshold, _kth_largest(scaled, top_k, largest_top_k))
    if some_top_p:
        threshold = torch.maximum(threshold, of_top_p(scaled, best, threshold, top_p))
    return threshold


def _kth_largest(scaled: Tensor, top_k: Tensor, largest_top_k: int) -> Tensor:
    vocab_size = scaled.shape[-1]
    largest = scaled.topk(min(largest_top_k, vocab_size), dim=-1).values
    kth = largest.gather(1, (top_k - 1).clamp(0, largest.shape[-1] - 1)[:, None])[:, 0]
    return torch.where(top_k > 0, kth, float("-inf"))


def top_p_threshold(scaled: Tensor, best: Tensor, threshold: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit of the fewest most likely tokens whose share, of what `threshold` keeps, reaches
    top_p; -inf where that is 1."""
    total = kept_weight(scaled, best, threshold)
    largest = scaled.sort(dim=-1, descending=True).values
    last, _ = last_of_share(largest, best, threshold, total, top_p)
    return last


def kept_weight(scaled: Tensor, best: Tensor, threshold: Tensor) -> Tensor:
    """``[N]`` float64, relative to the best token, so that nothing overflows."""
    weights = (scaled - best[:, None]).exp_().masked_fill_(scaled < threshold[:, None], 0)
    return row_sum(weights.double())


def last_of_share(
    largest: Tensor, best: Tensor, threshold: Tensor, total: Tensor, top_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Of rows of logits in descending order: the last one that top_p keeps, and how many it keeps."""
    share = (largest - best[:, None]).exp_().masked_fill_(largest < threshold[:, None], 0)
    before = (share.double().cumsum(dim=-1) - share) / total[:, None]
    num_kept = (before < top_p[:, None]).sum(dim=-1).clamp(min=1)  # the first always is
    last = largest.gather(1, (num_kept - 1)[:, None])[:, 0]
    return torch.where(top_p < 1.0, last, float("-inf")), num_kept


def gumbel_argmax(
    scaled: Tensor, threshold: Tensor, seeds: Tensor, choices: Tensor, positions: Tensor
) -> Tensor:
    """The token each row draws, with the noise of every token.

    ``scaled [N, V]`` float32; ``threshold [N]`` float32; ``seeds, choices, positions [N]`` int64, the
    position being the one that the drawn token will have in its sequence. → ``[N]`` int64.
    """
    num_rows, vocab_size = scaled.shape
    kept = scaled.masked_fill(scaled < threshold[:, None], float("-inf"))
    fours = F.pad(kept, (0, -vocab_size % 4), value=float("-inf")).view(num_rows, -1, 4)
    best = torch.full((num_rows,), float("-inf"), dtype=torch.float64, device=scaled.device)
    drawn = torch.zeros((num_rows,), dtype=torch.int64, device=scaled.device)
    for start in range(0, fours.shape[1], _NOISE_GROUPS):
        block = fours[:, start : start + _NOISE_GROUPS]
        groups = torch.arange(start, start + block.shape[1], device=scaled.device)
        seed, choice, position = (
            per_row[:, None].expand(-1, groups.numel()).flatten() for per_row in (seeds, choices, positions)
        )
        words = group_words(seed, choice, position, groups.repeat(num_rows))
        scores = gumbel_noise(words).view(block.shape).add_(block).flatten(1)
        index = scores.argmax(dim=-1)
        score = scores.gather(1, index[:, None])[:, 0]
        drawn = torch.where(score > best, index + 4 * start, drawn)  # of equals the lowest id, as in a block
        best = torch.maximum(best, score)
    return drawn


def gumbel_noise(words: Tensor) -> Tensor:
    """Of random 32-bit words. float64: in float32 the largest words would round to u = 1 and to infinite
    noise."""
    return words.double().add_(0.5).mul_(2.0**-32).log_().neg_().log_().neg_()
