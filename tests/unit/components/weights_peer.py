"""A scheduler, as far as it lets others read weights.

As a process, ``weights_peer.py BACKEND TRANSPORT``: its address on stdout, until stdin ends.
"""

from __future__ import annotations

import sys
import threading

import torch
import zmq

from pdserve.components.weight_images import WeightImage, WeightImages
from pdserve.components.weight_outbox import WeightOutbox
from pdserve.messages.channel import MalformedMessage, ServerChannel
from pdserve.messages.node import ClientToNode
from pdserve.messages.weights import (
    FromPeer,
    MeetInbox,
    OfferInbox,
    OpenWeights,
    ReadWeights,
    TransferKind,
    WriteWeights,
)
from pdserve.runtime.waiting import Waiter
from pdserve.transfer.backends import create_backend


def weights() -> dict[str, torch.Tensor]:
    """16 MiB and a header."""
    generator = torch.Generator().manual_seed(11)
    return {"t": torch.randint(0, 255, (16 << 20,), dtype=torch.uint8, generator=generator)}


class WeightsServer:
    """Answers `serves` messages, and then no more."""

    def __init__(self, images: WeightImages, outbox: WeightOutbox, *, serves: int = 1 << 30) -> None:
        self._images = images
        self._outbox = outbox
        self._left = serves
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._server: ServerChannel[ClientToNode] = ServerChannel(self._context, "127.0.0.1", 0, ClientToNode)
        self.address = FromPeer(zmq_address=f"tcp://127.0.0.1:{self._server.port}")
        self._stop = threading.Event()

    def run(self) -> None:
        waiter = Waiter()
        waiter.add(self._server.socket)
        waiter.add(self._outbox.fileno())
        while not self._stop.is_set():
            waiter.wait(0.01)
            for link, message in self._server.receive():
                assert not isinstance(message, MalformedMessage)
                self._left -= 1
                if self._left >= 0:
                    self._handle(link, message)
            for link, reply in self._outbox.poll():
                self._server.send(link, reply)
        self._outbox.close()
        self._server.close()
        self._context.term()

    def stop(self) -> None:
        self._stop.set()

    def _handle(self, link: bytes, message: ClientToNode) -> None:
        match message:
            case OpenWeights():
                self._server.send(link, self._images.open(message))
            case ReadWeights():
                self._server.send(link, self._images.read(message))
            case OfferInbox() | MeetInbox():
                self._outbox.ask(link, message)
            case WriteWeights():
                lent = self._images.lend(message)
                if isinstance(lent, WeightImage):
                    self._outbox.write(link, message, lent)
                else:
                    self._server.send(link, lent)
            case _:
                raise AssertionError(message)


def main(backend: str, transport: str) -> None:
    outbox = WeightOutbox(
        TransferKind(backend, transport), lambda: create_backend(backend, transport, "127.0.0.1")
    )
    server = WeightsServer(WeightImages(lambda: WeightImage(weights())), outbox)
    threading.Thread(target=server.run, daemon=True).start()
    print(server.address.zmq_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
