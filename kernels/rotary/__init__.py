"""Rotary position embedding, the half-split form (dimension i is paired with i + D/2).

    [a | b] at angle θ  →  [a·cos θ − b·sin θ | b·cos θ + a·sin θ]

Shapes: ``x [T, H, D]``, changed in place (it may be a strided view: the query and key heads of a fused
projection); ``cos, sin [T, D/2]`` in the dtype of ``x``. The angles, with whatever scaling a model asks for,
are the caller's: see ``engine/rope.py``.
Source: Su et al., "RoFormer", 2021; the half-split order is the one of Hugging Face checkpoints.
"""

from .deterministic import rotary_ as deterministic_rotary_
from .eager import rotary_

__all__ = ["deterministic_rotary_", "rotary_"]
