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
cannot win, and noise is computed only for the others: the pruning is exact.
"""

from .eager import (
    LogProbs,
    add_bias_,
    apply_penalties_,
    forbid_,
    greedy,
    gumbel_argmax,
    keep_threshold,
    log_probs,
)

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
