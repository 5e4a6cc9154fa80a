"""The narrow view that the router has of the outside: connections to nodes.

`pdserve.api.node_client.NodeClient` is a NodeLink; tests bring their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import zmq.asyncio

from ..api.node_calls import NodeUnavailableError, StreamMessage
from ..api.node_client import NodeClient
from ..messages.node import CallReply, ClientToNode, Pong, RequestStateReply, ServerInfoReply
from ..messages.operation import ClusterOperation, InternalState, ProfileReply
from ..messages.weights import MemoryTag, UpdateGroupSpec, WeightChecksReply, WeightSource, WeightsReply


class NodeLink(Protocol):
    """One connection to one scheduler. When it ends it is lost for good; the router then makes another.

    Every call raises NodeUnavailableError when the connection has ended or no answer came in time.
    """

    def send(self, message: ClientToNode) -> None: ...

    async def ping(self, timeout_s: float) -> Pong: ...

    async def server_info(self, timeout_s: float) -> ServerInfoReply: ...

    async def flush_cache(self, flush_timeout_s: float) -> CallReply: ...

    async def abort(self, request_id: str, *, all_requests: bool) -> CallReply: ...

    async def assert_peer_death(self, incarnation: str, timeout_s: float) -> CallReply: ...

    async def request_state(self, request_id: str, timeout_s: float) -> RequestStateReply: ...

    async def stage_weights(
        self, update_id: str, offset: int, data: bytes, timeout_s: float
    ) -> CallReply: ...
    async def operate(self, operation: ClusterOperation, timeout_s: float) -> CallReply: ...

    async def internal_state(self, timeout_s: float) -> InternalState: ...

    async def stop_profile(self, timeout_s: float) -> ProfileReply: ...

    async def prepare_weights(
        self,
        update_id: str,
        source: WeightSource,
        weight_version: str,
        timeout_s: float,
        lease_s: float,
    ) -> CallReply: ...

    async def commit_weights(self, update_id: str, timeout_s: float) -> CallReply: ...

    async def discard_weights(self, update_id: str, timeout_s: float) -> CallReply: ...

    async def join_update_group(self, group: UpdateGroupSpec, rank: int) -> CallReply: ...

    async def leave_update_group(self, group_name: str, timeout_s: float) -> CallReply: ...

    async def release_memory(
        self, tags: tuple[MemoryTag, ...], wait_s: float, timeout_s: float
    ) -> CallReply: ...

    async def resume_memory(self, tags: tuple[MemoryTag, ...], timeout_s: float) -> CallReply: ...

    async def get_weights(self, name: str, truncate_size: int, timeout_s: float) -> WeightsReply: ...

    async def check_weights(self, timeout_s: float) -> WeightChecksReply: ...

    async def save_weights(
        self, target: str, *, is_remote: bool, max_shard_bytes: int, timeout_s: float
    ) -> CallReply: ...

    async def close(self) -> None: ...


class Connector(Protocol):
    """Opens a link. ``on_lost`` is called once if it ends by itself; both callbacks run in the event loop.

    Raises NodeUnavailableError for what is no address.
    """

    def __call__(
        self, address: str, *, on_stream: Callable[[StreamMessage], None], on_lost: Callable[[str], None]
    ) -> NodeLink: ...


class ZmqConnector:
    def __init__(self, context: zmq.asyncio.Context) -> None:
        self._context = context

    def __call__(
        self, address: str, *, on_stream: Callable[[StreamMessage], None], on_lost: Callable[[str], None]
    ) -> NodeLink:
        try:
            return NodeClient(self._context, address, on_stream=on_stream, on_lost=on_lost)
        except zmq.ZMQError as error:
            raise NodeUnavailableError(f"cannot connect to {address!r}: {error}") from error
