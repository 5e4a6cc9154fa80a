"""In place, with products and sums apart: a fused multiply-add rounds once, and torch may or may not fuse
it."""

from __future__ import annotations

from torch import Tensor


def rotary_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    turned = (first * cos).sub_(second * sin)
    second.mul_(cos).add_(first * sin)
    first.copy_(turned)
