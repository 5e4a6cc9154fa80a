"""What an operator asks of a running node besides serving. Every call is answered with its `call_id`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import msgspec

from ..runtime.pause_gate import PauseMode

SettingValue: TypeAlias = int | float | None

# The flags that may be changed while a node runs, by the role that has them.
SETTINGS: Mapping[str, frozenset[str]] = {
    "chunked_prefill_size": frozenset({"prefill"}),
    "max_queued_prefills": frozenset({"prefill"}),
    "schedule_conservativeness": frozenset({"decode"}),
    "local_prefill_threshold": frozenset({"decode"}),
}

MAX_FORWARD_SLEEP_S = 60.0

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
Activity: TypeAlias = Literal["CPU", "GPU"]


class GetInternalState(msgspec.Struct, frozen=True, kw_only=True, tag="get_internal_state"):
    call_id: int


class SetInternalState(msgspec.Struct, frozen=True, kw_only=True, tag="set_internal_state"):
    """Change these settings, all or none."""

    call_id: int = 0
    settings: dict[str, SettingValue]


class ConfigureLogging(msgspec.Struct, frozen=True, kw_only=True, tag="configure_logging"):
    """The level of messages that the process shows from now on."""

    call_id: int = 0
    log_level: LogLevel


class SlowDown(msgspec.Struct, frozen=True, kw_only=True, tag="slow_down"):
    """Sleep before each forward, at most MAX_FORWARD_SLEEP_S; 0: no more."""

    call_id: int = 0
    forward_sleep_s: float


class FreezeGc(msgspec.Struct, frozen=True, kw_only=True, tag="freeze_gc"):
    """What lives now is never looked at by the garbage collector again: its pauses get shorter."""

    call_id: int = 0


class StartProfile(msgspec.Struct, frozen=True, kw_only=True, tag="start_profile"):
    """Record forwards with torch's profiler; with `by_stage` prefill and decode steps in a trace each."""

    call_id: int = 0
    profile_id: str  # names the traces
    output_dir: str  # on the node
    num_steps: int | None = None  # forwards, of each stage with `by_stage`; None: until it is stopped
    by_stage: bool = False
    activities: tuple[Activity, ...] = ("CPU", "GPU")
    record_shapes: bool = False
    with_stack: bool = False


class StopProfile(msgspec.Struct, frozen=True, kw_only=True, tag="stop_profile"):
    call_id: int = 0


class PauseGeneration(msgspec.Struct, frozen=True, kw_only=True, tag="pause_generation"):
    """Compute nothing until ContinueGeneration. Rooms are served, and no deadline runs out.

    What is there ends as aborted ("abort"), fails retriably at no cost of an attempt ("retract"), or stays
    where it is ("in_place").
    """

    call_id: int = 0
    mode: PauseMode


class ContinueGeneration(msgspec.Struct, frozen=True, kw_only=True, tag="continue_generation"):
    """Idempotent."""

    call_id: int = 0


class CloseSession(msgspec.Struct, frozen=True, kw_only=True, tag="close_session"):
    """Keep this session's pages no longer than those of others. Idempotent."""

    call_id: int = 0
    session_id: str


NodeOperation: TypeAlias = (
    GetInternalState
    | SetInternalState
    | ConfigureLogging
    | SlowDown
    | FreezeGc
    | StartProfile
    | StopProfile
    | PauseGeneration
    | ContinueGeneration
    | CloseSession
)

# Those that are answered with a CallReply.
ClusterOperation: TypeAlias = (
    SetInternalState
    | ConfigureLogging
    | SlowDown
    | FreezeGc
    | StartProfile
    | PauseGeneration
    | ContinueGeneration
    | CloseSession
)


# ---- replies ----------------------------------------------------------------------------------------


class LoopTime(msgspec.Struct, frozen=True, kw_only=True):
    """How long the node's loop was held by one kind of message."""

    count: int
    last_s: float
    p50_s: float  # of the last ones
    p99_s: float
    own_p99_s: float  # of them too, in processor time of the loop's thread
    max_s: float  # of all


class InternalState(msgspec.Struct, frozen=True, kw_only=True):
    """How a node stands, and how it is set."""

    settings: dict[str, SettingValue]  # that may be changed
    requests: dict[str, int]  # in each state
    pause: str  # the mode; empty: it computes
    forward_sleep_s: float
    is_profiling: bool
    log_level: str
    is_gc_frozen: bool  # since an operator asked for it
    memory_rss_bytes: int  # of all ranks
    rank_rss_bytes: tuple[int, ...] = ()  # rank by rank
    loop_times: dict[str, LoopTime] = {}  # by the tag of the message; "turn" is a whole step of the loop


class InternalStateReply(msgspec.Struct, frozen=True, kw_only=True, tag="internal_state"):
    call_id: int
    state: InternalState


class ProfileReply(msgspec.Struct, frozen=True, kw_only=True, tag="profile"):
    """The traces that were written, on the node; or why there are none."""

    call_id: int
    success: bool
    message: str = ""
    traces: tuple[str, ...] = ()
    rank_traces: tuple[tuple[int, str], ...] = ()  # of further TP ranks: which one, and its file

    @property
    def all_traces(self) -> list[str]:
        return [*self.traces, *(path for _, path in self.rank_traces)]
