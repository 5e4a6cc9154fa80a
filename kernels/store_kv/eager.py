"""One scatter over (page, slot)."""

from __future__ import annotations

from torch import Tensor


def store_kv_(layer: Tensor, kv: Tensor, page: Tensor, offset: Tensor) -> None:
    by_slot = layer.permute(0, 3, 2, 1, 4)  # [num_pages, page_size, 2, Hkv, D]
    by_slot[page, offset] = kv
