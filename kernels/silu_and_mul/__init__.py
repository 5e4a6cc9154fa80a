"""The gate of a SwiGLU feed-forward layer, over the two halves of one fused projection.

    y = silu(gate) · up,   silu(g) = g / (1 + exp(-g)),   x = [gate | up]

Shapes: ``x [T, 2·I]`` → ``[T, I]``.
Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from .eager import silu_and_mul

__all__ = ["silu_and_mul"]
