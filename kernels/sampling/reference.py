"""One row at a time, in NumPy float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..philox.reference import token_word

Row = NDArray[np.float64]


def penalize(
    logits: Row,
    prompt: Sequence[int],
    output: Sequence[int],
    *,
    repetition: float,
    frequency: float,
    presence: float,
) -> Row:
    result = logits.copy()
    for token in set(prompt) | set(output):
        result[token] = result[token] / repetition if result[token] > 0 else result[token] * repetition
    for token in set(output):
        result[token] -= frequency * list(output).count(token) + presence
    return result


def kept_tokens(scaled: Row, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Ids that survive min_p, then top_k, then top_p; those that tie with the last one kept survive too."""

    def with_ties(ids: Sequence[int], among: set[int]) -> set[int]:
        smallest = min(scaled[i] for i in ids)
        return {i for i in among if scaled[i] >= smallest}

    weights = np.exp(scaled - scaled.max())
    kept = {i for i in range(len(scaled)) if weights[i] >= min_p}
    best_first = sorted(kept, key=lambda i: -scaled[i])
    if top_k > 0:
        kept = with_ties(best_first[:top_k], kept)
    best_first = [i for i in best_first if i in kept]
    if top_p < 1.0:
        total = sum(weights[i] for i in kept)
        share, count = 0.0, 0
        while count < len(best_first) and (count == 0 or share < top_p):
            share += weights[best_first[count]] / total
            count += 1
        kept = with_ties(best_first[:count], kept)
    return kept


def draw(scaled: Row, kept: set[int], seed: int, choice: int, position: int) -> int:
    """Gumbel-max with the noise of every kept token."""
    uniform = {t: (token_word(seed, choice, position, t) + 0.5) * 2.0**-32 for t in kept}
    return max(sorted(kept), key=lambda t: scaled[t] - np.log(-np.log(uniform[t])))
