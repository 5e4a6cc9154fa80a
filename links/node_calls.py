"""What may be asked of a node's scheduler, over whatever carries the messages.

Calls carry a ``call_id`` that the reply repeats; streamed output goes to ``on_stream``.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias, TypeVar, assert_never

import msgspec

from ..messages.node import (
    AbortRequests,
    AssertPeerDeath,
    AttemptFailed,
    CallReply,
    ClientToNode,
    FlushCache,
    GetMetrics,
    GetRequestState,
    GetServerInfo,
    MetricsReply,
    NodeToClient,
    Ping,
    Pong,
    RequestStateReply,
    ServerInfoReply,
    TokenOutputs,
)
from ..messages.operation import (
    ClusterOperation,
    GetInternalState,
    InternalState,
    InternalStateReply,
    ProfileReply,
    StartProfile,
    StopProfile,
)
from ..messages.weights import (
    CheckWeights,
    CommitWeights,
    DiscardWeights,
    GetWeights,
    JoinUpdateGroup,
    LeaveUpdateGroup,
    MemoryReply,
    MemoryTag,
    PrepareWeights,
    ReleaseMemory,
    ResumeMemory,
    SaveWeights,
    StageWeights,
    UpdateGroupSpec,
    WeightBytesReply,
    WeightChecksReply,
    WeightImageReply,
    WeightSource,
    WeightsReply,
    WeightsWrittenReply,
)
from ..runtime.errors import PdserveError
from ..runtime.timing import Timing

StreamMessage: TypeAlias = TokenOutputs | AttemptFailed
OrderCall: TypeAlias = (
    FlushCache
    | AbortRequests
    | ClusterOperation
    | StopProfile
    | SaveWeights
    | JoinUpdateGroup
    | LeaveUpdateGroup
    | ReleaseMemory
    | ResumeMemory
)
Call: TypeAlias = (
    OrderCall
    | Ping
    | AssertPeerDeath
    | StageWeights
    | PrepareWeights
    | CommitWeights
    | DiscardWeights
    | GetWeights
    | CheckWeights
    | GetServerInfo
    | GetMetrics
    | GetRequestState
    | GetInternalState
)
Reply: TypeAlias = (
    Pong
    | CallReply
    | ServerInfoReply
    | MetricsReply
    | RequestStateReply
    | InternalStateReply
    | ProfileReply
    | WeightsReply
    | WeightChecksReply
    | WeightImageReply
    | WeightBytesReply
    | WeightsWrittenReply
    | MemoryReply
)
R = TypeVar(
    "R",
    Pong,
    CallReply,
    ServerInfoReply,
    MetricsReply,
    RequestStateReply,
    InternalStateReply,
    ProfileReply,
    WeightsReply,
    WeightChecksReply,
    MemoryReply,
)


class NodeUnavailableError(PdserveError):
    """A node is not reached: the connection is lost, or a reply did not come in time."""


class NodeCalls(abc.ABC):
    """One connection to one scheduler, in a running event loop. When it has ended it is lost for good.

    A call waits as long as `timing` says that its answer may take, then raises NodeUnavailableError. An order
    that comes to the node after that is not done any more.

    A subclass sends, hands what arrives to ``_arrive``, and calls ``_end`` when the connection has ended.
    """

    def __init__(self, address: str, timing: Timing, on_stream: Callable[[StreamMessage], None]) -> None:
        self.address = address
        self._timing = timing
        self._on_stream = on_stream
        self._call_ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._ended = ""  # why; empty while the connection may be used

    @property
    def is_lost(self) -> bool:
        return bool(self._ended)

    @abc.abstractmethod
    def send(self, message: ClientToNode) -> None:
        """Send without waiting. Raises NodeUnavailableError when the connection has ended."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Without a word to anybody."""

    async def ping(self, timeout_s: float) -> Pong:
        """The answer comes from the scheduler's own loop, so it proves that the loop turns."""
        return await self._call(Ping(call_id=next(self._call_ids)), Pong, timeout_s)

    async def server_info(self) -> ServerInfoReply:
        message = GetServerInfo(call_id=next(self._call_ids))
        return await self._call(message, ServerInfoReply, self._timing.node_call_s)

    async def metrics(self) -> str:
        message = GetMetrics(call_id=next(self._call_ids))
        return (await self._call(message, MetricsReply, self._timing.node_call_s)).text

    async def flush_cache(self, flush_timeout_s: float) -> CallReply:
        """Flush when the node is idle, which it may wait for until ``flush_timeout_s``."""
        message = FlushCache(call_id=next(self._call_ids), timeout_s=flush_timeout_s)
        return await self._order(message, CallReply, flush_timeout_s + self._timing.node_call_s)

    async def abort(self, request_id: str = "", *, all_requests: bool = False) -> CallReply:
        message = AbortRequests(
            call_id=next(self._call_ids), request_id=request_id, all_requests=all_requests
        )
        return await self._order(message, CallReply, self._timing.node_call_s)

    async def assert_peer_death(self, incarnation: str) -> CallReply:
        message = AssertPeerDeath(call_id=next(self._call_ids), incarnation=incarnation)
        return await self._call(message, CallReply, self._timing.node_call_s)

    async def request_state(self, request_id: str) -> RequestStateReply:
        message = GetRequestState(call_id=next(self._call_ids), request_id=request_id)
        return await self._call(message, RequestStateReply, self._timing.node_call_s)

    async def stage_weights(self, update_id: str, offset: int, data: bytes) -> CallReply:
        """`data`: the next part of the update, at most STAGE_PART_BYTES."""
        message = StageWeights(call_id=next(self._call_ids), update_id=update_id, offset=offset, data=data)
        return await self._call(message, CallReply, self._timing.weight_part_s)

    async def operate(self, operation: ClusterOperation) -> CallReply:
        message = msgspec.structs.replace(operation, call_id=next(self._call_ids))
        starts_profile = isinstance(operation, StartProfile)
        timeout_s = self._timing.profile_start_s if starts_profile else self._timing.node_call_s
        return await self._order(message, CallReply, timeout_s)

    async def internal_state(self) -> InternalState:
        message = GetInternalState(call_id=next(self._call_ids))
        return (await self._call(message, InternalStateReply, self._timing.node_call_s)).state

    async def stop_profile(self) -> ProfileReply:
        """The node writes its traces before it answers."""
        message = StopProfile(call_id=next(self._call_ids))
        return await self._order(message, ProfileReply, self._timing.profile_end_s)

    async def prepare_weights(
        self,
        update_id: str,
        source: WeightSource,
        weight_version: str,
    ) -> CallReply:
        message = PrepareWeights(
            call_id=next(self._call_ids),
            update_id=update_id,
            source=source,
            weight_version=weight_version,
            lease_s=self._timing.weight_lease_s,
        )
        return await self._call(message, CallReply, self._timing.weight_update_s)

    async def commit_weights(self, update_id: str) -> CallReply:
        message = CommitWeights(call_id=next(self._call_ids), update_id=update_id)
        return await self._call(message, CallReply, self._timing.weight_update_s)

    async def discard_weights(self, update_id: str) -> CallReply:
        message = DiscardWeights(call_id=next(self._call_ids), update_id=update_id)
        return await self._call(message, CallReply, self._timing.weight_discard_s)

    async def join_update_group(self, group: UpdateGroupSpec, rank: int) -> CallReply:
        """Waits until every rank has joined, or has not in the time given."""
        message = JoinUpdateGroup(
            call_id=next(self._call_ids),
            group_name=group.name,
            backend=group.backend,
            master_address=group.master_address,
            master_port=group.master_port,
            rank=rank,
            world_size=group.world_size,
            timeout_s=group.timeout_s,
        )
        return await self._order(message, CallReply, 2 * group.timeout_s + self._timing.node_call_s)

    async def leave_update_group(self, group_name: str) -> CallReply:
        message = LeaveUpdateGroup(call_id=next(self._call_ids), group_name=group_name)
        return await self._order(message, CallReply, self._timing.weight_update_s)

    async def release_memory(self, tags: tuple[MemoryTag, ...]) -> MemoryReply:
        """The node may wait for a while to be idle."""
        wait_s = self._timing.weight_commit_s
        message = ReleaseMemory(call_id=next(self._call_ids), tags=tags, timeout_s=wait_s)
        return await self._order(message, MemoryReply, self._timing.weight_update_s)

    async def resume_memory(self, tags: tuple[MemoryTag, ...], *, if_released: bool = False) -> MemoryReply:
        """Without `tags` it asks what is released, and no more."""
        message = ResumeMemory(call_id=next(self._call_ids), tags=tags, if_released=if_released)
        if not tags:
            return await self._call(message, MemoryReply, self._timing.node_call_s)
        return await self._order(message, MemoryReply, self._timing.weight_update_s)

    async def get_weights(self, name: str, truncate_size: int) -> WeightsReply:
        message = GetWeights(call_id=next(self._call_ids), name=name, truncate_size=truncate_size)
        return await self._call(message, WeightsReply, self._timing.weight_update_s)

    async def check_weights(self) -> WeightChecksReply:
        message = CheckWeights(call_id=next(self._call_ids))
        return await self._call(message, WeightChecksReply, self._timing.weight_update_s)

    async def save_weights(self, target: str, *, is_remote: bool, max_shard_bytes: int) -> CallReply:
        message = SaveWeights(
            call_id=next(self._call_ids),
            target=target,
            is_remote=is_remote,
            max_shard_bytes=max_shard_bytes,
        )
        return await self._order(message, CallReply, self._timing.weight_update_s)

    async def _order(self, order: OrderCall, reply_type: type[R], timeout_s: float) -> R:
        """A node that does not say what time it is there is not ordered anything."""
        clock = asyncio.get_running_loop().time
        until = clock() + timeout_s
        async with self._patience(order, timeout_s):
            pong = await self._ask(Ping(call_id=next(self._call_ids)), Pong)
            not_after = pong.unix_s + until - clock()
            timed = msgspec.structs.replace(order, not_after_unix_s=not_after)
            return await self._ask(timed, reply_type)

    async def _call(self, message: Call, reply_type: type[R], timeout_s: float) -> R:
        async with self._patience(message, timeout_s):
            return await self._ask(message, reply_type)

    @contextlib.asynccontextmanager
    async def _patience(self, message: Call, timeout_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise NodeUnavailableError(
                f"node at {self.address}: no answer to {type(message).__name__} within {timeout_s:g} s"
            ) from None

    async def _ask(self, message: Call, reply_type: type[R]) -> R:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[message.call_id] = future
        try:
            self.send(message)
            reply = await future
        finally:
            del self._waiting[message.call_id]
        if isinstance(reply, reply_type):
            return reply
        reason = reply.message if isinstance(reply, CallReply) else f"answered by {type(reply).__name__}"
        raise NodeUnavailableError(f"node at {self.address}: {type(message).__name__}: {reason}")

    def _arrive(self, message: NodeToClient) -> None:
        match message:
            case TokenOutputs() | AttemptFailed():
                self._on_stream(message)
            case (
                Pong()
                | CallReply()
                | ServerInfoReply()
                | MetricsReply()
                | RequestStateReply()
                | WeightsReply()
                | WeightChecksReply()
                | WeightImageReply()
                | WeightBytesReply()
                | WeightsWrittenReply()
                | MemoryReply()
                | InternalStateReply()
                | ProfileReply()
            ):
                future = self._waiting.get(message.call_id)
                if future is not None and not future.done():
                    future.set_result(message)
            case _:
                assert_never(message)

    def _end(self, reason: str) -> None:
        self._ended = self._ended or reason
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(NodeUnavailableError(f"node at {self.address}: {reason}"))
