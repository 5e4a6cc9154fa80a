"""Memory that a burst took goes back to the host when the burst is over.

An allocator keeps what is freed for what comes, so one request of 30 MB leaves a process that much larger
for good. Asking for it back takes tens of milliseconds, in a thread, so it is done when there is something
to get.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

import psutil

GROWN_BYTES = 32 << 20  # so much more than after the last time, and there may be something to get
INTERVAL_S = 2.0


def trim() -> None:
    """What the C allocator holds and nobody uses goes back. glibc has this; elsewhere nothing is done."""
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)


def resident_bytes() -> int:
    """Of this process."""
    return int(psutil.Process().memory_info().rss)


async def return_memory(
    resident: Callable[[], int] = resident_bytes,
    give_back: Callable[[], None] = trim,
    interval_s: float = INTERVAL_S,
) -> None:
    """Looks every `interval_s`, for ever. A burst is over when the process has grown and grows no more."""
    least = before = resident()
    while True:
        await asyncio.sleep(interval_s)
        num_bytes = resident()
        if num_bytes > least + GROWN_BYTES and num_bytes <= before:
            await asyncio.to_thread(give_back)
            least = num_bytes = resident()  # what is left is used
        before = num_bytes
