"""A scheduler, as far as it lets others read weights.

As a process, ``serve BACKEND TRANSPORT`` prints its address and serves until it is killed. ``pull BACKEND
TRANSPORT ADDRESS`` pulls, says "frozen" and stops itself when two parts are here, and says "pulled".
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping

import torch
import zmq

from pdserve.engine.job import AnyJob, FinishedJob
from pdserve.messages.channel import ServerChannel
from pdserve.messages.malformed import MalformedMessage
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
from pdserve.runtime.containment import Containment
from pdserve.runtime.timing import UNSCALED
from pdserve.runtime.waiting import Waiter
from pdserve.transfer.backends import create_backend
from pdserve.weights.images import ImageReplies, WeightImage, WeightImages
from pdserve.weights.inbox import Inbox, Inboxes
from pdserve.weights.outbox import WeightOutbox
from pdserve.weights.peer import WeightPuller


def weights() -> dict[str, torch.Tensor]:
    """16 MiB and a header."""
    generator = torch.Generator().manual_seed(11)
    return {"t": torch.randint(0, 255, (16 << 20,), dtype=torch.uint8, generator=generator)}


class ImageJobs:
    """Done when they are looked for."""

    def __init__(self) -> None:
        self.waiting: list[AnyJob[ImageReplies]] = []
        self.num_done = 0

    def submit(self, job: AnyJob[ImageReplies]) -> None:
        self.waiting.append(job)

    def poll(self) -> list[FinishedJob[ImageReplies]]:
        jobs, self.waiting = self.waiting, []
        self.num_done += len(jobs)
        return [job.do(Containment()) for job in jobs]


def images_of(given: Mapping[str, torch.Tensor], fingerprint: str = "") -> WeightImages:
    """Of tensors that update "u" brought."""
    return WeightImages(
        lambda: lambda: WeightImage(given, "u", fingerprint), lambda: "u", ImageJobs(), idle_s=60.0
    )


class WeightsServer:
    """Answers `serves` messages, and then no more."""

    def __init__(self, images: WeightImages, outbox: WeightOutbox, *, serves: int = 1 << 30) -> None:
        self._images = images
        self._outbox = outbox
        self._left = serves
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._server: ServerChannel[ClientToNode] = ServerChannel(
            self._context, "127.0.0.1", 0, ClientToNode, keys=None
        )
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
            for link, reply in (*self._images.poll(0.0), *self._outbox.poll()):
                self._server.send(link, reply)
        self._outbox.close()
        self._server.close()
        self._context.term()

    def stop(self) -> None:
        self._stop.set()

    def _handle(self, link: bytes, message: ClientToNode) -> None:
        match message:
            case OpenWeights():
                if (opened := self._images.open(link, message)) is not None:
                    self._server.send(link, opened)
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


def serve(kind: TransferKind) -> None:
    outbox = WeightOutbox(kind, lambda: create_backend(kind.backend, kind.transport, "127.0.0.1"), UNSCALED)
    server = WeightsServer(images_of(weights()), outbox)
    print(server.address.zmq_address, flush=True)
    server.run()


def pull(kind: TransferKind, address: str) -> None:
    slot, taken = Inbox.slot, iter(range(1000))

    def frozen(self: Inbox, index: int) -> memoryview:
        if next(taken) == 2:
            print("frozen", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        return slot(self, index)

    Inbox.slot = frozen  # type: ignore[method-assign]
    inboxes = Inboxes(lambda: create_backend(kind.backend, kind.transport, "127.0.0.1"), slot_bytes=1 << 20)
    puller = WeightPuller(
        kind,
        inboxes,
        lambda: 1 << 40,
        lambda over, num_bytes, duration_s: None,
        link_keys=None,
        timing=UNSCALED,
    )
    puller.pull(FromPeer(zmq_address=address)).close()
    print("pulled", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", backend, transport]:
            serve(TransferKind(backend, transport))
        case ["pull", backend, transport, address]:
            pull(TransferKind(backend, transport), address)
