"""One token at a time."""

from __future__ import annotations

from torch import Tensor


def store_kv_(layer: Tensor, kv: Tensor, page: Tensor, offset: Tensor) -> None:
    for token, (p, o) in enumerate(zip(page.tolist(), offset.tolist(), strict=True)):
        for k_or_v in range(2):
            layer[p, :, k_or_v, o] = kv[token, k_or_v]
