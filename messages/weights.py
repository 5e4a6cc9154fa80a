"""The messages of updates and questions about weights: from a router or a front to a node, and back.

An update has two phases and an id. *Prepare* loads and checks beside the weights that serve; *commit* swaps.
Tensors that a client sends are *staged* first, in parts, so that no message is large.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from .bounds import (
    Count,
    FileName,
    Measured,
    Name,
    Number,
    Path,
    Port,
    Positive,
    Rank,
    Seconds,
    Shape,
    Text,
    Unsigned64,
    WorldSize,
    ZmqAddress,
)
from .memory_region import MemoryRegion
from .order import Order

LEASE_S = 30.0
STAGE_PART_BYTES = 2 << 20  # what a node's loop copies in well under 5 ms
MAX_TRUNCATE = 1000  # rows of a tensor that is read
CUDA_HANDLE_BYTES = 64  # of a cudaIpcMemHandle_t
WRITE_PART_BYTES = 4 << 20  # what a node writes into another's inbox at once, off its loop


class FromDisk(msgspec.Struct, frozen=True, kw_only=True, tag="disk"):
    """A checkpoint's folder, which every node reads."""

    model_path: Path


class FromTensors(msgspec.Struct, frozen=True, kw_only=True, tag="tensors"):
    """What was staged under the update's id: a safetensors file with some of the model's tensors, or all."""

    num_bytes: Count


# As torch spells them: as safetensors does, and bytes of one.
TENSOR_DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
TensorDtype: TypeAlias = Annotated[str, Meta(pattern=rf"\A({'|'.join(TENSOR_DTYPES)})\Z")]


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """A tensor that a trainer broadcasts. ``dtype`` as torch spells it: ``bfloat16``."""

    name: Name
    dtype: TensorDtype
    shape: Shape


TensorSpecs: TypeAlias = Annotated[tuple[TensorSpec, ...], Meta(max_length=2**20)]
MAX_GROUP_TIMEOUT_S = 3600.0
GroupTimeout: TypeAlias = Annotated[float, Meta(gt=0, le=MAX_GROUP_TIMEOUT_S)]


class FromGroup(msgspec.Struct, frozen=True, kw_only=True, tag="group"):
    """What rank 0 of an update group broadcasts next: tensor by tensor, or all as one row of bytes."""

    group_name: Name
    tensors: TensorSpecs
    is_one_bucket: bool
    timeout_s: GroupTimeout


class FromSharedMemory(msgspec.Struct, frozen=True, kw_only=True, tag="shared_memory"):
    """A safetensors file in /dev/shm of the node's host, left as it is until the answer."""

    name: FileName


CudaHandle: TypeAlias = Annotated[bytes, Meta(min_length=CUDA_HANDLE_BYTES, max_length=CUDA_HANDLE_BYTES)]


class FromGpuMemory(msgspec.Struct, frozen=True, kw_only=True, tag="gpu_memory"):
    """Tensors one behind the other in memory of a GPU, which a process on the node's host holds."""

    device_uuid: Name  # as `nvidia-smi -L` tells it, with or without "GPU-"
    handle: CudaHandle  # a cudaIpcMemHandle_t, of the whole allocation
    offset: Count  # bytes, where the first tensor begins in it
    tensors: TensorSpecs


class FromPeer(msgspec.Struct, frozen=True, kw_only=True, tag="peer"):
    """The weights that another node serves, asked for over a connection to its scheduler.

    With `update_id` they must be those of this update still, and serve under their fingerprint.
    """

    zmq_address: ZmqAddress
    update_id: Name = ""
    fingerprint: Name = ""


class FromServed(msgspec.Struct, frozen=True, kw_only=True, tag="served"):
    """The weights that serve already: what changes is their version."""


WeightSource: TypeAlias = (
    FromDisk | FromTensors | FromGroup | FromSharedMemory | FromGpuMemory | FromPeer | FromServed
)


_OF_ONE_NODE = "node-"


def of_one_node(update_id: str) -> str:
    """The id of an update that somebody forces on one node: the cluster does not follow it."""
    return _OF_ONE_NODE + update_id


