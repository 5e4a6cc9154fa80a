"""The KV cache's layout: what a prefill and a decode node must agree on byte by byte."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from .bounds import Count, Dimension

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KVDtype: TypeAlias = Annotated[str, Meta(pattern=rf"\A({'|'.join(DTYPE_BYTES)})\Z")]


def kv_heads_of_rank(num_kv_heads: int, tp_size: int, rank: int) -> range:
    """The heads of the model that lie in this rank's pool. With more ranks than heads, ranks hold copies."""
    if tp_size <= num_kv_heads:
        return range(num_kv_heads * rank // tp_size, num_kv_heads * (rank + 1) // tp_size)
    head = rank // (tp_size // num_kv_heads)
    return range(head, head + 1)


def heads_divide(num_kv_heads: int, tp_size: int) -> bool:
    """Whether every rank holds equally many KV heads, or every head lies on equally many ranks."""
    return num_kv_heads % tp_size == 0 or tp_size % num_kv_heads == 0


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One allocation per rank: ``[num_pages, num_kv_heads, num_layers, 2, page_size, head_dim]``.

    A page is one contiguous run of ``page_bytes``; consecutive pages start ``page_stride_bytes`` apart.
    A head slice of a page is one run for all layers, so different TP sizes need no staging.
    """

    num_kv_heads: Dimension
    num_layers: Dimension
    page_size: Dimension  # tokens
    head_dim: Dimension
    dtype: KVDtype
    page_stride_bytes: Count = 0  # 0: pages are dense

    @property
    def head_bytes(self) -> int:
        """Bytes of one kv head of one page, all layers, K and V."""
        return self.num_layers * 2 * self.page_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def page_bytes(self) -> int:
        return self.num_kv_heads * self.head_bytes

    @property
    def stride_bytes(self) -> int:
        return self.page_stride_bytes or self.page_bytes

    def of_rank(self, tp_size: int) -> KVLayout:
        """Of the pool of one of `tp_size` ranks, where this is the layout of the whole model's heads."""
        if tp_size == 1:
            return self
        num_kv_heads = len(kv_heads_of_rank(self.num_kv_heads, tp_size, 0))
        return msgspec.structs.replace(self, num_kv_heads=num_kv_heads)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)
