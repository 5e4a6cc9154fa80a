"""What the weight commands take and answer over HTTP, and what the bodies say as messages."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ...messages.bounds import Count, Name, Path, Positive, Rank, WorldSize
from ...messages.weights import (
    CUDA_HANDLE_BYTES,
    MAX_GROUP_TIMEOUT_S,
    TENSOR_DTYPES,
    FromGpuMemory,
    FromSharedMemory,
    GroupBackend,
    TensorSpec,
    WeightChecksReply,
)
from ..generation import UpdateMode
from ..http.fields import FieldRules, Unsupported
from ..refusals import bad_value

DEFAULT_SHARD_BYTES = 5 << 30


class UpdateWeightsRequest(msgspec.Struct, kw_only=True):
    model_path: Path
    weight_version: Name | None = None
    mode: str = "wait"  # what running requests do
    abort_all_requests: bool = False  # the same as mode "abort"
    force: bool = False  # one node alone, against the rest of its cluster


class DistributedRequest(msgspec.Struct, kw_only=True):
    """What a trainer's rank 0 broadcasts next. ``flattened_bucket``: all tensors as one row of bytes."""

    names: list[Name]
    dtypes: list[str]
    shapes: list[Annotated[list[Count], Meta(max_length=8)]]
    group_name: Name = "weight_update_group"
    load_format: Literal["flattened_bucket"] | None = None
    weight_version: Name | None = None
    mode: str = "wait"  # what running requests do
    abort_all_requests: bool = False  # the same as mode "abort"
    timeout: float = 300.0
    force: bool = False


class GpuMemory(msgspec.Struct, kw_only=True):
    """Memory of a GPU that the caller holds. ``device_uuid`` as `nvidia-smi -L` tells it."""

    device_uuid: Name
    handle: bytes  # base64 of the cudaIpcMemHandle_t of the allocation
    offset: Count = 0  # bytes, where the first tensor begins in it


class IpcRequest(msgspec.Struct, kw_only=True):
    """``name``: of a safetensors file in /dev/shm of a host that all nodes share. Or ``gpu``, in memory of a
    GPU of that host, with what lies there, one tensor behind the other."""

    name: str | None = None
    gpu: GpuMemory | None = None
    names: list[Name] = []
    dtypes: list[str] = []
    shapes: list[Annotated[list[Count], Meta(max_length=8)]] = []
    weight_version: Name | None = None
    mode: str = "wait"
    abort_all_requests: bool = False  # the same as mode "abort"
    force: bool = False


class PeerRequest(msgspec.Struct, kw_only=True):
    """``peer``: URL of a node, of this cluster or of another one, that serves the weights wanted."""

    peer: str
    weight_version: Name | None = None  # default: the peer's
    mode: str = "wait"
    abort_all_requests: bool = False  # the same as mode "abort"
    force: bool = False


class UpdateVersionRequest(msgspec.Struct, kw_only=True):
    """The weights that serve get another name. Running requests end at once, as with SGLang, unless
    ``abort_all_requests`` is false or ``mode`` says otherwise."""

    new_version: Annotated[Name, Meta(min_length=1)]
    abort_all_requests: bool = True
    mode: str | None = None
    force: bool = False


class UpdateVersionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    success: bool
    message: str
    new_version: str


class InitGroupRequest(msgspec.Struct, kw_only=True):
    """Nodes become ranks from ``rank_offset`` on of a process group whose rank 0 listens at the master's."""

    master_address: Name
    master_port: int
    rank_offset: Rank
    world_size: WorldSize
    group_name: Name = "weight_update_group"
    backend: GroupBackend = "gloo"
    timeout: float = 120.0


class InitGroupAnswer(msgspec.Struct, frozen=True, kw_only=True):
    success: bool
    message: str
    ranks: dict[str, int]  # of each node, by URL


class DestroyGroupRequest(msgspec.Struct, kw_only=True):
    group_name: Name = "weight_update_group"


class MemoryRequest(msgspec.Struct, kw_only=True):
    """``cuda_graph``: SGLang's name of ``graphs``."""

    tags: list[Literal["weights", "kv_cache", "graphs", "cuda_graph"]] | None = None  # all


