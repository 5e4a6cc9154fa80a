"""The weights that serve, for other nodes to read: as the safetensors file that they would make.

An image holds on to tensors, which a later update leaves alone. So who reads it gets the weights of one
moment, whatever this node serves meanwhile. Of one rank nothing is copied; several ranks put their parts
together first, so an image is made in a job, and all who read the same weights share it.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.job import AnyJob, FinishedJob, Job
from ..messages.weights import (
    STAGE_PART_BYTES,
    WRITE_PART_BYTES,
    OpenWeights,
    ReadWeights,
    TensorSpec,
    WeightBytesReply,
    WeightImageReply,
    WeightsWrittenReply,
    WriteWeights,
)
from ..runtime.errors import PdserveError, StartupError
from .staged import safetensors_header


class WeightImage:
    """A safetensors file of tensors by name, that is nowhere but in them; and whose weights they are."""

    def __init__(self, tensors: Mapping[str, Tensor], update_id: str = "", fingerprint: str = "") -> None:
        self.update_id = update_id
        self.fingerprint = fingerprint
        specs = [
            TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in tensors.items()
        ]
        header, _ = safetensors_header(specs)
        rows = [tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in tensors.values()]
        self._pieces = [memoryview(header), *rows]
        self._ends = list(itertools.accumulate(piece.nbytes for piece in self._pieces))

    @property
    def num_bytes(self) -> int:
        return self._ends[-1]

    def read(self, offset: int, num_bytes: int) -> bytes:
        """What is there of these bytes."""
        return b"".join(self._parts(offset, num_bytes))

    def copy_into(self, rows: NDArray[np.uint8], offset: int) -> int:
        """Fill `rows`, ``[num_bytes]``, with what is there of so many bytes; how many that were. The
        interpreter's lock is released meanwhile."""
        end = 0
        for part in self._parts(offset, rows.size):
            start, end = end, end + part.nbytes
            rows[start:end] = np.frombuffer(part, np.uint8)
        return end

    def _parts(self, offset: int, num_bytes: int) -> Iterator[memoryview]:
        end = min(offset + num_bytes, self.num_bytes)
        index = bisect.bisect_right(self._ends, offset)
        while offset < end:
            piece = self._pieces[index]
            start = offset - (self._ends[index] - piece.nbytes)
            part = piece[start : start + end - offset]
            if part.nbytes:  # a tensor may be empty
                yield part
            offset += part.nbytes
            index += 1


@dataclass(slots=True, eq=False)
class _Making:
    """In a job."""

    update_id: str
    asked: list[tuple[bytes, int]]  # link and call of each who waits for it
    is_dropped: bool = False


@dataclass(slots=True)
class _Held:
    image: WeightImage
    idle_until: float | None = None  # None: from the next turn of the loop on


ImageReplies: TypeAlias = list[tuple[bytes, WeightImageReply]]  # and the links that wait for them


class ImageJobs(Protocol):
    """A JobThread, not that of updates: one of them may be reading an image of this very node."""

    def submit(self, job: AnyJob[ImageReplies]) -> None: ...

    def poll(self) -> list[FinishedJob[ImageReplies]]: ...


class WeightImages:
    """Of the weights that served when each was asked for.

    `make` returns a job that makes one of what serves now, and raises StartupError. `served` is the id of
    the update that serves. An image that nobody reads for `idle_s` is let go of.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[], WeightImage]],
        served: Callable[[], str],
        jobs: ImageJobs,
        *,
        idle_s: float,
    ) -> None:
        self._make = make
        self._idle_s = idle_s
        self._served = served
        self._jobs = jobs
        self._numbers = itertools.count(1)
        self._making: list[_Making] = []
        self._held: dict[int, _Held] = {}

    def open(self, link: bytes, message: OpenWeights) -> WeightImageReply | None:
        """None: the answer comes from `poll`."""
        served = self._served()
        for held in self._held.values():
            if held.image.update_id == served:
                return self._opened(message.call_id, held.image)
        for making in self._making:
            if making.update_id == served and not making.is_dropped:
                making.asked.append((link, message.call_id))
                return None
        run, making = self._make(), _Making(served, [(link, message.call_id)])
        self._making.append(making)
        self._jobs.submit(Job("image of weights", run, lambda image: self._made(making, image)))
        return None

    def read(self, message: ReadWeights) -> WeightBytesReply:
        """The end of the image lets go of it."""
        try:
            image = self._lend(message, STAGE_PART_BYTES)
        except StartupError as error:
            return WeightBytesReply(call_id=message.call_id, success=False, message=str(error))
        data = image.read(message.offset, message.num_bytes)
        return WeightBytesReply(call_id=message.call_id, success=True, data=data)

    def lend(self, message: WriteWeights) -> WeightImage | WeightsWrittenReply:
        """The image to write from, or why it is not written. The end of the image lets go of it."""
        try:
            return self._lend(message, WRITE_PART_BYTES)
        except StartupError as error:
            return WeightsWrittenReply(call_id=message.call_id, success=False, message=str(error))

    def _lend(self, message: ReadWeights | WriteWeights, max_bytes: int) -> WeightImage:
        held = self._held.get(message.image)
        if held is None:
            raise StartupError("these weights are let go of")
        if message.offset < 0 or not 0 < message.num_bytes <= max_bytes:
            raise StartupError("no such bytes")
        held.idle_until = None
        image = held.image
        if message.offset < image.num_bytes <= message.offset + message.num_bytes:
            del self._held[message.image]
        return image

    def poll(self, now: float) -> ImageReplies:
        """Answers whose image is made."""
        replies = [reply for job in self._jobs.poll() for reply in job.deliver()]
        for number, held in list(self._held.items()):
            if held.idle_until is None:
                held.idle_until = now + self._idle_s
            elif now >= held.idle_until:
                del self._held[number]
        return replies

    @property
    def deadline(self) -> float:
        """When `poll` has something to do by time alone; infinity: never."""
        times = [held.idle_until for held in self._held.values() if held.idle_until is not None]
        return min(times, default=math.inf)

    def drop(self) -> None:
        """The memory is wanted back."""
        self._held.clear()
        for making in self._making:
            making.is_dropped = True

    def _made(self, making: _Making, image: WeightImage | PdserveError) -> ImageReplies:
        self._making.remove(making)
        if isinstance(image, WeightImage) and not making.is_dropped:
            return [(link, self._opened(call_id, image)) for link, call_id in making.asked]
        why = str(image) if isinstance(image, PdserveError) else "these weights are let go of"
        return [
            (link, WeightImageReply(call_id=call_id, success=False, message=why))
            for link, call_id in making.asked
        ]

    def _opened(self, call_id: int, image: WeightImage) -> WeightImageReply:
        number = next(self._numbers)
        self._held[number] = _Held(image)
        return WeightImageReply(
            call_id=call_id,
            success=True,
            image=number,
            num_bytes=image.num_bytes,
            update_id=image.update_id,
            fingerprint=image.fingerprint,
        )
