"""Root-mean-square layer norm over the last axis.

    y = x / sqrt(mean(x²) + eps) · weight

Shapes: ``x [..., D]``, ``weight [D]`` → ``[..., D]`` in the dtype of ``x``; the mean is taken in float32.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from .deterministic import rms_norm as deterministic_rms_norm
from .eager import rms_norm

__all__ = ["deterministic_rms_norm", "rms_norm"]
