"""The KV cache of one rank: one allocation, page after page."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..messages.kv_layout import DTYPE_BYTES, KVLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KVPool:
    """Pages of keys and values, ``[num_pages, num_kv_heads, num_layers, 2, page_size, head_dim]``.

    The memory may be given: a writable buffer shared with other processes, or a uint8 tensor registered with
    a transfer engine. It must hold `pool_bytes`. Who may touch which page is the page allocator's to say.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        device: torch.device,
        *,
        memory: Tensor | memoryview | None = None,
    ) -> None:
        item_bytes = DTYPE_BYTES[layout.dtype]
        if layout.stride_bytes % item_bytes or layout.stride_bytes < layout.page_bytes:
            raise ValueError(f"page stride of {layout.stride_bytes} bytes for pages of {layout.page_bytes}")
        self.layout = layout
        self.num_pages = num_pages
        self.nbytes = pool_bytes(layout, num_pages)
        if memory is None:
            self._bytes = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        elif isinstance(memory, memoryview):
            self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        else:
            self._bytes = memory.view(torch.uint8).flatten()
        if self._bytes.numel() < self.nbytes:
            raise ValueError(f"{self._bytes.numel()} bytes of memory for a pool of {self.nbytes}")
        self._bytes = self._bytes[: self.nbytes]
        shape = (layout.num_kv_heads, layout.num_layers, 2, layout.page_size, layout.head_dim)
        inner = torch.empty(shape, device="meta").stride()
        self.data = self._bytes.view(TORCH_DTYPES[layout.dtype]).as_strided(
            (num_pages, *shape), (layout.stride_bytes // item_bytes, *inner)
        )
        self._layers = tuple(self.data[:, :, layer] for layer in range(layout.num_layers))

    @property
    def data_ptr(self) -> int:
        return self._bytes.data_ptr()

    def layer(self, index: int) -> Tensor:
        """A layer of every page, a strided view ``[num_pages, num_kv_heads, 2, page_size, head_dim]``."""
        return self._layers[index]

    def view_bytes(self) -> Tensor:
        """The whole allocation as uint8, padding between pages included. It shares memory with the pool."""
        return self._bytes

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Page ``src[i]`` becomes page ``dst[i]``. All are read before any is written."""
        self.data[torch.tensor(dst, dtype=torch.int64)] = self.data[torch.tensor(src, dtype=torch.int64)]

    def poison(self, pages: Sequence[int]) -> None:
        """Fill pages with NaN, so that a read of what nobody wrote shows."""
        self.data[torch.tensor(pages, dtype=torch.int64)] = float("nan")


def pool_bytes(layout: KVLayout, num_pages: int) -> int:
    """Bytes a pool takes: every page with its stride."""
    return num_pages * layout.stride_bytes
