"""The router's settings, resolved once; the command line makes them from its flags."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.metric_aliases import MetricsCompat
from ..runtime.timing import UNSCALED, Timing


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterOptions:
    """Defaults are those of the flags."""

    max_attempts: int = 3  # failures of one choice without a token in between; COST_NO_ATTEMPT are free
    max_queued_requests: int = 1024
    max_queue_wait_s: float = 5.0  # that a new request may be expected to wait; 0: any time
    request_timeout_s: float = 600.0
    max_sessions: int = 1024
    session_timeout_s: float = 600.0  # idle, before a session is closed
    stream_interval: int = 1  # tokens per TokenOutput
    force_stream_interval: int = 16  # likewise, when the client does not stream
    metrics_compat: MetricsCompat = "none"  # names that /metrics has beside its own
    prefill_credit_tokens: int = 16_384  # queued on one prefill node before requests wait here
    timing: Timing = UNSCALED
