"""What an operator asks of a running node besides serving. Every call is answered with its `call_id`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from ..runtime.logs import LogLevel
from ..runtime.pause_gate import PauseMode
from .bounds import Count, Finite, Int64, Name, Number, Path, Rank, Seconds, Text
from .order import Order

SettingValue: TypeAlias = Int64 | Finite | None
_FEW = Meta(max_length=2**10)

MAX_FORWARD_SLEEP_S = 60.0
# Forwards that a profile records where nobody says how many: what torch keeps of each is put together with
# the interpreter's lock held, so the loop stands still for so long.
DEFAULT_PROFILE_STEPS = 32
MAX_PROFILE_STEPS = 256

Activity: TypeAlias = Literal["CPU", "GPU"]
ProfileSteps: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_PROFILE_STEPS)]  # forwards
ProfileId: TypeAlias = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._-]{1,100}\Z")]


class GetInternalState(msgspec.Struct, frozen=True, kw_only=True, tag="get_internal_state"):
    call_id: Number


class SetInternalState(Order, frozen=True, kw_only=True, tag="set_internal_state"):
    """Change these settings, all or none."""

    settings: Annotated[dict[Name, SettingValue], _FEW]


class ConfigureLogging(Order, frozen=True, kw_only=True, tag="configure_logging"):
    """The level of messages that the process shows from now on."""

    log_level: LogLevel


class SlowDown(Order, frozen=True, kw_only=True, tag="slow_down"):
    """Sleep before each forward, at most MAX_FORWARD_SLEEP_S; 0: no more."""

    forward_sleep_s: Annotated[float, Meta(ge=0, le=MAX_FORWARD_SLEEP_S)]


class FreezeGc(Order, frozen=True, kw_only=True, tag="freeze_gc"):
    """What lives now is never looked at by the garbage collector again: its pauses get shorter."""


class StartProfile(Order, frozen=True, kw_only=True, tag="start_profile"):
    """Record forwards with torch's profiler; with `by_stage` prefill and decode steps in a trace each."""

    profile_id: ProfileId  # names the traces
    output_dir: Path  # on the node
    num_steps: ProfileSteps | None = None  # of each stage with `by_stage`; None: DEFAULT_PROFILE_STEPS
    by_stage: bool = False
    activities: Annotated[tuple[Activity, ...], Meta(max_length=2)] = ("CPU", "GPU")
    record_shapes: bool = False
    with_stack: bool = False


class StopProfile(Order, frozen=True, kw_only=True, tag="stop_profile"):
    """Write the traces, then answer."""


class PauseGeneration(Order, frozen=True, kw_only=True, tag="pause_generation"):
    """Compute nothing until ContinueGeneration. Rooms are served, and no deadline runs out.

    What is there ends as aborted ("abort"), fails retriably at no cost of an attempt ("retract"), or stays
    where it is ("in_place").
    """

    mode: PauseMode


class ContinueGeneration(Order, frozen=True, kw_only=True, tag="continue_generation"):
    """Idempotent."""


class CloseSession(Order, frozen=True, kw_only=True, tag="close_session"):
    """Keep this session's pages no longer than those of others. Idempotent."""

    session_id: Name


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

    count: Count
    last_s: Seconds
    p50_s: Seconds  # of the last ones
    p99_s: Seconds
    own_p99_s: Seconds  # of them too, in processor time of the loop's thread
    max_s: Seconds  # of all


class InternalState(msgspec.Struct, frozen=True, kw_only=True):
    """How a node stands, and how it is set."""

    settings: Annotated[dict[Name, SettingValue], _FEW]  # that may be changed
    requests: Annotated[dict[Name, Count], _FEW]  # in each state
    pause: Name  # the mode; empty: it computes
    forward_sleep_s: Seconds
    is_profiling: bool
    log_level: Name
    is_gc_frozen: bool  # since an operator asked for it
    memory_rss_bytes: Count  # of all ranks
    rank_rss_bytes: Annotated[tuple[Count, ...], _FEW] = ()  # rank by rank
    # By the tag of the message; "turn" is a whole step of the loop.
    loop_times: Annotated[dict[Name, LoopTime], _FEW] = {}


class InternalStateReply(msgspec.Struct, frozen=True, kw_only=True, tag="internal_state"):
    call_id: Number
    state: InternalState


class ProfileReply(msgspec.Struct, frozen=True, kw_only=True, tag="profile"):
    """The traces that were written, on the node; or why there are none."""

    call_id: Number
    success: bool
    message: Text = ""
    traces: Annotated[tuple[Path, ...], _FEW] = ()
    # Of further TP ranks: which one, and its file.
    rank_traces: Annotated[tuple[tuple[Rank, Path], ...], _FEW] = ()

    @property
    def all_traces(self) -> list[str]:
        return [*self.traces, *(path for _, path in self.rank_traces)]
