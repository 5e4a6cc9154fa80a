"""Digests of KV pages: whether what arrived is what was sent.

A CRC finds any burst of wrong bits up to 32 long, and all but one in four billion of the rest. It is no
defence against somebody who changes pages on purpose: whoever can write into registered memory needs none.
"""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, assert_never

from ..messages.kv_layout import KVLayout
from ..runtime.completions import Completions
from ..runtime.config import VerifyPages
from ..runtime.containment import Containment

SAMPLE_EVERY = 16  # with "sample": one page of so many, the last page always


def pages_to_verify(mode: VerifyPages, first: int, end: int, offset: int) -> tuple[int, ...]:
    """Which of the pages [first, end) of a prompt are verified. `offset` moves the sample between rooms."""
    match mode:
        case "off":
            return ()
        case "all":
            return tuple(range(first, end))
        case "sample":
            sampled = range(first + offset % SAMPLE_EVERY, end, SAMPLE_EVERY)
            return tuple(sorted({*sampled, end - 1})) if end > first else ()
        case _:
            assert_never(mode)


@dataclass(frozen=True, slots=True)
class Digests:
    """A job that is done: one digest for each of its pages, in order; or why there are none."""

    key: Any  # as it was submitted
    digests: tuple[int, ...]
    error: str = ""


class DigestWorker:
    """Computes digests of a pool's pages on a thread of its own, with the interpreter's lock released.

    The thread is started by the first job, so a node that verifies nothing has none.
    """

    def __init__(self, memory: memoryview, layout: KVLayout) -> None:
        self._memory = memory
        self._layout = layout
        self._jobs: queue.SimpleQueue[tuple[object, tuple[int, ...]]] = queue.SimpleQueue()
        self._done = Completions[Digests]()
        self._containment = Containment()  # the thread's own
        self._thread: threading.Thread | None = None

    def submit(self, key: object, pages: Sequence[int]) -> None:
        """`pages` are of this node's pool. What is in them when their turn comes is what counts."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="page-digests", daemon=True)
            self._thread.start()
        self._jobs.put((key, tuple(pages)))

    def poll(self) -> list[Digests]:
        """Jobs that are done since the last call, in the order of submission."""
        return self._done.drain()

    def fileno(self) -> int:
        """Readable while `poll` has something."""
        return self._done.fileno()

    def _run(self) -> None:
        while True:
            key, pages = self._jobs.get()
            compute, failed = partial(self._digests, key, pages), partial(Digests, key, ())
            self._done.push(self._containment.value_of("digests of pages", compute, failed))

    def _digests(self, key: object, pages: Sequence[int]) -> Digests:
        return Digests(key, tuple(map(self._digest, pages)))

    def _digest(self, page: int) -> int:
        start = page * self._layout.stride_bytes
        return zlib.crc32(self._memory[start : start + self._layout.page_bytes])