class SaveShardedRequest(msgspec.Struct, kw_only=True):
    path: Path  # a new folder, on the host of the node that writes it
    max_size: Positive = DEFAULT_SHARD_BYTES  # of a file


class SaveRemoteRequest(msgspec.Struct, kw_only=True):
    url: Path  # as fsspec takes it: s3://bucket/folder


class GetWeightsRequest(msgspec.Struct, kw_only=True):
    name: Name
    truncate_size: int = 100


class CheckWeightsRequest(msgspec.Struct, kw_only=True):
    """``snapshot`` keeps the nodes' checksums here, ``compare`` tells what has changed since then."""

    action: Literal["checksum", "snapshot", "compare"] = "checksum"


class CheckWeightsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """``success``: every node answered, and all hold the same bits."""

    success: bool
    message: str
    nodes: dict[str, WeightChecksReply]  # by URL


# Fields that SGLang's clients send along and that have no bearing here.
WEIGHT_RULES = FieldRules(
    harmless=frozenset({"load_format", "flush_cache", "is_async", "torch_empty_cache", "token_step"}),
    unsupported={
        "keep_pause": Unsupported("a pause is ended by who began it"),
        "recapture_cuda_graph": Unsupported("there are no graphs"),
        "manifest": Unsupported("the folder says what it holds"),
    },
)
DISTRIBUTED_RULES = FieldRules(harmless=frozenset({"flush_cache", "torch_empty_cache"}))
SHARDED_RULES = FieldRules(unsupported={"pattern": Unsupported("files are named as checkpoints are")})
_MODES: dict[str, UpdateMode] = {"wait": "wait", "abort": "abort", "retract": "retract", "keep": "retract"}
_NO_MIX = " (`in_place` would go on with a KV cache that other weights computed.)"


def ipc_source(body: IpcRequest) -> FromSharedMemory | FromGpuMemory:
    if (body.name is None) == (body.gpu is None):
        raise bad_value("name", "Give either `name` or `gpu`.")
    if (gpu := body.gpu) is not None:
        if len(gpu.handle) != CUDA_HANDLE_BYTES:
            text = f"`gpu.handle` must be {CUDA_HANDLE_BYTES} bytes in base64, a cudaIpcMemHandle_t."
            raise bad_value("gpu", text)
        return FromGpuMemory(
            device_uuid=gpu.device_uuid, handle=gpu.handle, offset=gpu.offset, tensors=tensor_specs(body)
        )
    name = body.name or ""
    if not re.fullmatch(r"[^./\x00][^/\x00]{0,254}", name):
        raise bad_value("name", "`name` must be the plain name of a file in /dev/shm.")
    return FromSharedMemory(name=name)


def tensor_specs(body: DistributedRequest | IpcRequest) -> tuple[TensorSpec, ...]:
    if not body.names or not len(body.names) == len(body.dtypes) == len(body.shapes):
        raise bad_value("names", "`names`, `dtypes` and `shapes` must be of one length, and not empty.")
    if len(set(body.names)) < len(body.names):
        raise bad_value("names", "`names` holds a name twice.")
    specs = []
    for name, dtype, shape in zip(body.names, body.dtypes, body.shapes, strict=True):
        plain = dtype.removeprefix("torch.")
        if plain not in TENSOR_DTYPES:
            raise bad_value("dtypes", f"{dtype!r} of {name} is none of {', '.join(TENSOR_DTYPES)}.")
        specs.append(TensorSpec(name, plain, tuple(shape)))
    return tuple(specs)


def group_timeout_s(seconds: float) -> float:
    if not 0 < seconds <= MAX_GROUP_TIMEOUT_S:
        raise bad_value(
            "timeout", f"`timeout` must be more than 0 and at most {MAX_GROUP_TIMEOUT_S:g} seconds."
        )
    return seconds


def update_mode(name: str, *, aborts: bool) -> UpdateMode:
    """By vLLM's and by SGLang's names."""
    if name not in _MODES:
        raise bad_value("mode", f"`mode` must be one of {', '.join(_MODES)}, got {name!r}.{_NO_MIX}")
    return "abort" if aborts else _MODES[name]
