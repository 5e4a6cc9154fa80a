"""A router's connection to a node, in place of the zmq one."""

from __future__ import annotations

from collections.abc import Callable

from ..links.node_calls import NodeCalls, NodeUnavailableError, StreamMessage
from ..messages.node import ClientToNode
from ..runtime.timing import Timing
from .network import Network


class SimulatedLink(NodeCalls):
    """The router's link to a node of the simulation."""

    def __init__(
        self,
        network: Network,
        address: str,
        *,
        client_name: str,
        timing: Timing,
        on_stream: Callable[[StreamMessage], None],
        on_lost: Callable[[str], None],
    ) -> None:
        super().__init__(address, timing, on_stream)
        self._on_lost = on_lost
        self._connection = network.connect(
            address, client_name=client_name, on_message=self._arrive, on_down=self._down
        )

    def send(self, message: ClientToNode) -> None:
        if self._ended:
            raise NodeUnavailableError(self._ended)
        if self._connection is not None:
            self._connection.to_server(message)

    async def close(self) -> None:
        self._close("closed")

    def _down(self) -> None:
        if not self._ended:
            self._close("the connection is lost")
            self._on_lost("the connection is lost")

    def _close(self, reason: str) -> None:
        if not self._ended and self._connection is not None:
            self._connection.close()
        self._end(reason)
