"""Takes over the weights that another node serves.

What is asked for travels on a connection of its own to that node's scheduler. The bytes travel over the
transfer engines of the two nodes, into an inbox here, where both have the same kind; otherwise over the
connection, and the log says why.
"""

from __future__ import annotations

import itertools
import logging
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import zmq

from ..messages.channel import ClientChannel
from ..messages.link_guard import LinkKeys
from ..messages.malformed import MalformedMessage
from ..messages.node import CallReply, NodeToClient
from ..messages.weights import (
    STAGE_PART_BYTES,
    FromPeer,
    MeetInbox,
    OfferInbox,
    OpenWeights,
    ReadWeights,
    TransferKind,
    WeightBytesReply,
    WeightImageReply,
    WeightsWrittenReply,
    WriteWeights,
)
from ..runtime.errors import StartupError
from ..runtime.timing import Timing
from .inbox import Inbox, Inboxes
from .staged import StagedFile, require_room, staged_file

_log = logging.getLogger(__name__)

OVER_LINK = "link"  # where a transfer's kind would stand
_MAX_READS = 4  # asked for at once: the connection is never idle, and the peer's loop never long at it
_T = TypeVar("_T", WeightImageReply, WeightBytesReply, WeightsWrittenReply)


class WeightPuller:
    """Of a node, for one pull at a time. `count(over, num_bytes, duration_s)` is told of each that succeeds,
    on the thread that pulls."""

    def __init__(
        self,
        kind: TransferKind,
        inboxes: Inboxes,
        available_bytes: Callable[[], int],
        count: Callable[[str, int, float], None],
        link_keys: LinkKeys | None,
        timing: Timing,
    ) -> None:
        self._kind = kind
        self._timing = timing
        self._link_keys = link_keys
        self._inboxes = inboxes
        self._available_bytes = available_bytes
        self._count = count

    def pull(self, source: FromPeer) -> StagedFile:
        """The weights that the peer serves now, as a safetensors file. Blocks. Raises StartupError, also when
        they are those of another update than the one that `source` names."""
        started = time.monotonic()
        with _peer_link(source.zmq_address, self._link_keys, self._timing.weight_peer_silence_s) as link:
            link.send(OpenWeights(call_id=0))
            image = link.wait(WeightImageReply, self._timing.weight_image_s)
            wanted = (source.update_id, source.fingerprint)
            if source.update_id and (image.update_id, image.fingerprint) != wanted:
                raise StartupError(f"{source.zmq_address} serves other weights by now")
            with staged_file() as file:
                require_room(image.num_bytes, self._available_bytes())
                over = self._fill(file, image, link)
        duration_s = time.monotonic() - started
        where, num_bytes = source.zmq_address, file.num_bytes
        _log.info("%d bytes of weights came from %s over %s in %.3f s", num_bytes, where, over, duration_s)
        self._count(over, num_bytes, duration_s)
        return file

    def close(self) -> None:
        self._inboxes.close()

    def _fill(self, file: StagedFile, image: WeightImageReply, link: _PeerLink) -> str:
        """What it came over."""
        inbox = self._meet(link)
        if isinstance(inbox, str):
            _log.warning("the weights of %s are read over the link: %s", link.address, inbox)
            _read(file, image, link)
            return OVER_LINK
        try:
            _take_written(file, image, inbox, link)
        except BaseException:
            self._inboxes.set_aside()
            raise
        return str(self._kind)

    def _meet(self, link: _PeerLink) -> Inbox | str:
        """An inbox that the peer can write into, or why there is none."""
        offered = link.ask(OfferInbox(call_id=0, kind=self._kind))
        if not offered.success:
            return f"it says: {offered.message}"
        try:
            inbox = self._inboxes.current()
        except StartupError as error:
            return str(error)
        met = link.ask(MeetInbox(call_id=0, region=inbox.region))
        return inbox if met.success else f"its transfer engine did not reach this node's: {met.message}"


def _read(file: StagedFile, image: WeightImageReply, link: _PeerLink) -> None:
    offsets = deque(range(0, image.num_bytes, STAGE_PART_BYTES))
    num_asked = 0
    while file.num_bytes < image.num_bytes:
        while offsets and num_asked < _MAX_READS:
            read = ReadWeights(
                call_id=0, image=image.image, offset=offsets.popleft(), num_bytes=STAGE_PART_BYTES
            )
            link.send(read)
            num_asked += 1
        part = link.wait(WeightBytesReply)  # answered in order
        num_asked -= 1
        file.append(part.data)


