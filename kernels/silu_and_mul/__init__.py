"""The gate of a SwiGLU feed-forward layer, over the two halves of one fused projection.

    y = silu(gate) · up,   silu(g) = g / (1 + exp(-g)),   x = [gate | up]

Shapes: ``x [T, 2·I]`` → ``[T, I]``.
Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from .deterministic import silu_and_mul as deterministic_silu_and_mul
from .eager import silu_and_mul

__all__ = ["deterministic_silu_and_mul", "silu_and_mul"]
