"""Causal attention of new tokens over a paged KV cache, prefill chunks and decode rows mixed.

    out[t] = softmax(q[t] · K[:p+1]ᵀ · scale) · V[:p+1]      p: position of token t in its own sequence

Shapes: ``q [T, Hq, D]``; ``layer [num_pages, Hkv, 2, page_size, D]``, a strided view of the pool that already
holds the keys and values of the new tokens; → ``out [T, Hq, D]``. Query head h reads KV head h // (Hq / Hkv).
The T tokens are those of the rows of a plan, one row after the other: row r holds positions
``[start, start + num_tokens)`` of a sequence whose first tokens lie in ``pages``.

Versions: ``eager`` is torch's flash attention; ``deterministic`` gives a query the same bits in any company.

Slots of a page at or after the sequence's end may hold anything, NaN included: no result depends on them.
"""

from .deterministic import paged_attention as deterministic_paged_attention
from .eager import paged_attention
from .plan import AttentionPlan, AttentionRow, grouping_key, plan_attention

__all__ = [
    "AttentionPlan",
    "AttentionRow",
    "deterministic_paged_attention",
    "grouping_key",
    "paged_attention",
    "plan_attention",
]
