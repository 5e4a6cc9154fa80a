"""The commands about weights, on routers and nodes: update from disk or from tensors, read one, compare all.

Tensors travel as a safetensors file, which holds numbers and nothing that runs.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from ...messages.weights import (
    MAX_TRUNCATE,
    MEMORY_TAGS,
    FromGpuMemory,
    FromGroup,
    FromSharedMemory,
    MemoryTag,
    UpdateGroupSpec,
    WeightChecksReply,
    WeightsReply,
)
from ...runtime.errors import RequestError
from ..generation import AdminReply, GroupReply, UpdateMode
from ..http.answers import Outcome, json_response, outcome
from ..http.bodies import BodyLimits, parse_request, read_object
from ..http.fields import FieldRules
from ..http.mounting import GET, Route
from ..http.openapi import Bodies
from ..refusals import bad_value, node_url
from .commands import EITHER, Command, Takes, takes
from .tensor_bodies import TensorUpdate, read_tensor_update
from .weight_bodies import (
    DEFAULT_SHARD_BYTES,
    DISTRIBUTED_RULES,
    SHARDED_RULES,
    WEIGHT_RULES,
    CheckWeightsAnswer,
    CheckWeightsRequest,
    DestroyGroupRequest,
    DistributedRequest,
    GetWeightsRequest,
    InitGroupAnswer,
    InitGroupRequest,
    IpcRequest,
    MemoryRequest,
    PeerRequest,
    SaveRemoteRequest,
    SaveShardedRequest,
    UpdateVersionAnswer,
    UpdateVersionRequest,
    UpdateWeightsRequest,
    group_timeout_s,
    ipc_source,
    tensor_specs,
    update_mode,
)

_NO_PICKLE = (
    "What comes over these sockets is pickled, and is not read: give `gpu` with a CUDA memory handle, or put "
    "a safetensors file into /dev/shm and give its `name`."
)
_MAX_NAMED = 8  # tensors that one message names
_ONE_NODE = AdminReply(False, "This is one node of a cluster: update through the router, or say `force`.")
_NO_RULES = FieldRules()


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


class _Update(Protocol):
    """What all updates may say."""

    @property
    def mode(self) -> str: ...

    @property
    def abort_all_requests(self) -> bool: ...

    @property
    def force(self) -> bool: ...


class WeightCalls:
    """What the commands about weights do. `is_node`: one node alone, whose update leaves the pairs of its
    cluster unlike: only with ``force``."""

    def __init__(self, admin: WeightAdmin, *, is_node: bool) -> None:
        self._admin = admin
        self._is_node = is_node
        self._snapshot: WeightChecksReply | None = None

    async def update_from_disk(self, asked: UpdateWeightsRequest) -> AdminReply:
        return await self._updated(
            asked,
            lambda mode: self._admin.update_weights_from_disk(asked.model_path, asked.weight_version, mode),
        )

    async def update_from_tensor(self, asked: TensorUpdate) -> AdminReply:
        return await self._updated(
            asked, lambda mode: self._admin.update_weights_from_tensor(asked.body, asked.weight_version, mode)
        )

    async def update_from_distributed(self, asked: DistributedRequest) -> AdminReply:
        source = FromGroup(
            group_name=asked.group_name,
            tensors=tensor_specs(asked),
            is_one_bucket=asked.load_format is not None,
            timeout_s=group_timeout_s(asked.timeout),
        )
        return await self._updated(
            asked,
            lambda mode: self._admin.update_weights_from_distributed(source, asked.weight_version, mode),
        )

    async def update_from_ipc(self, asked: IpcRequest) -> AdminReply:
        source = ipc_source(asked)
        return await self._updated(
            asked, lambda mode: self._admin.update_weights_from_ipc(source, asked.weight_version, mode)
        )

    async def update_from_peer(self, asked: PeerRequest) -> AdminReply:
        peer = node_url("peer", asked.peer)
        return await self._updated(
            asked, lambda mode: self._admin.update_weights_from_peer(peer, asked.weight_version, mode)
        )

    async def update_version(self, asked: UpdateVersionRequest) -> AdminReply | UpdateVersionAnswer:
        given = "abort" if asked.abort_all_requests else "wait"
        mode = update_mode(given if asked.mode is None else asked.mode, aborts=False)
        if not self._may_update(force=asked.force):
            return _ONE_NODE
        reply = await self._admin.update_weight_version(asked.new_version, mode)
        return UpdateVersionAnswer(
            success=reply.success, message=reply.message, new_version=asked.new_version
        )

    async def init_group(self, asked: InitGroupRequest) -> InitGroupAnswer:
        if not 0 < asked.master_port < 2**16:
            raise bad_value("master_port", "`master_port` must be 1 to 65535.")
        if not 1 <= asked.rank_offset < asked.world_size:
            raise bad_value("rank_offset", "`rank_offset` must be at least 1 and less than `world_size`.")
        group = UpdateGroupSpec(
            name=asked.group_name,
            backend=asked.backend,
            master_address=asked.master_address,
            master_port=asked.master_port,
            world_size=asked.world_size,
            timeout_s=group_timeout_s(asked.timeout),
        )
        reply = await self._admin.init_weights_update_group(group, asked.rank_offset)
        return InitGroupAnswer(success=reply.success, message=reply.message, ranks=dict(reply.ranks))

    async def destroy_group(self, asked: DestroyGroupRequest) -> AdminReply:
        return await self._admin.destroy_weights_update_group(asked.group_name)

    async def save_sharded(self, asked: SaveShardedRequest) -> AdminReply:
        if not asked.path.startswith("/"):
            raise bad_value("path", "`path` must be an absolute path of the node's host.")
        return await self._admin.save_model(asked.path, is_remote=False, max_shard_bytes=asked.max_size)

    async def save_remote(self, asked: SaveRemoteRequest) -> AdminReply:
        if "://" not in asked.url:
            raise bad_value("url", "`url` must have a scheme, such as s3://bucket/folder.")
        return await self._admin.save_model(asked.url, is_remote=True, max_shard_bytes=DEFAULT_SHARD_BYTES)

    async def release_memory(self, tags: tuple[MemoryTag, ...]) -> AdminReply:
        return await self._admin.release_memory_occupation(tags)

    async def resume_memory(self, tags: tuple[MemoryTag, ...]) -> AdminReply:
        return await self._admin.resume_memory_occupation(tags)

    async def is_sleeping(self, _: Request) -> Response:
        return json_response({"is_sleeping": bool(await self._admin.released_memory())})

    async def by_name(self, asked: GetWeightsRequest) -> Response:
        """A list of numbers, or of rows, that all nodes agree on."""
        if not 0 < asked.truncate_size <= MAX_TRUNCATE:
            raise bad_value("truncate_size", f"`truncate_size` must be 1 to {MAX_TRUNCATE}.")
        replies = await self._admin.weights_by_name(asked.name, asked.truncate_size)
        failed = [f"{url}: {reply.message}" for url, reply in replies.items() if not reply.success]
        if failed or not replies:
            return outcome(False, "; ".join(failed) or "no node is connected")
        first, *others = replies.values()
        if any((other.values, other.dtype) != (first.values, first.dtype) for other in others):
            return outcome(False, f"the nodes differ: {', '.join(replies)} hold other values of {asked.name}")
        return json_response(first.values)

    async def check(self, asked: CheckWeightsRequest) -> CheckWeightsAnswer:
        replies = dict(await self._admin.check_weights())
        success, message = compare(replies)
        if asked.action == "snapshot" and success:
            self._snapshot = next(iter(replies.values()))
        elif asked.action == "compare" and success:
            if self._snapshot is None:
                raise RequestError("There is no snapshot to compare with.", code="no_snapshot")
            success, message = _since(self._snapshot, next(iter(replies.values())))
        return CheckWeightsAnswer(success=success, message=message, nodes=replies)

    async def _updated(
        self, asked: _Update, update: Callable[[UpdateMode], Awaitable[AdminReply]]
    ) -> AdminReply:
        mode = update_mode(asked.mode, aborts=asked.abort_all_requests)
        return await update(mode) if self._may_update(force=asked.force) else _ONE_NODE

    def _may_update(self, *, force: bool) -> bool:
        return force or not self._is_node


def weight_commands(calls: WeightCalls, *, allows_pickles: bool = False) -> list[Command[Any]]:
    """Under the names that SGLang gave them, and vLLM. `allows_pickles`: updates from tensors may come as
    SGLang's JSON."""

    async def tensor_update(http: Request, limits: BodyLimits) -> TensorUpdate:
        return await read_tensor_update(http, limits, WEIGHT_RULES, allows_pickles=allows_pickles)

    return [
        Command(
            name="update_from_disk",
            paths=("/update_weights_from_disk",),
            takes=takes(UpdateWeightsRequest, WEIGHT_RULES),
            does=calls.update_from_disk,
        ),
        Command(
            name="update_from_tensor",
            paths=("/update_weights_from_tensor",),
            takes=Takes(tensor_update),
            does=calls.update_from_tensor,
        ),
        Command(
            name="update_from_distributed",
            paths=("/update_weights_from_distributed",),
            takes=takes(DistributedRequest, DISTRIBUTED_RULES),
            does=calls.update_from_distributed,
        ),
        Command(
            name="update_from_ipc",
            paths=("/update_weights_from_ipc",),
            takes=Takes(_ipc_request, IpcRequest),
            does=calls.update_from_ipc,
        ),
        Command(
            name="update_from_peer",
            paths=("/update_weights_from_peer",),
            takes=takes(PeerRequest),
            does=calls.update_from_peer,
        ),
        Command(
            name="update_version",
            paths=("/update_weight_version",),
            takes=takes(UpdateVersionRequest),
            does=calls.update_version,
            answer=UpdateVersionAnswer,
        ),
        Command(
            name="init_group",
            paths=("/init_weights_update_group",),
            takes=takes(InitGroupRequest),
            does=calls.init_group,
            answer=InitGroupAnswer,
        ),
        Command(
            name="destroy_group",
            paths=("/destroy_weights_update_group",),
            takes=takes(DestroyGroupRequest, optional=True),
            does=calls.destroy_group,
        ),
        Command(
            name="save_sharded",
            paths=("/save_sharded_model",),
            takes=takes(SaveShardedRequest, SHARDED_RULES),
            does=calls.save_sharded,
        ),
        Command(
            name="save_remote",
            paths=("/save_remote_model",),
            takes=takes(SaveRemoteRequest),
            does=calls.save_remote,
        ),
        Command(
            name="release_memory",
            paths=("/release_memory_occupation",),
            takes=Takes(_tags, MemoryRequest),
            does=calls.release_memory,
        ),
        Command(
            name="sleep",
            paths=("/sleep",),
            takes=Takes(_sleep_tags),
            does=calls.release_memory,
            about="vLLM's name of a release. Both of its levels: nothing stays in the node's memory, and the "
            "weights come back as they were.",
        ),
        Command(
            name="wake_up",
            paths=("/wake_up",),
            takes=Takes(_wake_up_tags),
            does=calls.resume_memory,
            about="vLLM's name of a resume: of all, or of what each ``tags`` in the query names.",
        ),
        Command(
            name="resume_memory",
            paths=("/resume_memory_occupation",),
            takes=Takes(_tags, MemoryRequest),
            does=calls.resume_memory,
        ),
        Command(
            name="check",
            paths=("/check_weights", "/weights_checker"),
            takes=takes(CheckWeightsRequest, optional=True),
            does=calls.check,
            answer=CheckWeightsAnswer,
            about="Every node's checksums; whether they are all the same, and which tensors are not.",
        ),
    ]


