"""Writes parts of the weights that serve into the inboxes of other nodes, over a transfer engine.

The engine is not the hand-off's, and neither is the thread: no part is copied on the loop, a puller that
freezes while it is met holds up nobody's pages, and weights travel while the pool's memory is released. Both
begin with the first puller.

A pull, as it is seen here:

1. OfferInbox: the engine is started. A yes says that it is of the puller's kind and has slots to give.
2. MeetInbox: the puller has just answered, so the engines may meet.
3. WriteWeights, a few at a time: a part waits for a slot, is copied there, written from there and reported.

A slot is taken until its write is over, however long that takes: a frozen puller keeps the few that one
puller may have.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import select
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias, assert_never

import numpy as np
from numpy.typing import NDArray

from ..messages.memory_region import MemoryRegion
from ..messages.node import CallReply
from ..messages.weights import (
    WRITE_PART_BYTES,
    MeetInbox,
    OfferInbox,
    TransferKind,
    WeightsWrittenReply,
    WriteWeights,
)
from ..runtime.completions import Completions
from ..runtime.containment import Containment
from ..runtime.errors import StartupError
from ..runtime.timing import Timing
from ..transfer.backends.base import TransferBackend, WriteResult, WriteState
from ..transfer.copy_plan import Run
from .images import WeightImage

_log = logging.getLogger(__name__)

NUM_SLOTS = 8
SLOTS_PER_PULLER = 2  # one is filled while the other travels

Reply: TypeAlias = CallReply | WeightsWrittenReply


@dataclass(frozen=True, slots=True)
class OutboxPart:
    """A part that is asked for, and what it is of."""

    message: WriteWeights
    image: WeightImage


Asked: TypeAlias = OfferInbox | MeetInbox | OutboxPart


@dataclass(frozen=True, slots=True)
class _Written:
    """A part on the wire. It holds on to no image: the bytes are in the slot."""

    link: bytes
    reply: WeightsWrittenReply  # when it is in place
    session: str
    slot: int
    started: float


@dataclass(slots=True)
class _Puller:
    region: MemoryRegion
    used: float
    is_met: bool = False
    waiting: deque[tuple[bytes, OutboxPart]] = field(default_factory=deque)  # and who asked
    num_outstanding: int = 0  # first contacts and writes without a result


class OutboxWriter:
    """What the outbox does, without its thread. Methods return what is to be sent to whom."""

    def __init__(
        self, kind: TransferKind, make_backend: Callable[[], TransferBackend], timing: Timing
    ) -> None:
        self._timing = timing
        self._kind = kind
        self._make_backend = make_backend
        self._backend: TransferBackend | None = None
        self._slots: NDArray[np.uint8] = np.empty((0, 0), np.uint8)
        self._free = deque(range(NUM_SLOTS))
        self._handles = itertools.count(1)
        self._pullers: dict[str, _Puller] = {}  # by session; who was served longest ago first
        self._meeting: dict[int, tuple[bytes, MeetInbox]] = {}  # by handle
        self._written: dict[int, _Written] = {}  # likewise
        self._unsent: list[tuple[bytes, Reply]] = []  # of parts that were not copied
        self._containment = Containment()

    def handle(self, link: bytes, message: Asked, now: float) -> list[tuple[bytes, Reply]]:
        match message:
            case OfferInbox():
                reason = self._why_not(message.kind, now)
                return [(link, CallReply(call_id=message.call_id, success=not reason, message=reason))]
            case MeetInbox():
                return self._meet(link, message, now)
            case OutboxPart():
                puller = self._pullers.get(message.message.region.session)
                if puller is None or not puller.is_met:
                    return [(link, _not_written(message.message, "this inbox was not met"))]
                puller.waiting.append((link, message))
                puller.used = now
                return []
            case _:
                assert_never(message)

    def poll(self, now: float) -> list[tuple[bytes, Reply]]:
        """What has ended."""
        if self._backend is None:
            return []
        replies, self._unsent = self._unsent, []
        replies += [self._ended(result) for result in self._backend.poll()]
        idle_s = self._timing.weight_puller_idle_s
        for session, puller in list(self._pullers.items()):
            if now - puller.used <= idle_s:
                continue
            for link, part in puller.waiting:
                replies.append((link, _not_written(part.message, f"no slot was free for {idle_s:g} s")))
            puller.waiting.clear()  # and with it their hold on the weights
            if not puller.num_outstanding:
                self._backend.disconnect(puller.region)
                del self._pullers[session]
        return replies

    def start_next(self, now: float) -> bool:
        """Copy a part into a slot and write it. False: none waits, or those that wait have to."""
        if self._backend is None or (waited := self._next_part()) is None:
            return False
        self._start(self._backend, *waited, now)
        return True

    @property
    def backend(self) -> TransferBackend | None:
        """None before it is needed."""
        return self._backend

    @property
    def has_pullers(self) -> bool:
        """They are looked after now and then."""
        return bool(self._pullers)

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()

    def _why_not(self, kind: TransferKind, now: float) -> str:
        if kind != self._kind:
            return f"it moves weights over {self._kind}, not over {kind}"
        if self._backend is None:
            try:
                self._backend = self._start_backend()
            except StartupError as error:
                return str(error)
        if self._backend.stuck_s(now) > 1.0:
            return "its transfer engine hangs in a call"
        stall_s = self._timing.weight_write_stall_s
        num_stalled = sum(now - written.started > stall_s for written in self._written.values())
        if NUM_SLOTS - num_stalled < SLOTS_PER_PULLER:
            return f"{num_stalled} writes of weights wait for nodes that take nothing"
        return ""

    def _start_backend(self) -> TransferBackend:
        backend = self._make_backend()
        try:
            memory = backend.allocate(NUM_SLOTS * WRITE_PART_BYTES)
            backend.register()
        except (StartupError, OSError) as error:  # the second: no memory
            backend.close()
            raise StartupError(f"no memory for weights can be registered: {error}") from error
        self._slots = np.frombuffer(memory, np.uint8).reshape(NUM_SLOTS, WRITE_PART_BYTES)
        _log.info("%d MiB are registered to write weights from, over %s", len(memory) >> 20, self._kind)
        return backend

    def _meet(self, link: bytes, message: MeetInbox, now: float) -> list[tuple[bytes, Reply]]:
        if self._backend is None:
            return [(link, CallReply(call_id=message.call_id, success=False, message="offer it first"))]
        handle = next(self._handles)
        self._backend.first_contact(handle, message.region)
        puller = self._pullers.setdefault(message.region.session, _Puller(message.region, now))
        puller.used = now
        puller.num_outstanding += 1
        self._meeting[handle] = (link, message)
        return []

    def _next_part(self) -> tuple[bytes, OutboxPart] | None:
        """Pullers take turns, and none gets more than its slots."""
        if not self._free:
            return None
        for session, puller in self._pullers.items():
            if puller.waiting and puller.num_outstanding < SLOTS_PER_PULLER:
                self._pullers[session] = self._pullers.pop(session)  # at the end: the next one's turn
                return puller.waiting.popleft()
        return None

    def _start(self, backend: TransferBackend, link: bytes, part: OutboxPart, now: float) -> None:
        message, slot = part.message, self._free.popleft()
        rows = self._slots[slot, : message.num_bytes]
        why_not: list[str] = []
        with self._containment.around("a part of weights", why_not.append):
            num_bytes = part.image.copy_into(rows, message.offset)
        if why_not:
            self._free.append(slot)
            self._unsent.append((link, _not_written(message, why_not[0])))
            return
        reply = WeightsWrittenReply(
            call_id=message.call_id,
            success=True,
            num_bytes=num_bytes,
            crc32=zlib.crc32(self._slots[slot, :num_bytes].data),
        )
        session = message.region.session
        self._pullers[session].num_outstanding += 1
        handle = next(self._handles)
        self._written[handle] = _Written(link, reply, session, slot, now)
        backend.submit(handle, message.region, Run(slot * WRITE_PART_BYTES, message.dest, num_bytes))

    def _ended(self, result: WriteResult) -> tuple[bytes, Reply]:
        is_done = result.state is WriteState.DONE
        if (meeting := self._meeting.pop(result.handle, None)) is not None:
            link, message = meeting
            puller = self._pullers[message.region.session]
            puller.num_outstanding -= 1
            puller.is_met |= is_done
            return link, CallReply(call_id=message.call_id, success=is_done, message=result.reason)
        written = self._written.pop(result.handle)
        self._free.append(written.slot)
        self._pullers[written.session].num_outstanding -= 1
        return written.link, written.reply if is_done else _not_written(written.reply, result.reason)


class WeightOutbox:
    """An OutboxWriter on its thread. All methods belong to the loop, and none of them blocks but `close`."""

    def __init__(
        self, kind: TransferKind, make_backend: Callable[[], TransferBackend], timing: Timing
    ) -> None:
        self._idle_s = timing.weight_puller_idle_s
        self._writer = OutboxWriter(kind, make_backend, timing)  # the thread's own
        self._asked: queue.SimpleQueue[tuple[bytes, Asked]] = queue.SimpleQueue()
        self._replies = Completions[tuple[bytes, Reply]]()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._containment = Containment()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def ask(self, link: bytes, message: OfferInbox | MeetInbox) -> None:
        """The reply comes from `poll`."""
        self._put(link, message)

    def write(self, link: bytes, message: WriteWeights, image: WeightImage) -> None:
        """Write a part of this image into an inbox. The reply comes from `poll`."""
        self._put(link, OutboxPart(message, image))

    def poll(self) -> list[tuple[bytes, Reply]]:
        """Replies since the last call, and the links that wait for them."""
        return self._replies.drain()

    def fileno(self) -> int:
        """Readable while `poll` has something."""
        return self._replies.fileno()

    def close(self) -> None:
        self._is_closing = True
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join(5.0)

    def _put(self, link: bytes, message: Asked) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="weight-outbox", daemon=True)
            self._thread.start()
        self._asked.put((link, message))
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        writer = self._writer
        readable = select.poll()
        readable.register(self._wake, select.POLLIN)
        is_watched = False
        while not self._is_closing:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            replies = self._handle_asked()
            replies += writer.poll(time.monotonic())
            for reply in replies:
                self._replies.push(reply)
            if writer.backend is not None and not is_watched:
                readable.register(writer.backend.fileno(), select.POLLIN)
                is_watched = True
            if not writer.start_next(time.monotonic()):
                readable.poll(1000 * self._idle_s if writer.has_pullers else None)
        writer.close()

    def _handle_asked(self) -> list[tuple[bytes, Reply]]:
        replies: list[tuple[bytes, Reply]] = []
        while not self._asked.empty():
            link, message = self._asked.get()
            answer = partial(self._writer.handle, link, message, time.monotonic())
            replies += self._containment.value_of(type(message).__name__, answer, partial(_no, link, message))
        return replies


def _no(link: bytes, asked: Asked, why: str) -> list[tuple[bytes, Reply]]:
    if isinstance(asked, OutboxPart):
        return [(link, _not_written(asked.message, why))]
    return [(link, CallReply(call_id=asked.call_id, success=False, message=why))]


def _not_written(asked: WriteWeights | WeightsWrittenReply, why: str) -> WeightsWrittenReply:
    return WeightsWrittenReply(call_id=asked.call_id, success=False, message=why)
