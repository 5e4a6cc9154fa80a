"""A router's connection to a node, in place of the zmq one: calls that are answered, output that streams."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from ...api.node_client import Call, NodeUnavailableError, Reply, StreamMessage
from ...messages.node import (
    AbortRequests,
    AssertPeerDeath,
    AttemptFailed,
    CallReply,
    ClientToNode,
    FlushCache,
    GetRequestState,
    GetServerInfo,
    Ping,
    Pong,
    RequestStateReply,
    ServerInfoReply,
    TokenOutputs,
)
from ...messages.operation import (
    ClusterOperation,
    GetInternalState,
    InternalState,
    InternalStateReply,
    ProfileReply,
    StopProfile,
)
from ...messages.weights import (
    LEASE_S,
    CheckWeights,
    CommitWeights,
    DiscardWeights,
    GetWeights,
    JoinUpdateGroup,
    LeaveUpdateGroup,
    MemoryTag,
    PrepareWeights,
    ReleaseMemory,
    ResumeMemory,
    StageWeights,
    UpdateGroupSpec,
    WeightChecksReply,
    WeightSource,
    WeightsReply,
)
from .network import Network

REPLY_MARGIN_S = 5.0
CONTROL_S = 10.0
R = TypeVar("R", bound=Reply)


class SimulatedLink:
    """A `NodeLink`."""

    def __init__(
        self,
        network: Network,
        address: str,
        *,
        client_name: str,
        on_stream: Callable[[StreamMessage], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._on_stream = on_stream
        self._on_lost = on_lost
        self._call_ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._ended = ""
        self._loop = asyncio.get_running_loop()
        self._connection = network.connect(
            address, client_name=client_name, on_message=self._arrive, on_down=self._down
        )

    def send(self, message: ClientToNode) -> None:
        if self._ended:
            raise NodeUnavailableError(self._ended)
        if self._connection is not None:
            self._connection.to_server(message)

    async def ping(self, timeout_s: float) -> Pong:
        return await self._call(Ping(call_id=next(self._call_ids)), Pong, timeout_s)

    async def server_info(self, timeout_s: float) -> ServerInfoReply:
        return await self._call(GetServerInfo(call_id=next(self._call_ids)), ServerInfoReply, timeout_s)

    async def flush_cache(self, flush_timeout_s: float) -> CallReply:
        message = FlushCache(call_id=next(self._call_ids), timeout_s=flush_timeout_s)
        return await self._call(message, CallReply, flush_timeout_s + REPLY_MARGIN_S)

    async def abort(self, request_id: str, *, all_requests: bool) -> CallReply:
        message = AbortRequests(
            call_id=next(self._call_ids), request_id=request_id, all_requests=all_requests
        )
        return await self._call(message, CallReply, CONTROL_S)

    async def operate(self, operation: ClusterOperation, timeout_s: float) -> CallReply:
        message = msgspec.structs.replace(operation, call_id=next(self._call_ids))
        return await self._call(message, CallReply, timeout_s)

    async def internal_state(self, timeout_s: float) -> InternalState:
        message = GetInternalState(call_id=next(self._call_ids))
        return (await self._call(message, InternalStateReply, timeout_s)).state

    async def stop_profile(self, timeout_s: float) -> ProfileReply:
        return await self._call(StopProfile(call_id=next(self._call_ids)), ProfileReply, timeout_s)

    async def assert_peer_death(self, incarnation: str, timeout_s: float) -> CallReply:
        message = AssertPeerDeath(call_id=next(self._call_ids), incarnation=incarnation)
        return await self._call(message, CallReply, timeout_s)

    async def request_state(self, request_id: str, timeout_s: float) -> RequestStateReply:
        message = GetRequestState(call_id=next(self._call_ids), request_id=request_id)
        return await self._call(message, RequestStateReply, timeout_s)

    async def stage_weights(self, update_id: str, offset: int, data: bytes, timeout_s: float) -> CallReply:
        message = StageWeights(call_id=next(self._call_ids), update_id=update_id, offset=offset, data=data)
        return await self._call(message, CallReply, timeout_s)

    async def prepare_weights(
        self,
        update_id: str,
        source: WeightSource,
        weight_version: str,
        timeout_s: float,
        lease_s: float = LEASE_S,
    ) -> CallReply:
        message = PrepareWeights(
            call_id=next(self._call_ids),
            update_id=update_id,
            source=source,
            weight_version=weight_version,
            lease_s=lease_s,
        )
        return await self._call(message, CallReply, timeout_s)

    async def commit_weights(self, update_id: str, timeout_s: float) -> CallReply:
        message = CommitWeights(call_id=next(self._call_ids), update_id=update_id)
        return await self._call(message, CallReply, timeout_s)

    async def discard_weights(self, update_id: str, timeout_s: float) -> CallReply:
        message = DiscardWeights(call_id=next(self._call_ids), update_id=update_id)
        return await self._call(message, CallReply, timeout_s)

    async def join_update_group(self, group: UpdateGroupSpec, rank: int) -> CallReply:
        """Waits until every rank has joined, or has not in the time given."""
        message = JoinUpdateGroup(
            call_id=next(self._call_ids),
            group_name=group.name,
            master_address=group.master_address,
            master_port=group.master_port,
            rank=rank,
            world_size=group.world_size,
            timeout_s=group.timeout_s,
        )
        return await self._call(message, CallReply, 2 * group.timeout_s + REPLY_MARGIN_S)

    async def leave_update_group(self, group_name: str, timeout_s: float) -> CallReply:
        message = LeaveUpdateGroup(call_id=next(self._call_ids), group_name=group_name)
        return await self._call(message, CallReply, timeout_s)

    async def release_memory(self, tags: tuple[MemoryTag, ...], wait_s: float, timeout_s: float) -> CallReply:
        """The node may wait for `wait_s` to be idle."""
        message = ReleaseMemory(call_id=next(self._call_ids), tags=tags, timeout_s=wait_s)
        return await self._call(message, CallReply, timeout_s)

    async def resume_memory(self, tags: tuple[MemoryTag, ...], timeout_s: float) -> CallReply:
        message = ResumeMemory(call_id=next(self._call_ids), tags=tags)
        return await self._call(message, CallReply, timeout_s)

    async def get_weights(self, name: str, truncate_size: int, timeout_s: float) -> WeightsReply:
        message = GetWeights(call_id=next(self._call_ids), name=name, truncate_size=truncate_size)
        return await self._call(message, WeightsReply, timeout_s)

    async def check_weights(self, timeout_s: float) -> WeightChecksReply:
        return await self._call(CheckWeights(call_id=next(self._call_ids)), WeightChecksReply, timeout_s)

    async def close(self) -> None:
        self._end("closed")

    async def _call(self, message: Call, expected: type[R], timeout_s: float) -> R:
        self.send(message)
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._waiting[message.call_id] = future
        timer = self._loop.call_later(timeout_s, self._give_up, message.call_id)
        try:
            reply = await future
        finally:
            timer.cancel()
            self._waiting.pop(message.call_id, None)
        assert isinstance(reply, expected)
        return reply

    def _give_up(self, call_id: int) -> None:
        future = self._waiting.get(call_id)
        if future is not None and not future.done():
            future.set_exception(NodeUnavailableError("no answer in time"))

    def _arrive(self, message: Any) -> None:  # noqa: ANN401, one of NodeToClient
        if isinstance(message, TokenOutputs | AttemptFailed):
            self._on_stream(message)
            return
        future = self._waiting.get(message.call_id)
        if future is not None and not future.done():
            future.set_result(message)

    def _down(self) -> None:
        if not self._ended:
            self._end("the connection is lost")
            self._on_lost("the connection is lost")

    def _end(self, reason: str) -> None:
        if self._ended:
            return
        self._ended = reason
        if self._connection is not None:
            self._connection.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(NodeUnavailableError(reason))
