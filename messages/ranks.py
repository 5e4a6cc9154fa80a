"""The messages between rank 0 of a replica, which decides, and its further ranks, which execute.

They travel on a pipe of their own, in order, both ways. A rank that reads a `RunForward` computes it after
everything that came before; so all ranks run the same collectives in the same order, and none of them
depends on a rank's own clock or queue.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from ..runtime.logs import LogLevel
from .bounds import Blob, Count, Handles, Name, Number, Pages, Path, Positive, Rank, Seconds, Text, WorldSize
from .memory_region import MemoryRegion
from .operation import StartProfile
from .weights import MemoryTags

# ---- rank 0 to a further rank -----------------------------------------------------------------------


class RankStart(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """The first message: all that a rank must know to load its share."""

    rank: Rank
    size: WorldSize
    model_path: Path
    load_format: Name
    device: Name  # as --device says it
    dtype: Name
    page_size: Positive
    num_pages: Positive
    transfer_backend: Name
    transport: Name
    host: Name  # by which peers reach this rank's memory
    ib_device: Name
    faults: Name  # of writes that go wrong on purpose, see transfer/backends/faulty.py
    deterministic: bool
    num_threads: Positive
    rendezvous: Path  # path of a file by which the ranks find one another
    join_s: Seconds  # for all of them to come there
    trace_name: Name  # names the rank in the files of its profiles


class RunForward(msgspec.Struct, frozen=True, kw_only=True, tag="forward"):
    batch: Blob  # a forward batch, see engine/batch_codec.py


class CopyPages(msgspec.Struct, frozen=True, kw_only=True, tag="copy_pages"):
    """Answered by RankDone, as all with a ``call_id`` are that do not say otherwise."""

    call_id: Number
    source: Pages
    dest: Pages


class PoisonPages(msgspec.Struct, frozen=True, kw_only=True, tag="poison_pages"):
    """Fill pages with NaN (tests)."""

    call_id: Number
    pages: Pages


class LoadShard(msgspec.Struct, frozen=True, kw_only=True, tag="load_shard"):
    """Load the rank's share of a checkpoint beside the weights that serve."""

    call_id: Number
    model_path: Path


class KeepShard(msgspec.Struct, frozen=True, kw_only=True, tag="keep_shard"):
    """Hold the weights that serve for the next swap."""

    call_id: Number


class UpdateShard(msgspec.Struct, frozen=True, kw_only=True, tag="update_shard"):
    """Make new weights of those that serve and the tensors of a safetensors file, beside them."""

    call_id: Number
    file: Path
    source: Text  # where they came from, for the log


class CheckShard(msgspec.Struct, frozen=True, kw_only=True, tag="check_shard"):
    """Compute checksums of the rank's share; answered by RankChecked."""

    call_id: Number


class FillTensors(msgspec.Struct, frozen=True, kw_only=True, tag="fill_tensors"):
    """Write the rank's parts of these tensors into the safetensors file that was laid out for them."""

    call_id: Number
    file: Path


class SwapShard(msgspec.Struct, frozen=True, kw_only=True, tag="swap_shard"):
    """The next forward uses what was loaded last."""


class DropShard(msgspec.Struct, frozen=True, kw_only=True, tag="drop_shard"):
    """What was loaded last is not wanted."""


class MoveMemory(msgspec.Struct, frozen=True, kw_only=True, tag="move_memory"):
    """Release the memory that is named here and take the other back; answered by RankMoved."""

    call_id: Number
    released: MemoryTags


class StartRankProfile(msgspec.Struct, frozen=True, kw_only=True, tag="start_profile"):
    """From the next forward on."""

    call_id: Number
    plan: StartProfile


class StopRankProfile(msgspec.Struct, frozen=True, kw_only=True, tag="stop_profile"):
    """Answered by RankTraced."""

    call_id: Number


class SetRankLogLevel(msgspec.Struct, frozen=True, kw_only=True, tag="set_log_level"):
    level: LogLevel


class FreezeRankGc(msgspec.Struct, frozen=True, kw_only=True, tag="freeze_gc"):
    """See FreezeGc."""


class MeetRegion(msgspec.Struct, frozen=True, kw_only=True, tag="meet"):
    """A first contact with a rank of a peer. Its handle is reported by WritesEnded, as a write's is."""

    handle: Number
    region: MemoryRegion


class WriteRun(msgspec.Struct, frozen=True, kw_only=True, tag="write"):
    """One contiguous write. Offsets are in bytes from the start of each pool."""

    handle: Number
    region: MemoryRegion
    source: Count
    dest: Count
    num_bytes: Count


class CancelRuns(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    handles: Handles


class LeaveRegion(msgspec.Struct, frozen=True, kw_only=True, tag="leave"):
    region: MemoryRegion


ToRank: TypeAlias = (
    RankStart
    | RunForward
    | CopyPages
    | PoisonPages
    | LoadShard
    | KeepShard
    | UpdateShard
    | CheckShard
    | FillTensors
    | SwapShard
    | DropShard
    | MoveMemory
    | StartRankProfile
    | StopRankProfile
    | SetRankLogLevel
    | FreezeRankGc
    | MeetRegion
    | WriteRun
    | CancelRuns
    | LeaveRegion
)

# ---- a further rank to rank 0 -----------------------------------------------------------------------


class RankReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The share is loaded and the pool registered; the rank waits for the others to join."""

    region: MemoryRegion


class RankFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The rank cannot start, for a reason that a person can act on."""

    reason: Text


class RankDone(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """With an error it answers any call."""

    call_id: Number
    error: Text = ""


class RankChecked(msgspec.Struct, frozen=True, kw_only=True, tag="checked"):
    """What this rank adds to the checksum of each tensor, in hex."""

    call_id: Number
    sums: Annotated[dict[Name, Name], Meta(max_length=2**20)]


class RankMoved(msgspec.Struct, frozen=True, kw_only=True, tag="moved"):
    """The memory is as it was asked for."""

    call_id: Number
    region: MemoryRegion  # of the pool, as it was registered last


class RankTraced(msgspec.Struct, frozen=True, kw_only=True, tag="traced"):
    """The files of the profile that has ended."""

    call_id: Number
    rank: Rank
    traces: Annotated[tuple[Path, ...], Meta(max_length=2**10)]


class WriteEnd(msgspec.Struct, frozen=True, array_like=True):
    handle: Number
    state: Literal["done", "failed", "cancelled"]
    reason: Text = ""


class WritesEnded(msgspec.Struct, frozen=True, kw_only=True, tag="writes_ended"):
    ends: Annotated[tuple[WriteEnd, ...], Meta(max_length=2**24)]


RankAnswer: TypeAlias = RankDone | RankChecked | RankMoved | RankTraced
FromRank: TypeAlias = RankReady | RankFailed | RankAnswer | WritesEnded
