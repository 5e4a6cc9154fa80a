"""The backends on an engine that moves bytes by itself: the pool they allocate, and a pump for its writes."""

from __future__ import annotations

import ctypes
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterable

from ...messages.memory_region import MemoryRegion
from ..copy_plan import Run
from .base import PAGE_ALIGNMENT, Write, WriteResult, anonymous_memory, bounds_error, page_aligned
from .pump import Ended, WritePump


class PumpedBackend(ABC):
    """See TransferBackend. Each kind of engine has its own way to register memory, and to do what the pump
    asks (PumpedEngine)."""

    def __init__(self, name: str, transport: str) -> None:
        self.name = name
        self.transport = transport
        self._pool: mmap.mmap | None = None
        self._pool_bytes = 0
        self._address = 0
        self._is_registered = False
        self._pump = WritePump(name, self)

    @abstractmethod
    def _register(self, num_bytes: int) -> str:
        """Registers so much memory from `_address` on; returns the session by which peers reach it. Raises
        StartupError."""

    @abstractmethod
    def _deregister(self) -> None: ...

    @abstractmethod
    def meet(self, region: MemoryRegion) -> int: ...

    @abstractmethod
    def start(self, write: Write) -> int: ...

    @abstractmethod
    def check(self, transfer: int) -> Ended | None: ...

    @abstractmethod
    def let_go(self, region: MemoryRegion) -> None: ...

    @property
    def num_outstanding(self) -> int:
        return self._pump.num_outstanding

    @property
    def _scratch_address(self) -> int:
        return self._address + page_aligned(self._pool_bytes)

    def allocate(self, num_bytes: int) -> memoryview:
        assert self._pool is None, "allocate is called once"
        self._pool = anonymous_memory(page_aligned(num_bytes) + PAGE_ALIGNMENT)
        self._pool_bytes = num_bytes
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._pool))
        return memoryview(self._pool)[:num_bytes]

    def register(self) -> MemoryRegion:
        assert self._pool is not None, "allocate comes first"
        total_bytes = len(self._pool)
        session = self._register(total_bytes)
        self._is_registered = True
        return MemoryRegion(
            session=session,
            address=self._address,
            num_bytes=total_bytes,
            scratch_address=self._scratch_address,
        )

    def release(self) -> None:
        assert self._pool is not None, "allocate comes first"
        self._withdraw()
        self._pool.madvise(mmap.MADV_DONTNEED)

    def first_contact(self, handle: int, region: MemoryRegion) -> None:
        # TCP may take an unregistered source and RDMA does not: do not let TCP hide it.
        assert self._is_registered, "register comes first"
        self._pump.first_contact(handle, region)

    def submit(self, handle: int, region: MemoryRegion, run: Run) -> None:
        assert self._is_registered, "register comes first"
        if reason := bounds_error(run, region, self._pool_bytes):
            self._pump.refuse(handle, reason)
        else:
            self._pump.submit(handle, region, run)

    def cancel(self, handles: Iterable[int]) -> None:
        self._pump.cancel(handles)

    def disconnect(self, region: MemoryRegion) -> None:
        self._pump.disconnect(region)

    def poll(self) -> list[WriteResult]:
        return self._pump.poll()

    def fileno(self) -> int:
        return self._pump.fileno()

    def stuck_s(self, now: float) -> float:
        return self._pump.stuck_s(now)

    def close(self) -> None:
        if self._pump.close():
            self._close_engine()

    def _close_engine(self) -> None:
        """The engine is not stuck, and nobody else is inside it."""
        self._withdraw()

    def _withdraw(self) -> None:
        if self._is_registered:
            self._deregister()
            self._is_registered = False