@dataclass(frozen=True, slots=True)
class _Asked:
    call_id: int
    slot: int
    num_bytes: int


def _take_written(file: StagedFile, image: WeightImageReply, inbox: Inbox, link: _PeerLink) -> None:
    offsets = deque(range(0, image.num_bytes, inbox.slot_bytes))
    slots = deque(range(inbox.num_slots))
    calls = itertools.count(1)
    asked: deque[_Asked] = deque()  # in the order of the file
    written: dict[int, WeightsWrittenReply] = {}  # by call; writes may end in another order
    while file.num_bytes < image.num_bytes:
        while offsets and slots:
            offset = offsets.popleft()
            num_bytes = min(inbox.slot_bytes, image.num_bytes - offset)
            part = _Asked(next(calls), slots.popleft(), num_bytes)
            write = WriteWeights(
                call_id=part.call_id,
                image=image.image,
                offset=offset,
                num_bytes=num_bytes,
                region=inbox.region,
                dest=part.slot * inbox.slot_bytes,
            )
            link.send(write)
            asked.append(part)
        reply = link.wait(WeightsWrittenReply)
        written[reply.call_id] = reply
        while asked and asked[0].call_id in written:
            part = asked.popleft()
            reply = written.pop(part.call_id)
            data = inbox.slot(part.slot)[: part.num_bytes]
            if (part.num_bytes, zlib.crc32(data)) != (reply.num_bytes, reply.crc32):
                raise StartupError(f"{link.address}: a part of its weights arrived other than it was sent")
            file.append(data)
            slots.append(part.slot)


@contextmanager
def _peer_link(address: str, keys: LinkKeys | None, silence_s: float) -> Iterator[_PeerLink]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        link = _PeerLink(context, address, keys, silence_s)
    except zmq.ZMQError as error:
        context.term()
        raise StartupError(f"{address} is no address of a node: {error}") from error
    try:
        yield link
    finally:
        link.close()
        context.term()


class _PeerLink:
    """`silence_s`: so long it may be silent, where not otherwise said."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        keys: LinkKeys | None,
        silence_s: float,
    ) -> None:
        self._silence_s = silence_s
        self._channel: ClientChannel[NodeToClient] = ClientChannel(context, address, NodeToClient, keys=keys)
        self._arrived: deque[NodeToClient | MalformedMessage] = deque()
        self._poller = zmq.Poller()
        self._poller.register(self._channel.socket, zmq.POLLIN)
        self._poller.register(self._channel.monitor, zmq.POLLIN)

    @property
    def address(self) -> str:
        return self._channel.address

    def send(self, message: msgspec.Struct) -> None:
        self._channel.send(message)

    def ask(self, message: msgspec.Struct) -> CallReply:
        """Yes or no. Raises StartupError when there is no answer."""
        self.send(message)
        reply = self._next(self._silence_s)
        if isinstance(reply, CallReply):
            return reply
        raise StartupError(f"{self.address}: it answers with {type(reply).__name__}")

    def wait(self, kind: type[_T], silence_s: float | None = None) -> _T:
        """The next reply, which must be a good one of this kind. Raises StartupError."""
        reply = self._next(self._silence_s if silence_s is None else silence_s)
        if isinstance(reply, kind) and reply.success:
            return reply
        match reply:
            case WeightImageReply() | WeightBytesReply() | WeightsWrittenReply() | CallReply():
                raise StartupError(f"{self.address}: {reply.message}")
            case _:
                raise StartupError(f"{self.address}: it answers with {type(reply).__name__}")

    def close(self) -> None:
        self._channel.close()

    def _next(self, silence_s: float) -> NodeToClient | MalformedMessage:
        deadline = time.monotonic() + silence_s
        while not self._arrived:
            self._arrived.extend(self._channel.receive())
            if self._arrived:
                break
            if self._channel.lost:
                raise StartupError(f"the connection to {self.address} is lost")
            if (left := deadline - time.monotonic()) <= 0:
                raise StartupError(f"{self.address} was silent for {silence_s:g} s")
            self._poller.poll(int(1000 * left) + 1)
        return self._arrived.popleft()
