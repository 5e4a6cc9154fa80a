"""The router's settings, resolved once; the command line makes them from its flags."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.metric_aliases import MetricsCompat


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterOptions:
    """Defaults are those of the flags; what is no flag is a constant of the design."""

    max_attempts: int = 3  # failures of one choice without a token in between; COST_NO_ATTEMPT are free
    max_queued_requests: int = 1024
    max_queue_wait_s: float = 5.0  # that a new request may be expected to wait; 0: any time
    request_timeout_s: float = 600.0
    max_sessions: int = 1024
    session_timeout_s: float = 600.0  # idle, before a session is closed
    stream_interval: int = 1  # tokens per TokenOutput
    force_stream_interval: int = 16  # likewise, when the client does not stream
    metrics_compat: MetricsCompat = "none"  # names that /metrics has beside its own
    # How long a request waits for a pair of nodes to become ready: the only node of a role may be draining
    # (10 s) and then start again.
    no_pair_timeout_s: float = 30.0
    prefill_wait_s: float = 30.0  # for the first prefill node, before decode nodes prefill by themselves

    lease_s: float = 5.0
    ping_interval_s: float = 1.0
    pong_timeout_s: float = 2.0  # a node silent for longer gets no work and its attempts are made again
    poll_interval_s: float = 1.0  # of /node_entry of nodes given by URL, until they answer
    roster_interval_s: float = 3.0

    prefill_credit_tokens: int = 16_384  # queued on one prefill node before requests wait here
    gate_patience_s: float = 1.0  # the gates are hints: the head of the queue passes them after this long
    busy_delay_s: float = 0.02  # before a request sent back at no cost goes again; doubles each time
    max_busy_delay_s: float = 0.5
    retry_delay_s: float = 0.25  # before the second new attempt; longer before each further one
    resend_interval_s: float = 0.5  # between two requests for the same gap
    abort_grace_s: float = 1.0  # for nodes to send what they have of an aborted request

    weight_drain_s: float = 600.0  # for running requests to end before new weights are loaded
    weight_update_s: float = 600.0  # for each node to load, and to swap
    weight_lease_s: float = 30.0  # nodes roll an update back whose coordinator is silent for so long
    weight_commit_s: float = 10.0  # for what clients left behind to end on every node, before it swaps
    weight_rejoin_s: float = 1.0  # that a node serves other weights, before it is brought to the cluster's
    weight_ready_s: float = 30.0  # for nodes that have swapped to be pairs again
