"""How long the processes of a cluster wait for one another: every such duration, once.

In here: leases, pings and the silences that they end, pauses before something is tried again, graces, drains,
and how long a call to another process may take. Not in here: what an operator or a client sets (flags and
`Limits`), how often one function looks again at what is its own, what is a property of a message (its bounds)
or of a measurement (buckets, windows), and what clients outside of a cluster wait (`client/`, `bench/`).
Those are constants where they are used; `tests/unit/runtime/test_timing.py` lists them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds. Given to whoever needs it when it is made; one that contradicts itself cannot be made."""

    # ---- a node and its routers
    lease_s: float = 5.0  # a router forgets a node that has not registered again
    pong_timeout_s: float = 2.0  # without a pong: it gets no work, and its attempts are made again elsewhere
    ping_interval_s: float = 1.0  # a router's, of each node
    entry_interval_s: float = 1.0  # a router's, of URLs that it was given, until they say who they are
    roster_interval_s: float = 3.0  # a router's, of naming the prefill nodes to decode nodes
    roster_life_s: float = 30.0  # a router that named them and is silent since: its word counts no more
    front_ping_interval_s: float = 1.0  # a node front's, of its scheduler; it registers the node as often
    front_ping_timeout_s: float = 2.0
    front_reconnect_s: float = 0.2  # while the scheduler starts, or has lost its connection
    scheduler_gone_s: float = 10.0  # without a connection, after there was one: the front ends
    register_timeout_s: float = 1.0
    entry_lookup_s: float = 2.0  # for who answers at a URL to say which node it is
    nonce_life_s: float = 30.0  # for who asks to join to prove the cluster secret with it
    # That a router which had this node may be out of reach without a word: it is started again, or
    # `pdserve up` ends, which ends it first.
    router_away_s: float = 5.0

    # ---- a request
    # For a pair of nodes to become ready: the only node of a role may be draining, and then start again.
    no_pair_timeout_s: float = 30.0
    prefill_wait_s: float = 30.0  # for the first prefill node, before decode nodes prefill by themselves
    gate_patience_s: float = 1.0  # the gates are hints: the head of the queue passes them after this long
    busy_delay_s: float = 0.02  # before a request sent back at no cost goes again; doubles each time
    max_busy_delay_s: float = 0.5
    retry_delay_s: float = 0.25  # before the second new attempt; longer before each further one
    resend_interval_s: float = 0.5  # between two requests for the same gap
    abort_grace_s: float = 1.0  # for nodes to send what they have of an aborted request
    # A request that finds no pages lets smaller ones pass for so long; then the line waits for it.
    overtaking_s: float = 5.0
    closed_attempt_s: float = 30.0  # that a node can be asked again for the outputs of one that has ended
    health_probe_s: float = 20.0  # for the one token of /health_generate

    # ---- a hand-off, between a decode node and a prefill node
    peer_ping_interval_s: float = 1.0  # decode's
    peer_silence_s: float = 2.0  # without a pong, prefill is lost
    # ... and one that announced to be busy. Its word that this is over can be lost with the connection: to
    # believe the announcement to its end would be to wait minutes for nobody.
    busy_peer_silence_s: float = 10.0
    # Without a ping, decode is gone, and its rooms are a waste of work.
    decode_silence_s: float = 10.0
    # A welcome that has not come by then does not come: engines give up in a minute who they cannot reach.
    welcome_timeout_s: float = 300.0
    peer_retry_s: float = 0.2  # before the next connection; doubles each time
    max_peer_retry_s: float = 2.0
    room_abort_retry_s: float = 0.5  # before the same room's abort is sent again; doubles each time
    max_room_abort_retry_s: float = 4.0
    settle_s: float = 2.0  # bytes of a write that failed may still land, where the engine cannot say
    settle_tick_s: float = 0.25  # settling pages are looked at as often, and a look counts for no more
    late_tick_s: float = 0.25  # a tick this long after it was due: this very process was held
    # Before a first contact that failed is repeated, at most: this is for the minute that Mooncake takes to
    # give a frozen peer up. One that seems to have lasted for an hour was a process, or a host, that stood
    # still, and its peer may be well since.
    max_contact_pause_s: float = 240.0
    stuck_contact_s: float = 1.0  # a first contact that lasts longer: the node says that it is busy
    death_probe_interval_s: float = 1.0
    death_probe_timeout_s: float = 1.0

    # ---- a node's own processes
    loading_s: float = 120.0  # that reading a checkpoint can hold a scheduler's loop
    drain_s: float = 10.0  # for what runs to end, after the first signal
    node_grace_s: float = 15.0  # for a node to end, before `pdserve up` kills it
    front_restart_s: float = 0.5  # one that dies at each start must not keep the loop busy
    rank_start_s: float = 600.0  # for further ranks to load
    rank_join_s: float = 120.0  # for all ranks to meet, once they have loaded
    rank_call_s: float = 10.0  # a copy of pages on another rank that takes longer is a hang
    rank_reap_s: float = 1.0  # between the failure of a collective and the death that caused it
    # The kernel kills further ranks once the first one, whose ports peers look at, is gone: until then they
    # may write.
    rank_outlives_s: float = 1.0
    hang_s: float = 10.0  # a step that takes longer, and ten times what was expected, hangs
    longest_tick_s: float = 1.0  # a longer one was a hold of this very process, not of the engine
    restart_s: float = 1.0  # before the second death in a row is made good; doubles with each further one
    max_restart_s: float = 60.0
    steady_s: float = 60.0  # a child that ran for this long does not "keep dying"
    cluster_start_s: float = 600.0  # for `pdserve up` to be ready
    router_call_s: float = 5.0  # for the router of `pdserve up` to answer it
    obituary_retry_s: float = 0.5  # before it is told once more that a node is dead
    trace_export_s: float = 5.0  # for the collector of traces to take them, and what is left at the end

    # ---- calls to a node, for its answer
    node_call_s: float = 5.0  # where it has it at hand
    profile_start_s: float = 60.0  # the first one loads a library
    profile_end_s: float = 600.0  # traces of long profiles are large
    weight_part_s: float = 30.0  # to take one part of an update
    weight_discard_s: float = 10.0

    # ---- weights and memory
    weight_drain_s: float = 600.0  # for running requests to end before new weights are loaded
    weight_update_s: float = 600.0  # for each node to load, and to swap
    weight_lease_s: float = 30.0  # nodes roll an update back whose coordinator is silent
    weight_commit_s: float = 10.0  # for what clients left behind to end on every node, before it swaps
    weight_rejoin_s: float = 1.0  # that a node serves other weights, before it is brought to the cluster's
    weight_rejoin_retry_s: float = 5.0  # before the same node is brought once more
    weight_ready_s: float = 30.0  # for nodes that have swapped to be pairs again
    weight_image_s: float = 120.0  # for a peer to have its weights ready, which it may put together first
    weight_peer_silence_s: float = 30.0  # of a peer that is asked for parts of them
    weight_image_idle_s: float = 60.0  # an image that nobody reads is let go of
    weight_puller_idle_s: float = 60.0  # as is a puller that asks for nothing
    weight_write_stall_s: float = 5.0  # a write that takes longer goes to a node that takes nothing

    def __post_init__(self) -> None:
        """Raises ValueError."""
        holds = {
            "lease_s > 2 * front_ping_interval_s": self.lease_s > 2 * self.front_ping_interval_s,
            "pong_timeout_s > ping_interval_s": self.pong_timeout_s > self.ping_interval_s,
            "roster_life_s > 2 * roster_interval_s": self.roster_life_s > 2 * self.roster_interval_s,
            "peer_silence_s > peer_ping_interval_s": self.peer_silence_s > self.peer_ping_interval_s,
            "busy_peer_silence_s >= peer_silence_s": self.busy_peer_silence_s >= self.peer_silence_s,
            "decode_silence_s > 2 * peer_ping_interval_s": (
                self.decode_silence_s > 2 * self.peer_ping_interval_s
            ),
            "settle_s > settle_tick_s": self.settle_s > self.settle_tick_s,
            "node_grace_s > drain_s": self.node_grace_s > self.drain_s,
            "no_pair_timeout_s > drain_s": self.no_pair_timeout_s > self.drain_s,
            "max_busy_delay_s >= busy_delay_s": self.max_busy_delay_s >= self.busy_delay_s,
            "max_peer_retry_s >= peer_retry_s": self.max_peer_retry_s >= self.peer_retry_s,
            "max_room_abort_retry_s >= room_abort_retry_s": (
                self.max_room_abort_retry_s >= self.room_abort_retry_s
            ),
            "max_restart_s >= restart_s": self.max_restart_s >= self.restart_s,
        }
        if broken := [rule for rule, is_kept in holds.items() if not is_kept]:
            raise ValueError(f"{', '.join(broken)} is expected of {self}")

    def scaled(self, factor: float) -> Timing:
        """Every duration so many times as long: for tests of whole clusters, see `--time-scale`."""
        return Timing(**{name: factor * seconds for name, seconds in asdict(self).items()})

    @property
    def settle_margin_s(self) -> float:
        """A freeze too short to be noticed holds bytes up for almost a tick after they were due, and they
        land a moment after it. So a room settles for two ticks more than it must: the freeze, and the moment.
        """
        return 2 * self.settle_tick_s


UNSCALED = Timing()
MIN_TIME_SCALE, MAX_TIME_SCALE = 0.01, 100.0
