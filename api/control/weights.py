"""The routes about weights, on routers and nodes: update from disk or from tensors, read one, compare all.

Tensors travel as a safetensors file, which holds numbers and nothing that runs.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from ...messages.bounds import Count, Name, Path, Positive, Rank, WorldSize
from ...messages.weights import (
    CUDA_HANDLE_BYTES,
    MAX_GROUP_TIMEOUT_S,
    MAX_TRUNCATE,
    MEMORY_TAGS,
    TENSOR_DTYPES,
    FromGpuMemory,
    FromGroup,
    FromSharedMemory,
    GroupBackend,
    MemoryTag,
    TensorSpec,
    UpdateGroupSpec,
    WeightChecksReply,
    WeightsReply,
)
from ...runtime.errors import RequestError
from ..generation import AdminReply, GroupReply, UpdateMode
from ..http.answers import Outcome, json_response, outcome
from ..http.bodies import BodyLimits, parse_request, read_object
from ..http.fields import FieldRules, Unsupported
from ..http.mounting import GET, POST, Operation
from ..http.openapi import Bodies, reports
from ..refusals import bad_value, node_url
from .tensor_bodies import read_tensor_update

_NO_PICKLE = (
    "What comes over these sockets is pickled, and is not read: give `gpu` with a CUDA memory handle, or put "
    "a safetensors file into /dev/shm and give its `name`."
)
DEFAULT_SHARD_BYTES = 5 << 30
_MAX_NAMED = 8  # tensors that one message names


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
_NO_RULES = FieldRules()
_SHARDED_RULES = FieldRules(unsupported={"pattern": Unsupported("files are named as checkpoints are")})
_MODES: dict[str, UpdateMode] = {"wait": "wait", "abort": "abort", "retract": "retract", "keep": "retract"}
_NO_MIX = " (`in_place` would go on with a KV cache that other weights computed.)"


class WeightAdmin(Protocol):
    """The weights of a whole cluster, or of one node behind its front."""

    async def update_weights_from_disk(
        self, model_path: str, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply: ...

    async def update_weights_from_tensor(
        self, body: AsyncIterator[bytes], weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        """`body`: a safetensors file with some of the model's tensors, or all; it is read to its end."""
        ...

    async def update_weights_from_distributed(
        self, source: FromGroup, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply: ...

    async def update_weights_from_ipc(
        self, source: FromSharedMemory | FromGpuMemory, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply: ...

    async def update_weights_from_peer(
        self, peer_url: str, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        """From the weights that the node at this URL serves; without a version of its own with theirs."""
        ...

    async def update_weight_version(self, weight_version: str, mode: UpdateMode) -> AdminReply:
        """The weights stay as they are."""
        ...

    async def save_model(self, target: str, *, is_remote: bool, max_shard_bytes: int) -> AdminReply:
        """The weights that serve as a checkpoint, by one node: into a new folder of its host, or to a URL."""
        ...

    async def init_weights_update_group(self, group: UpdateGroupSpec, rank_offset: int) -> GroupReply:
        """A node alone takes rank `rank_offset`; of a cluster each node takes one from there on."""
        ...

    async def destroy_weights_update_group(self, name: str) -> AdminReply: ...

    async def release_memory_occupation(self, tags: tuple[MemoryTag, ...]) -> AdminReply: ...

    async def resume_memory_occupation(self, tags: tuple[MemoryTag, ...]) -> AdminReply: ...

    async def released_memory(self) -> frozenset[MemoryTag]:
        """What any node has released and not resumed."""
        ...

    async def weights_by_name(self, name: str, truncate_size: int) -> Mapping[str, WeightsReply]:
        """The first rows of one tensor, by node's URL."""
        ...

    async def check_weights(self) -> Mapping[str, WeightChecksReply]: ...


class WeightRoutes:
    """`is_node`: one node alone, whose update leaves the pairs of its cluster unlike: only with ``force``.
    `allows_pickles`: updates from tensors may come as SGLang's JSON."""

    def __init__(
        self, admin: WeightAdmin, limits: BodyLimits, *, is_node: bool, allows_pickles: bool = False
    ) -> None:
        self._admin = admin
        self._limits = limits
        self._is_node = is_node
        self._allows_pickles = allows_pickles
        self._snapshot: WeightChecksReply | None = None

    async def update_from_disk(self, http: Request) -> Response:
        raw = await read_object(http, self._limits)
        body = parse_request(raw, UpdateWeightsRequest, WEIGHT_RULES)
        if not self._may_update(force=body.force):
            return _one_node()
        reply = await self._admin.update_weights_from_disk(
            body.model_path, body.weight_version, _mode(body.mode, aborts=body.abort_all_requests)
        )
        return outcome(reply.success, reply.message)

    async def update_from_tensor(self, http: Request) -> Response:
        update = await read_tensor_update(
            http, self._limits, WEIGHT_RULES, allows_pickles=self._allows_pickles
        )
        mode = _mode(update.mode, aborts=update.abort_all_requests)
        if not self._may_update(force=update.force):
            return _one_node()
        reply = await self._admin.update_weights_from_tensor(update.body, update.weight_version, mode)
        return outcome(reply.success, reply.message)

    async def init_group(self, http: Request) -> Response:
        raw = await read_object(http, self._limits)
        body = parse_request(raw, InitGroupRequest, _NO_RULES)
        if not 0 < body.master_port < 2**16:
            raise bad_value("master_port", "`master_port` must be 1 to 65535.")
        if not 1 <= body.rank_offset < body.world_size:
            raise bad_value("rank_offset", "`rank_offset` must be at least 1 and less than `world_size`.")
        group = UpdateGroupSpec(
            name=body.group_name,
            backend=body.backend,
            master_address=body.master_address,
            master_port=body.master_port,
            world_size=body.world_size,
            timeout_s=_timeout_s(body.timeout),
        )
        reply = await self._admin.init_weights_update_group(group, body.rank_offset)
        answer = InitGroupAnswer(success=reply.success, message=reply.message, ranks=dict(reply.ranks))
        return json_response(answer, 200 if reply.success else 400)

    async def destroy_group(self, http: Request) -> Response:
        raw = await read_object(http, self._limits, optional=True)
        body = parse_request(raw, DestroyGroupRequest, _NO_RULES)
        reply = await self._admin.destroy_weights_update_group(body.group_name)
        return outcome(reply.success, reply.message)

    async def update_from_distributed(self, http: Request) -> Response:
        raw = await read_object(http, self._limits)
        body = parse_request(raw, DistributedRequest, DISTRIBUTED_RULES)
        source = FromGroup(
            group_name=body.group_name,
            tensors=_specs(body),
            is_one_bucket=body.load_format is not None,
            timeout_s=_timeout_s(body.timeout),
        )
        if not self._may_update(force=body.force):
            return _one_node()
        reply = await self._admin.update_weights_from_distributed(
            source, body.weight_version, _mode(body.mode, aborts=body.abort_all_requests)
        )
        return outcome(reply.success, reply.message)

    async def update_from_ipc(self, http: Request) -> Response:
        raw = await read_object(http, self._limits)
        if "zmq_handles" in raw:
            raise bad_value("zmq_handles", _NO_PICKLE)
        body = parse_request(raw, IpcRequest, DISTRIBUTED_RULES)
        source = _ipc_source(body)
        if not self._may_update(force=body.force):
            return _one_node()
        reply = await self._admin.update_weights_from_ipc(
            source, body.weight_version, _mode(body.mode, aborts=body.abort_all_requests)
        )
        return outcome(reply.success, reply.message)

    async def update_from_peer(self, http: Request) -> Response:
        raw = await read_object(http, self._limits)
        body = parse_request(raw, PeerRequest, _NO_RULES)
        peer = node_url("peer", body.peer)
        mode = _mode(body.mode, aborts=body.abort_all_requests)
        if not self._may_update(force=body.force):
            return _one_node()
        reply = await self._admin.update_weights_from_peer(peer, body.weight_version, mode)
        return outcome(reply.success, reply.message)

    async def update_version(self, http: Request) -> Response:
        raw = await read_object(http, self._limits)
        body = parse_request(raw, UpdateVersionRequest, _NO_RULES)
        given = "abort" if body.abort_all_requests else "wait"
        mode = _mode(given if body.mode is None else body.mode, aborts=False)
        if not self._may_update(force=body.force):
            return _one_node()
        reply = await self._admin.update_weight_version(body.new_version, mode)
        answer = UpdateVersionAnswer(
            success=reply.success, message=reply.message, new_version=body.new_version
        )
        return json_response(answer, 200 if reply.success else 400)

    async def save_sharded(self, http: Request) -> Response:
        raw = await read_object(http, self._limits)
        body = parse_request(raw, SaveShardedRequest, _SHARDED_RULES)
        if not body.path.startswith("/"):
            raise bad_value("path", "`path` must be an absolute path of the node's host.")
        reply = await self._admin.save_model(body.path, is_remote=False, max_shard_bytes=body.max_size)
        return outcome(reply.success, reply.message)

    async def save_remote(self, http: Request) -> Response:
        raw = await read_object(http, self._limits)
        body = parse_request(raw, SaveRemoteRequest, _NO_RULES)
        if "://" not in body.url:
            raise bad_value("url", "`url` must have a scheme, such as s3://bucket/folder.")
        reply = await self._admin.save_model(body.url, is_remote=True, max_shard_bytes=DEFAULT_SHARD_BYTES)
        return outcome(reply.success, reply.message)

    async def release_memory(self, http: Request) -> Response:
        reply = await self._admin.release_memory_occupation(await self._tags(http))
        return outcome(reply.success, reply.message)

    async def resume_memory(self, http: Request) -> Response:
        reply = await self._admin.resume_memory_occupation(await self._tags(http))
        return outcome(reply.success, reply.message)

    async def sleep(self, http: Request) -> Response:
        """vLLM's name of a release. Both of its levels: nothing stays in the node's memory, and the weights
        come back as they were."""
        if (level := http.query_params.get("level", "1")) not in ("1", "2"):
            raise bad_value("level", f"`level` must be 1 or 2, got {level!r}.")
        reply = await self._admin.release_memory_occupation(MEMORY_TAGS)
        return outcome(reply.success, reply.message)

    async def wake_up(self, http: Request) -> Response:
        """vLLM's name of a resume: of all, or of what each ``tags`` in the query names."""
        wanted = http.query_params.getlist("tags")
        if unknown := [tag for tag in wanted if tag not in MEMORY_TAGS]:
            raise bad_value("tags", f"`tags` must be of {', '.join(MEMORY_TAGS)}, got {unknown[0]!r}.")
        tags = tuple(tag for tag in MEMORY_TAGS if tag in wanted) or MEMORY_TAGS
        reply = await self._admin.resume_memory_occupation(tags)
        return outcome(reply.success, reply.message)

    async def is_sleeping(self, _: Request) -> Response:
        return json_response({"is_sleeping": bool(await self._admin.released_memory())})

    async def _tags(self, http: Request) -> tuple[MemoryTag, ...]:
        raw = await read_object(http, self._limits, optional=True)
        tags = parse_request(raw, MemoryRequest, _NO_RULES).tags
        if not tags:
            return MEMORY_TAGS
        return tuple(dict.fromkeys("graphs" if tag == "cuda_graph" else tag for tag in tags))

    async def get_by_name(self, http: Request) -> Response:
        """A list of numbers, or of rows, that all nodes agree on."""
        if http.method == "POST":
            raw = await read_object(http, self._limits)
        else:
            raw = dict(http.query_params)
            if re.fullmatch("[0-9]{1,9}", raw.get("truncate_size", "")):
                raw["truncate_size"] = int(raw["truncate_size"])
        body = parse_request(raw, GetWeightsRequest, _NO_RULES)
        if not 0 < body.truncate_size <= MAX_TRUNCATE:
            raise bad_value("truncate_size", f"`truncate_size` must be 1 to {MAX_TRUNCATE}.")
        replies = await self._admin.weights_by_name(body.name, body.truncate_size)
        failed = [f"{url}: {reply.message}" for url, reply in replies.items() if not reply.success]
        if failed or not replies:
            return outcome(False, "; ".join(failed) or "no node is connected")
        first, *others = replies.values()
        if any((other.values, other.dtype) != (first.values, first.dtype) for other in others):
            return outcome(False, f"the nodes differ: {', '.join(replies)} hold other values of {body.name}")
        return json_response(first.values)

    async def check(self, http: Request) -> Response:
        """Every node's checksums; whether they are all the same, and which tensors are not."""
        raw = await read_object(http, self._limits, optional=True)
        action = parse_request(raw, CheckWeightsRequest, _NO_RULES).action
        replies = dict(await self._admin.check_weights())
        success, message = compare(replies)
        if action == "snapshot" and success:
            self._snapshot = next(iter(replies.values()))
        elif action == "compare" and success:
            if self._snapshot is None:
                raise RequestError("There is no snapshot to compare with.", code="no_snapshot")
            success, message = _since(self._snapshot, next(iter(replies.values())))
        answer = CheckWeightsAnswer(success=success, message=message, nodes=replies)
        return json_response(answer, 200 if success else 400)

    def _may_update(self, *, force: bool) -> bool:
        return force or not self._is_node


def weight_operations(routes: WeightRoutes) -> list[Operation]:
    """Under the names that SGLang gave them, and vLLM."""
    changes = [
        ("/update_weights_from_disk", routes.update_from_disk, reports(UpdateWeightsRequest)),
        ("/update_weights_from_tensor", routes.update_from_tensor, reports()),
        ("/update_weights_from_distributed", routes.update_from_distributed, reports(DistributedRequest)),
        ("/update_weights_from_ipc", routes.update_from_ipc, reports(IpcRequest)),
        ("/update_weights_from_peer", routes.update_from_peer, reports(PeerRequest)),
        ("/update_weight_version", routes.update_version, reports(UpdateVersionRequest, UpdateVersionAnswer)),
        ("/init_weights_update_group", routes.init_group, reports(InitGroupRequest, InitGroupAnswer)),
        ("/destroy_weights_update_group", routes.destroy_group, reports(DestroyGroupRequest)),
        ("/save_sharded_model", routes.save_sharded, reports(SaveShardedRequest)),
        ("/save_remote_model", routes.save_remote, reports(SaveRemoteRequest)),
        ("/release_memory_occupation", routes.release_memory, reports(MemoryRequest)),
        ("/sleep", routes.sleep, reports()),
        ("/wake_up", routes.wake_up, reports()),
        ("/resume_memory_occupation", routes.resume_memory, reports(MemoryRequest)),
    ]
    return [
        *(Operation(POST, (path,), handler, bodies, is_admin=True) for path, handler, bodies in changes),
        Operation(GET, ("/is_sleeping",), routes.is_sleeping),
        Operation(
            ("GET", "POST"),
            ("/get_weights_by_name",),
            routes.get_by_name,
            Bodies(GetWeightsRequest, refusal=Outcome),
            is_admin=True,
        ),
        Operation(
            POST,
            ("/check_weights", "/weights_checker"),
            routes.check,
            reports(CheckWeightsRequest, CheckWeightsAnswer),
            is_admin=True,
        ),
    ]


def compare(replies: Mapping[str, WeightChecksReply]) -> tuple[bool, str]:
    """Whether all nodes (by URL) hold the same bits, and what to say about it."""
    failed = [f"{url}: {reply.message}" for url, reply in replies.items() if not reply.success]
    if failed or not replies:
        return False, "; ".join(failed) or "no node is connected"
    first = next(iter(replies.values()))
    if unlike := _unlike(list(replies.values())):
        return False, f"these tensors differ between nodes: {unlike}"
    return True, f"{len(first.tensors)} tensors are the same on {len(replies)} nodes: {first.whole}"


def _since(snapshot: WeightChecksReply, now: WeightChecksReply) -> tuple[bool, str]:
    """Whether nothing has changed, and what to say about it."""
    if unlike := _unlike([snapshot, now]):
        return False, f"these tensors have changed since the snapshot: {unlike}"
    return True, f"{len(now.tensors)} tensors are as they were at the snapshot: {now.whole}"


def _unlike(replies: Sequence[WeightChecksReply]) -> str:
    """Names of the tensors whose checksums are not all the same; empty if there are none."""
    names = sorted({name for reply in replies for name in reply.tensors})
    unlike = [name for name in names if len({reply.tensors.get(name) for reply in replies}) > 1]
    more = f" and {len(unlike) - _MAX_NAMED} more" if len(unlike) > _MAX_NAMED else ""
    return f"{', '.join(unlike[:_MAX_NAMED])}{more}"


def _ipc_source(body: IpcRequest) -> FromSharedMemory | FromGpuMemory:
    if (body.name is None) == (body.gpu is None):
        raise bad_value("name", "Give either `name` or `gpu`.")
    if (gpu := body.gpu) is not None:
        if len(gpu.handle) != CUDA_HANDLE_BYTES:
            text = f"`gpu.handle` must be {CUDA_HANDLE_BYTES} bytes in base64, a cudaIpcMemHandle_t."
            raise bad_value("gpu", text)
        return FromGpuMemory(
            device_uuid=gpu.device_uuid, handle=gpu.handle, offset=gpu.offset, tensors=_specs(body)
        )
    name = body.name or ""
    if not re.fullmatch(r"[^./\x00][^/\x00]{0,254}", name):
        raise bad_value("name", "`name` must be the plain name of a file in /dev/shm.")
    return FromSharedMemory(name=name)


def _specs(body: DistributedRequest | IpcRequest) -> tuple[TensorSpec, ...]:
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


def _timeout_s(seconds: float) -> float:
    if not 0 < seconds <= MAX_GROUP_TIMEOUT_S:
        raise bad_value(
            "timeout", f"`timeout` must be more than 0 and at most {MAX_GROUP_TIMEOUT_S:g} seconds."
        )
    return seconds


def _one_node() -> Response:
    return outcome(False, "This is one node of a cluster: update through the router, or say `force`.")


def _mode(name: str, *, aborts: bool) -> UpdateMode:
    """By vLLM's and by SGLang's names."""
    if name not in _MODES:
        raise bad_value("mode", f"`mode` must be one of {', '.join(_MODES)}, got {name!r}.{_NO_MIX}")
    return "abort" if aborts else _MODES[name]
