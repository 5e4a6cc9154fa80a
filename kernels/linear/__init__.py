"""A linear layer: the product of rows with a weight matrix.

    y[t] = W · x[t] + b

Shapes: ``x [T, K]``, ``weight [N, K]``, ``bias [N]`` or None → ``[T, N]`` in the dtype of ``x``.

Versions: ``eager`` gives all rows to one call of torch; which kernel that picks, and so a row's last bits,
depend on how many rows there are. ``row_tiled`` gives them in tiles of few fixed heights: see there.
"""

from .eager import linear
from .row_tiled import BASE_HEIGHT, HEIGHTS, cover, row_tiled_linear

__all__ = ["BASE_HEIGHT", "HEIGHTS", "cover", "linear", "row_tiled_linear"]
