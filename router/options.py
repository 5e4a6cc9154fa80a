"""What the parts of a router are told."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.config import Routing
from ..runtime.metric_aliases import MetricsCompat
from ..runtime.timing import UNSCALED, Timing

_BY_DEFAULT = Routing()


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterOptions:
    routing: Routing = _BY_DEFAULT
    metrics_compat: MetricsCompat = "none"
    timing: Timing = UNSCALED
