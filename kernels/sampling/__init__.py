"""From logits to tokens, for N rows at once; every row asks for its own things and gets nothing of others'.

In this order, on float32 logits ``[N, V]``:

1. `add_bias_`                 logits[n, t] += bias
2. `apply_penalties_`          repetition over prompt and output: l > 0 → l / r, else l · r;
                               frequency and presence over output: l −= f · count + p · (count > 0)
3. `forbid_`                   −inf for tokens that must not come yet (min_tokens)
4. divide by the temperature
5. `keep_threshold`            min_p:  p ≥ min_p · p_max
                               top_k:  the k largest of those
                               top_p:  the fewest most likely of those whose share reaches top_p
                               Each keeps an upper set, so together they are one threshold a row; tokens that
                               tie with the last one kept are kept.
6. `gumbel_argmax`             argmax of  l + g,  g = −log(−log u),  u = (x + ½) · 2⁻³², x from Philox

The order is vLLM's (v1); the penalties are those of vLLM and transformers. A row of temperature 0 takes the
argmax after step 3. Ties go to the lowest id. `log_probs` are of the raw logits, before step 1.

Gumbel noise lies in [−3.14, 22.88] because x has 32 bits, so a token further than that range below the best
cannot win: leaving out its noise is exact.

Versions: ``eager`` reads no value on the host, so a device never waits; ``cpu`` has the two operators that
gain by looking at values as they go. Both give the same tokens, and are chosen by where the logits are.
"""

from torch import Tensor

from . import cpu, eager
from .eager import LogProbs, add_bias_, apply_penalties_, forbid_, greedy, log_probs


def keep_threshold(
    scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, largest_top_k: int, some_top_p: bool
) -> Tensor:
    """See `eager.keep_threshold`."""
    version = cpu.keep_threshold if scaled.is_cpu else eager.keep_threshold
    return version(scaled, top_k, top_p, min_p, largest_top_k=largest_top_k, some_top_p=some_top_p)


def gumbel_argmax(
    scaled: Tensor, threshold: Tensor, seeds: Tensor, choices: Tensor, positions: Tensor
) -> Tensor:
    """See `eager.gumbel_argmax`."""
    version = cpu.gumbel_argmax if scaled.is_cpu else eager.gumbel_argmax
    return version(scaled, threshold, seeds, choices, positions)


__all__ = [
    "LogProbs",
    "add_bias_",
    "apply_penalties_",
    "forbid_",
    "greedy",
    "gumbel_argmax",
    "keep_threshold",
    "log_probs",
]
