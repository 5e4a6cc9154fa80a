"""The rows in tiles of a few fixed heights, so that a row's bits do not depend on how many rows there are.

A BLAS library chooses its kernel, and with it the order in which a row's products are added, by the shape of
the call: here one row, two or three rows and four or more rows give three different results. With the height
fixed every call is the same call. One height for all would read the weights once for every few rows of a long
prompt, so there are several; which of them give a row the same bits as `BASE_HEIGHT` does on this machine is
tested at start-up (``engine/operators.py``), and only those are used.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

HEIGHTS = (4, 8, 16, 32, 64, 128, 256)
BASE_HEIGHT = 16

# From here on a rest is split rather than padded: below, one more pass over the weights costs more than
# computing rows that nobody reads.
_SPLIT_FROM = 64


def row_tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, heights: tuple[int, ...]) -> Tensor:
    """`heights` ascend; which of them a row falls into must not change its bits."""
    num_rows = x.shape[0]
    x = x.contiguous()
    out = x.new_empty((num_rows, weight.shape[0]))
    transposed = weight.t()
    for start, height in cover(num_rows, heights):
        rows = slice(start, start + height)
        if start + height <= num_rows:
            torch.mm(x[rows], transposed, out=out[rows])
        else:
            padded = x.new_zeros((height, x.shape[1]))
            padded[: num_rows - start] = x[rows]
            out[rows] = torch.mm(padded, transposed)[: num_rows - start]
    # Apart from the product, whose start value it would be: additions of single elements are exactly rounded.
    return out if bias is None else out.add_(bias)


def cover(num_rows: int, heights: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first row, height) of the tiles that cover so many rows; the last may reach beyond them."""
    start = 0
    while (left := num_rows - start) > 0:
        fitting = [height for height in heights if height <= left]
        reaching = [height for height in heights if height >= left]
        height = reaching[0] if reaching and (left <= _SPLIT_FROM or not fitting) else fitting[-1]
        yield start, height
        start += height
