"""The backends on an engine that moves bytes by itself: the pool they allocate, and a pump for its writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from ...messages.memory_region import MemoryRegion
from ..copy_plan import Run
from ..pool_memory import PoolMemory, host_memory
from .base import PAGE_ALIGNMENT, Write, WriteResult, bounds_error, page_aligned
from .pump import Ended, WritePump


class PumpedBackend(ABC):
    """See TransferBackend. Each kind of engine has its own way to register memory, and to do what the pump
    asks (PumpedEngine)."""

    def __init__(self, name: str, transport: str) -> None:
        self.name = name
        self.transport = transport
        self._pool: PoolMemory | None = None
        self._pool_bytes = 0
        self._is_registered = False
        self._pump = WritePump(name, self)

    @abstractmethod
    def _register(self, memory: PoolMemory) -> str:
        """Registers all of it; returns the session by which peers reach it. Raises StartupError."""

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
    def _address(self) -> int:
        assert self._pool is not None, "allocate or adopt comes first"
        return self._pool.address

    @property
    def _scratch_address(self) -> int:
        return self._address + page_aligned(self._pool_bytes)

    def allocate(self, num_bytes: int) -> memoryview:
        memory = host_memory(page_aligned(num_bytes) + PAGE_ALIGNMENT)
        self.adopt(memory, num_bytes)
        assert memory.view is not None, "the host's memory has a view"
        return memory.view[:num_bytes]

    def adopt(self, memory: PoolMemory, pool_bytes: int) -> None:
        """Takes the pool's memory as the device gave it, once: `pool_bytes` and a page behind them for the
        first contact. Raises ValueError."""
        assert self._pool is None, "there is one pool"
        needed_bytes = page_aligned(pool_bytes) + PAGE_ALIGNMENT
        if memory.num_bytes < needed_bytes:
            raise ValueError(f"{memory.num_bytes} bytes of memory for a pool that needs {needed_bytes}")
        self._pool, self._pool_bytes = memory, pool_bytes

    def register(self) -> MemoryRegion:
        assert self._pool is not None, "allocate or adopt comes first"
        session = self._register(self._pool)
        self._is_registered = True
        return MemoryRegion(
            session=session,
            address=self._address,
            num_bytes=self._pool.num_bytes,
            scratch_address=self._scratch_address,
        )

    def release(self) -> None:
        assert self._pool is not None, "allocate or adopt comes first"
        self._withdraw()
        self._pool.give_back()

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
