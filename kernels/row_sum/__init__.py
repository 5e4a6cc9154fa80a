"""The sum over the last axis, in an order that depends on its length alone.

    y[..., 0] = Σ x[..., i]

Shapes: ``x [..., D]`` → ``[...]`` in the dtype of ``x``.

torch may split a long sum over threads where there are fewer sums than threads, so that a row's sum depends
on how many rows stand beside it; sums of at most 64 elements it never splits.
"""

from .eager import row_sum

__all__ = ["row_sum"]
