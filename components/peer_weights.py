"""Reads another node's weights over a connection of its own to that node's scheduler."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import msgspec
import zmq

from ..messages.channel import ClientChannel, MalformedMessage
from ..messages.node import CallReply, NodeToClient
from ..messages.weights import (
    STAGE_PART_BYTES,
    FromPeer,
    OpenWeights,
    ReadWeights,
    WeightBytesReply,
    WeightImageReply,
)
from ..runtime.errors import StartupError
from .staged_weights import StagedFile, require_room, staged_file

_MAX_READS = 4  # asked for at once: the connection is never idle, and the peer's loop never long at it
_SILENCE_S = 30.0
_OPEN_S = 120.0  # a peer of several ranks puts whole tensors together first
_T = TypeVar("_T", WeightImageReply, WeightBytesReply)


def pull_weights(source: FromPeer, available_bytes: Callable[[], int]) -> StagedFile:
    """The weights that the peer serves now, as a safetensors file. Blocks. Raises StartupError, also when
    they are those of another update than the one that `source` names."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        link = _PeerLink(context, source.zmq_address)
    except zmq.ZMQError as error:
        context.term()
        raise StartupError(f"{source.zmq_address} is no address of a node: {error}") from error
    try:
        return _pull(link, source, available_bytes)
    finally:
        link.close()
        context.term()


def _pull(link: _PeerLink, source: FromPeer, available_bytes: Callable[[], int]) -> StagedFile:
    link.send(OpenWeights(call_id=0))
    image = link.wait(WeightImageReply, _OPEN_S)
    if source.update_id and (image.update_id, image.fingerprint) != (source.update_id, source.fingerprint):
        raise StartupError(f"{source.zmq_address} serves other weights by now")
    offsets = deque(range(0, image.num_bytes, STAGE_PART_BYTES))
    calls = itertools.count(1)
    num_asked = 0
    with staged_file() as file:
        require_room(image.num_bytes, available_bytes())
        while file.num_bytes < image.num_bytes:
            while offsets and num_asked < _MAX_READS:
                read = ReadWeights(
                    call_id=next(calls),
                    image=image.image,
                    offset=offsets.popleft(),
                    num_bytes=STAGE_PART_BYTES,
                )
                link.send(read)
                num_asked += 1
            part = link.wait(WeightBytesReply, _SILENCE_S)  # answered in order
            num_asked -= 1
            file.append(part.data)
    return file


class _PeerLink:
    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._channel: ClientChannel[NodeToClient] = ClientChannel(context, address, NodeToClient)
        self._arrived: deque[NodeToClient | MalformedMessage] = deque()
        self._poller = zmq.Poller()
        self._poller.register(self._channel.socket, zmq.POLLIN)
        self._poller.register(self._channel.monitor, zmq.POLLIN)

    def send(self, message: msgspec.Struct) -> None:
        self._channel.send(message)

    def wait(self, kind: type[_T], silence_s: float) -> _T:
        """The next reply, which must be a good one of this kind. Raises StartupError."""
        address = self._channel.address
        deadline = time.monotonic() + silence_s
        while not self._arrived:
            self._arrived.extend(self._channel.receive())
            if self._arrived:
                break
            if self._channel.lost:
                raise StartupError(f"the connection to {address} is lost")
            if (left := deadline - time.monotonic()) <= 0:
                raise StartupError(f"{address} was silent for {silence_s:g} s")
            self._poller.poll(int(1000 * left) + 1)
        reply = self._arrived.popleft()
        if isinstance(reply, kind) and reply.success:
            return reply
        match reply:
            case WeightImageReply() | WeightBytesReply() | CallReply():
                raise StartupError(f"{address}: {reply.message}")
            case _:
                raise StartupError(f"{address}: it answers with {type(reply).__name__}")

    def close(self) -> None:
        self._channel.close()