def is_of_cluster(update_id: str) -> bool:
    return bool(update_id) and not update_id.startswith(_OF_ONE_NODE)


GroupBackend: TypeAlias = Literal["gloo", "nccl"]


class UpdateGroupSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A process group for weights: a trainer's rank 0, which listens, maybe more of its ranks, and nodes."""

    name: Name
    backend: GroupBackend
    master_address: Name
    master_port: Port
    world_size: WorldSize
    timeout_s: GroupTimeout


class JoinUpdateGroup(Order, frozen=True, kw_only=True, tag="join_update_group"):
    """Become `rank` of a process group whose rank 0, a trainer's, listens at the master's address."""

    group_name: Name
    backend: GroupBackend
    master_address: Name
    master_port: Port
    rank: Rank
    world_size: WorldSize
    timeout_s: GroupTimeout


class LeaveUpdateGroup(Order, frozen=True, kw_only=True, tag="leave_update_group"):
    group_name: Name


class StageWeights(msgspec.Struct, frozen=True, kw_only=True, tag="stage_weights"):
    """One part of an update's safetensors file, at most STAGE_PART_BYTES, in order."""

    call_id: Number
    update_id: Name
    offset: Count
    data: Annotated[bytes, Meta(max_length=STAGE_PART_BYTES)]


class PrepareWeights(msgspec.Struct, frozen=True, kw_only=True, tag="prepare_weights"):
    """Load and check weights beside those that serve. The message of a yes is their fingerprint."""

    call_id: Number
    update_id: Name
    source: WeightSource
    weight_version: Annotated[Name, Meta(min_length=1)]  # an empty one means any, in a request
    lease_s: Seconds = LEASE_S  # once it is prepared, and nobody keeps or commits it


class KeepWeights(msgspec.Struct, frozen=True, kw_only=True, tag="keep_weights"):
    """The coordinator of an update lives and goes on with it: do not roll it back for `lease_s` from now."""

    update_id: Name
    lease_s: Seconds


class CommitWeights(msgspec.Struct, frozen=True, kw_only=True, tag="commit_weights"):
    """Swap to what is prepared, drop the prefix cache, shake hands again. It is decided: all have prepared.

    A node that is not idle says no, takes no new work, and swaps as soon as it is; asked again it says yes.
    """

    call_id: Number
    update_id: Name


class DiscardWeights(msgspec.Struct, frozen=True, kw_only=True, tag="discard_weights"):
    """Forget what was staged and prepared under this id."""

    call_id: Number
    update_id: Name


# No forward is captured as a graph today: "graphs" is state without bytes.
MemoryTag: TypeAlias = Literal["weights", "kv_cache", "graphs"]
MemoryTags: TypeAlias = Annotated[tuple[MemoryTag, ...], Meta(max_length=3)]
MEMORY_TAGS: tuple[MemoryTag, ...] = ("weights", "kv_cache", "graphs")


class ReleaseMemory(Order, frozen=True, kw_only=True, tag="release_memory"):
    """Give memory back to the host, as soon as the node is idle and no peer can write any more."""

    tags: MemoryTags
    timeout_s: Seconds


class ResumeMemory(Order, frozen=True, kw_only=True, tag="resume_memory"):
    """Take it again, with the weights that were there and an empty KV cache."""

    tags: MemoryTags
    if_released: bool = False  # what is not is no fault: all nodes of a cluster are asked alike


class MemoryReply(msgspec.Struct, frozen=True, kw_only=True, tag="memory"):
    """The outcome of a release or a resume. ``success`` false: why not, in ``message``."""

    call_id: Number
    success: bool
    message: Text = ""
    resumed: MemoryTags = ()  # by this call
    released: MemoryTags = ()  # after it


class OpenWeights(msgspec.Struct, frozen=True, kw_only=True, tag="open_weights"):
    """Let me read the weights that serve now, as a safetensors file."""

    call_id: Number