def weight_questions(calls: WeightCalls, limits: BodyLimits) -> list[Route]:
    async def by_name(http: Request) -> Response:
        return await calls.by_name(await _named(http, limits))

    return [
        Route(GET, ("/is_sleeping",), calls.is_sleeping),
        Route(
            EITHER,
            ("/get_weights_by_name",),
            by_name,
            Bodies(GetWeightsRequest, refusal=Outcome),
            who="admin",
            name="get_by_name",
            about="A list of numbers, or of rows, that all nodes agree on.",
        ),
    ]


# ---- how they are read ------------------------------------------------------------------------------


async def _ipc_request(http: Request, limits: BodyLimits) -> IpcRequest:
    raw = await read_object(http, limits)
    if "zmq_handles" in raw:
        raise bad_value("zmq_handles", _NO_PICKLE)
    return parse_request(raw, IpcRequest, DISTRIBUTED_RULES)


async def _tags(http: Request, limits: BodyLimits) -> tuple[MemoryTag, ...]:
    raw = await read_object(http, limits, optional=True)
    tags = parse_request(raw, MemoryRequest, _NO_RULES).tags
    if not tags:
        return MEMORY_TAGS
    return tuple(dict.fromkeys("graphs" if tag == "cuda_graph" else tag for tag in tags))


async def _sleep_tags(http: Request, _: BodyLimits) -> tuple[MemoryTag, ...]:
    if (level := http.query_params.get("level", "1")) not in ("1", "2"):
        raise bad_value("level", f"`level` must be 1 or 2, got {level!r}.")
    return MEMORY_TAGS


async def _wake_up_tags(http: Request, _: BodyLimits) -> tuple[MemoryTag, ...]:
    wanted = http.query_params.getlist("tags")
    if unknown := [tag for tag in wanted if tag not in MEMORY_TAGS]:
        raise bad_value("tags", f"`tags` must be of {', '.join(MEMORY_TAGS)}, got {unknown[0]!r}.")
    return tuple(tag for tag in MEMORY_TAGS if tag in wanted) or MEMORY_TAGS


async def _named(http: Request, limits: BodyLimits) -> GetWeightsRequest:
    if http.method == "POST":
        raw = await read_object(http, limits)
    else:
        raw = dict(http.query_params)
        if re.fullmatch("[0-9]{1,9}", raw.get("truncate_size", "")):
            raw["truncate_size"] = int(raw["truncate_size"])
    return parse_request(raw, GetWeightsRequest, _NO_RULES)


# ---- what they mean ---------------------------------------------------------------------------------


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
