"""The narrow view that the router has of the outside: connections to nodes.

`pdserve.links.node_client.NodeClient` is the link of real processes; tests and the simulation bring
their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import zmq.asyncio

from ..links.node_calls import NodeCalls, NodeUnavailableError, StreamMessage
from ..links.node_client import NodeClient
from ..messages.link_guard import LinkKeys
from ..runtime.timing import Timing


class Connector(Protocol):
    """Opens a link. ``on_lost`` is called once if it ends by itself; both callbacks run in the event loop.

    Raises NodeUnavailableError for what is no address.
    """

    def __call__(
        self, address: str, *, on_stream: Callable[[StreamMessage], None], on_lost: Callable[[str], None]
    ) -> NodeCalls: ...


class ZmqConnector:
    def __init__(self, context: zmq.asyncio.Context, keys: LinkKeys | None, timing: Timing) -> None:
        self._context = context
        self._keys = keys
        self._timing = timing

    def __call__(
        self, address: str, *, on_stream: Callable[[StreamMessage], None], on_lost: Callable[[str], None]
    ) -> NodeCalls:
        try:
            return NodeClient(
                self._context,
                address,
                keys=self._keys,
                timing=self._timing,
                on_stream=on_stream,
                on_lost=on_lost,
            )
        except zmq.ZMQError as error:
            raise NodeUnavailableError(f"cannot connect to {address!r}: {error}") from error
