"""One operator after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rms_norm.reference import rms_norm
from ..rotary.reference import rotary
from ..store_kv.reference import store_kv_


def rotate_and_store_(
    heads: Tensor,
    layer: Tensor,
    cos: Tensor,
    sin: Tensor,
    page: Tensor,
    offset: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    num_kv_heads = layer.shape[1]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
    v = heads[:, num_heads + num_kv_heads :]
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    heads[:, :num_heads] = rotary(q, cos, sin)
    store_kv_(layer, torch.stack((rotary(k, cos, sin), v), dim=1), page, offset)