class ReadWeights(msgspec.Struct, frozen=True, kw_only=True, tag="read_weights"):
    """Bytes of an image that was opened, at most STAGE_PART_BYTES."""

    call_id: Number
    image: Number
    offset: Count
    num_bytes: Count


class TransferKind(msgspec.Struct, frozen=True, array_like=True):
    """What two transfer engines must have in common to reach one another."""

    backend: Name  # "mooncake" | "nixl" | "shm"
    transport: Name  # "tcp" | "rdma" | "shm"

    def __str__(self) -> str:
        return f"{self.backend}/{self.transport}"


class OfferInbox(msgspec.Struct, frozen=True, kw_only=True, tag="offer_inbox"):
    """I can take weights from a transfer engine of this kind. A yes: one is up here, and may meet mine."""

    call_id: Number
    kind: TransferKind


class MeetInbox(msgspec.Struct, frozen=True, kw_only=True, tag="meet_inbox"):
    """Sent at once when an offer was answered with yes, so its sender is alive: meet it now."""

    call_id: Number
    region: MemoryRegion


class WriteWeights(msgspec.Struct, frozen=True, kw_only=True, tag="write_weights"):
    """Write bytes of an image that was opened, at most WRITE_PART_BYTES, into an inbox that was met."""

    call_id: Number
    image: Number
    offset: Count
    num_bytes: Count
    region: MemoryRegion
    dest: Count  # offset in the region, in bytes


class GetWeights(msgspec.Struct, frozen=True, kw_only=True, tag="get_weights"):
    """The first rows of one tensor, by its name in the checkpoint."""

    call_id: Number
    name: Name
    truncate_size: Annotated[int, Meta(ge=1, le=MAX_TRUNCATE)]


class CheckWeights(msgspec.Struct, frozen=True, kw_only=True, tag="check_weights"):
    """Checksums of all weights that serve."""

    call_id: Number


class SaveWeights(Order, frozen=True, kw_only=True, tag="save_weights"):
    """Write the weights that serve as a checkpoint: into a new folder of the node's host, or to a URL."""

    target: Path
    is_remote: bool
    max_shard_bytes: Positive


_Row: TypeAlias = Annotated[list[Measured], Meta(max_length=2**24)]
TensorValues: TypeAlias = Annotated[list[Measured | _Row], Meta(max_length=MAX_TRUNCATE)]


class WeightsReply(msgspec.Struct, frozen=True, kw_only=True, tag="weights"):
    """The first rows of a tensor, as numbers. ``success`` false: why not, in ``message``."""

    call_id: Number
    success: bool
    message: Text = ""
    dtype: Name = ""  # as the node holds it
    shape: Shape = ()  # of the whole tensor
    values: TensorValues = []


class WeightImageReply(msgspec.Struct, frozen=True, kw_only=True, tag="weight_image"):
    """Names an image of weights, until its last byte is read or nobody reads it for a minute."""

    call_id: Number
    success: bool
    message: Text = ""
    image: Number = 0
    num_bytes: Count = 0
    update_id: Name = ""  # of what is read
    fingerprint: Name = ""


class WeightBytesReply(msgspec.Struct, frozen=True, kw_only=True, tag="weight_bytes"):
    call_id: Number
    success: bool
    message: Text = ""
    data: Annotated[bytes, Meta(max_length=STAGE_PART_BYTES)] = b""


class WeightsWrittenReply(msgspec.Struct, frozen=True, kw_only=True, tag="weights_written"):
    """The bytes are in place. Without ``success`` they may still land, at any time."""

    call_id: Number
    success: bool
    message: Text = ""
    num_bytes: Count = 0  # fewer than were asked for at the end of the image
    crc32: Unsigned64 = 0  # of these bytes


class WeightChecksReply(msgspec.Struct, frozen=True, kw_only=True, tag="weight_checks"):
    """Checksums, 16 hex digits each, the same on nodes of any TP size that hold the same bits."""

    call_id: Number
    success: bool
    message: Text = ""
    weight_version: Name = ""
    tensors: Annotated[dict[Name, Name], Meta(max_length=2**20)] = {}  # by name in the checkpoint
    whole: Name = ""  # of all of them
