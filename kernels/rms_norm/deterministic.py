"""The formula as operations on single elements, which are exactly rounded wherever an element stands, and a
sum in fixed order."""

from __future__ import annotations

from torch import Tensor

from ..row_sum import row_sum


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    mean_square = row_sum(x * x).div_(x.shape[-1])[..., None]
    return x.div(mean_square.add_(eps).sqrt_()).mul_(weight)
