"""Talks to one node's scheduler: what a router and the node's own HTTP front share.

The scheduler binds a zmq ROUTER socket, a NodeClient connects to it by DEALER; every message is one frame.

A client stands for one connection. When that ends it is *lost* for good: zmq does not reconnect behind our
back, because what was meant for one incarnation of a node must never reach the next. Its owner makes another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from ..messages.codec import Codec
from ..messages.link_guard import HANDSHAKE_FAILED, NOT_OF_THE_CLUSTER, LinkKeys
from ..messages.node import ClientToNode, NodeToClient
from ..runtime.containment import Containment, nobody_waits
from ..runtime.logs import Throttle
from ..runtime.timing import Timing
from .node_calls import NodeCalls, NodeUnavailableError, StreamMessage

log = logging.getLogger(__name__)

_CONNECTION_ENDED = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | HANDSHAKE_FAILED


def _ignore_stream(message: StreamMessage) -> None:
    del message


def _ignore_loss(reason: str) -> None:
    del reason


class NodeClient(NodeCalls):
    """One connection to one scheduler. Make it inside a running event loop; ``close`` it in the end.

    ``on_stream`` gets TokenOutputs and AttemptFailed in the order sent; ``on_lost`` is called once, with a
    reason, when the connection ends by itself (refused, reset, closed by the node). Both run in the event
    loop and must not block. Pending calls then raise NodeUnavailableError.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        *,
        keys: LinkKeys | None,
        timing: Timing,
        on_stream: Callable[[StreamMessage], None] = _ignore_stream,
        on_lost: Callable[[str], None] = _ignore_loss,
    ) -> None:
        super().__init__(address, timing, on_stream)
        self._on_lost = on_lost
        self._containment = Containment()
        self._complaints = Throttle()
        self._codec: Codec[NodeToClient] = Codec(NodeToClient)
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # no send blocks and none drops
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        if keys is not None:
            keys.secure_client(self._socket)
        self._monitor: zmq.asyncio.Socket = self._socket.get_monitor_socket(_CONNECTION_ENDED)
        self._socket.connect(address)
        self._tasks = (
            asyncio.create_task(self._receive(), name=f"node-receive {address}"),
            asyncio.create_task(self._watch_connection(), name=f"node-watch {address}"),
        )

    def send(self, message: ClientToNode) -> None:
        if self._ended:
            raise NodeUnavailableError(f"node at {self.address}: {self._ended}")
        self._socket.send(self._codec.encode(message))

    async def close(self) -> None:
        """Idempotent. ``on_lost`` is not called."""
        self._end("closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(zmq.ZMQError):  # closed by an earlier call
            self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            try:
                message = self._codec.decode(frames[-1])
            except msgspec.DecodeError as error:
                if num := self._complaints.add(time.monotonic()):
                    log.warning(
                        "node at %s sent %d frames that are no message, the last: %s",
                        self.address,
                        num,
                        error,
                    )
                continue
            with self._containment.around(str(message.__struct_config__.tag), nobody_waits):
                self._arrive(message)

    async def _watch_connection(self) -> None:
        event = parse_monitor_message(await self._monitor.recv_multipart())["event"]
        reason = "cannot connect" if event == zmq.EVENT_CLOSED else "connection lost"
        if event & HANDSHAKE_FAILED:
            reason = NOT_OF_THE_CLUSTER
        if not self._ended:
            self._end(reason)
            self._on_lost(reason)
