"""Where a KV pool lies: the one thing that the device and the transport must agree on."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """One allocation, zeroed, whose address stays as long as anybody may write into it.

    ``view`` is the host's way to its bytes, None where it has none: they are a device's. ``give_back`` gives
    its pages to where they came from and keeps the address; what is read there later is zero.
    """

    address: int
    num_bytes: int
    give_back: Callable[[], None]
    view: memoryview | None

    @property
    def is_host(self) -> bool:
        return self.view is not None


def host_memory(num_bytes: int) -> PoolMemory:
    """Anonymous memory of this process, page-aligned, for a NIC to write into."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)  # a child's copy-on-write would move pages under the NIC
    return PoolMemory(
        address=ctypes.addressof(ctypes.c_char.from_buffer(memory)),
        num_bytes=num_bytes,
        give_back=lambda: memory.madvise(mmap.MADV_DONTNEED),
        view=memoryview(memory),
    )
