"""Hand-off by Mooncake's Transfer Engine, over RDMA or TCP.

Built on two calls alone: ``transfer_submit_write`` and ``transfer_check_status``. The second says *pending*
until a write is truly over; Mooncake's blocking calls report a timeout as failure while bytes still fly.

Two facts shape the threads. Every submission takes an engine-wide lock, and meeting a frozen peer holds that
lock for a minute. So submissions are made by the pump, never by the loop; each first contact has a thread of
its own; and while one is inside the engine the pump submits nothing but goes on checking what is in flight,
which needs no lock.

Over TCP the engine listens on all interfaces, whatever host it is given, and lets anyone who reaches its
ports write into registered memory: for trusted networks only.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...messages.peer import MemoryRegion
from ...runtime.errors import StartupError
from ..copy_plan import MAX_RUN_BYTES, Run
from .base import (
    PAGE_ALIGNMENT,
    SCRATCH_BYTES,
    Completions,
    FairQueue,
    Write,
    WriteResult,
    WriteState,
    bounds_error,
    page_aligned,
)

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.0003
MAX_BYTES_IN_FLIGHT = 2 * MAX_RUN_BYTES  # toward one peer: the next run is queued in the engine, no more
SETTLE_S = 2.0
INVALID_BATCH_IDS = (0, (1 << 64) - 1)  # what a refused submission returns; older wheels the second
INFINIBAND = Path("/sys/class/infiniband")


class Engine(Protocol):
    """The part of ``mooncake.engine.TransferEngine`` that is used."""

    def initialize(self, host: str, metadata: str, protocol: str, device: str, /) -> int: ...
    def get_rpc_port(self) -> int: ...
    def register_memory(self, address: int, num_bytes: int, /) -> int: ...
    def unregister_memory(self, address: int, /) -> int: ...
    def transfer_submit_write(self, session: str, local: int, peer: int, num_bytes: int, /) -> int: ...
    def transfer_check_status(self, batch_id: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class _InFlight:
    handle: int
    session: str
    write: Write | None  # None: a first contact


class MooncakeBackend:
    """See TransferBackend."""

    name = "mooncake"
    settle_s = SETTLE_S

    def __init__(self, transport: str, host: str, ib_device: str) -> None:
        self.transport = transport
        self._engine = start_engine(transport, host, ib_device)
        bracketed = f"[{host}]" if ":" in host and not host.startswith("[") else host
        self._session = f"{bracketed}:{self._engine.get_rpc_port()}"
        self._pool: mmap.mmap | None = None
        self._pool_bytes = 0
        self._address = 0
        self._is_registered = False
        self._completions = Completions()
        self._in_flight: dict[int, _InFlight] = {}  # batch id -> ; the pump's own
        self._wake = threading.Condition()
        # What follows is guarded by `_wake`.
        self._queue = FairQueue(MAX_BYTES_IN_FLIGHT)
        self._met: list[tuple[int, _InFlight]] = []  # first contacts on their way to `_in_flight`
        self._outstanding: set[int] = set()
        self._contacts_since: dict[int, float] = {}  # handle -> when its thread entered the engine
        self._submitting_since: float | None = None
        self._closing = False
        self._pump = threading.Thread(target=self._pump_until_closed, name="mooncake-pump", daemon=True)
        self._pump.start()

    @property
    def num_outstanding(self) -> int:
        with self._wake:
            return len(self._outstanding)

    def allocate(self, num_bytes: int) -> memoryview:
        assert self._pool is None, "allocate is called once"
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._pool = mmap.mmap(-1, page_aligned(num_bytes) + PAGE_ALIGNMENT, flags=flags)
        self._pool.madvise(mmap.MADV_DONTFORK)  # a child's copy-on-write would move pages under the device
        self._pool_bytes = num_bytes
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._pool))
        return memoryview(self._pool)[:num_bytes]

    def register(self) -> MemoryRegion:
        assert self._pool is not None, "allocate comes first"
        total_bytes = len(self._pool)
        code = self._engine.register_memory(self._address, total_bytes)
        if code != 0:
            raise StartupError(
                f"mooncake cannot register {total_bytes >> 20} MiB (code {code}); over RDMA this is most "
                "often the limit of locked memory: ulimit -l unlimited"
            )
        self._is_registered = True
        return MemoryRegion(
            session=self._session,
            address=self._address,
            num_bytes=total_bytes,
            scratch_address=self._address + total_bytes - PAGE_ALIGNMENT,
        )

    def first_contact(self, handle: int, region: MemoryRegion) -> None:
        # TCP would take an unregistered source and RDMA would not: do not let TCP hide it.
        assert self._is_registered, "register comes first"
        with self._wake:
            self._outstanding.add(handle)
            self._contacts_since[handle] = time.monotonic()
        name = f"mooncake-contact-{region.session}"
        threading.Thread(target=self._meet, args=(handle, region), name=name, daemon=True).start()

    def submit(self, handle: int, region: MemoryRegion, run: Run) -> None:
        assert self._is_registered, "register comes first"
        reason = bounds_error(run, region, self._pool_bytes)
        if reason:
            self._completions.push(WriteResult(handle, WriteState.FAILED, reason))
            return
        with self._wake:
            self._outstanding.add(handle)
            self._queue.put(Write(handle, region, run))
            self._wake.notify()

    def cancel(self, handles: Iterable[int]) -> None:
        with self._wake:
            cancelled = [handle for handle in handles if self._queue.cancel(handle)]
            self._outstanding.difference_update(cancelled)
        for handle in cancelled:
            self._completions.push(WriteResult(handle, WriteState.CANCELLED, "cancelled"))

    def disconnect(self, region: MemoryRegion) -> None:
        """Nothing to do: the engine keeps a peer's handle for ever, and offers no way to drop it."""

    def poll(self) -> list[WriteResult]:
        return self._completions.drain()

    def fileno(self) -> int:
        return self._completions.fileno()

    def stuck_s(self, now: float) -> float:
        with self._wake:
            since = [*self._contacts_since.values()]
            if self._submitting_since is not None:
                since.append(self._submitting_since)
        return max(0.0, now - min(since)) if since else 0.0

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
            entered_engine = bool(self._contacts_since) or self._submitting_since is not None
        if not entered_engine:  # a stuck engine must not keep the process from ending
            self._pump.join()
            if self._is_registered:
                self._engine.unregister_memory(self._address)
        self._completions.close()

    # ---- a contact's own thread ---------------------------------------------------------------------

    def _meet(self, handle: int, region: MemoryRegion) -> None:
        source = self._address + page_aligned(self._pool_bytes)
        batch_id = self._engine.transfer_submit_write(
            region.session, source, region.scratch_address, SCRATCH_BYTES
        )
        refused = batch_id in INVALID_BATCH_IDS
        with self._wake:
            del self._contacts_since[handle]
            if refused:
                self._outstanding.discard(handle)
            else:
                self._met.append((batch_id, _InFlight(handle, region.session, write=None)))
            self._wake.notify()
        if refused:
            self._completions.push(WriteResult(handle, WriteState.FAILED, _refusal(region.session)))

    # ---- the pump thread ----------------------------------------------------------------------------

    def _pump_until_closed(self) -> None:
        while self._wait_for_work():
            while (write := self._take()) is not None:
                self._start(write)
            self._check_in_flight()

    def _wait_for_work(self) -> bool:
        """Sleeps while there is nothing to do, a moment while there is only something to check."""
        with self._wake:
            if self._in_flight and not self._closing:
                self._wake.wait(CHECK_INTERVAL_S)
            while not (self._closing or self._in_flight or self._met or self._may_submit()):
                self._wake.wait()
            self._in_flight.update(self._met)
            self._met.clear()
            return not self._closing

    def _may_submit(self) -> bool:
        return bool(self._queue) and not self._contacts_since

    def _take(self) -> Write | None:
        with self._wake:
            write = self._queue.take() if self._may_submit() and not self._closing else None
            self._submitting_since = None if write is None else time.monotonic()
            return write

    def _start(self, write: Write) -> None:
        session, run = write.region.session, write.run
        batch_id = self._engine.transfer_submit_write(
            session, self._address + run.source, write.region.address + run.dest, run.num_bytes
        )
        in_flight = _InFlight(write.handle, session, write)
        if batch_id in INVALID_BATCH_IDS:
            self._end(in_flight, WriteState.FAILED, _refusal(session))
        else:
            self._in_flight[batch_id] = in_flight

    def _check_in_flight(self) -> None:
        for batch_id, in_flight in list(self._in_flight.items()):
            status = self._engine.transfer_check_status(batch_id)
            if status == 1:
                del self._in_flight[batch_id]
                self._end(in_flight, WriteState.DONE)
            elif status == -1:
                del self._in_flight[batch_id]
                self._end(in_flight, WriteState.FAILED, f"mooncake could not write to {in_flight.session}")

    def _end(self, ended: _InFlight, state: WriteState, reason: str = "") -> None:
        with self._wake:
            self._outstanding.discard(ended.handle)
            if ended.write is not None:
                self._queue.finished(ended.write)
        self._completions.push(WriteResult(ended.handle, state, reason))


def start_engine(transport: str, host: str, ib_device: str) -> Engine:
    """An engine that uses `transport`, or StartupError: Mooncake itself falls back to TCP in silence."""
    devices = sorted(path.name for path in INFINIBAND.glob("*"))
    if transport == "rdma":
        _check_devices(devices, ib_device)
        os.environ.pop("MC_FORCE_TCP", None)
    else:
        os.environ["MC_FORCE_TCP"] = "1"
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    engine_type = _import_engine()
    with _captured_stderr() as lines:
        engine = engine_type()
        code = engine.initialize(host, "P2PHANDSHAKE", transport, ib_device)
    if code != 0:
        raise StartupError(
            f"mooncake cannot start on {host} (code {code}): {'; '.join(lines) or 'no reason'}"
        )
    for line in lines:
        logger.debug("mooncake: %s", line)
    if transport == "rdma" and not _holds_verbs_device():
        raise StartupError(
            f"transport rdma was asked for, devices {', '.join(devices)} exist, and mooncake came up without "
            f"them: check that /dev/infiniband is accessible here; or use --transport tcp"
        )
    return engine


def _check_devices(devices: list[str], ib_device: str) -> None:
    if not devices:
        raise StartupError(
            f"transport rdma was asked for and {INFINIBAND} shows no RDMA device; load the driver, pass "
            "/dev/infiniband into the container, or use --transport tcp"
        )
    missing = [name for name in ib_device.split(",") if name and name not in devices]
    if missing:
        raise StartupError(f"no RDMA device {', '.join(missing)} here; found {', '.join(devices)}")


def _import_engine() -> type[Engine]:
    try:
        from mooncake.engine import TransferEngine
    except ModuleNotFoundError:
        raise StartupError(
            "transfer backend mooncake needs its wheel: pip install mooncake-transfer-engine-non-cuda "
            "(mooncake-transfer-engine for CUDA 12, -cuda13 for CUDA 13)"
        ) from None
    except ImportError as error:
        raise StartupError(
            f"mooncake cannot be loaded ({error}): apt-get install libibverbs1 librdmacm1 libnuma1; "
            "a missing libcudart means that the CUDA wheel is installed on a machine without CUDA"
        ) from None
    engine_type: type[Engine] = TransferEngine
    return engine_type


def _holds_verbs_device() -> bool:
    """Whether this process has an RDMA device open: what an engine on RDMA does, and one on TCP does not."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith("/dev/infiniband/uverbs"):
                return True
    return False


@contextlib.contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """Collects what native code writes to stderr meanwhile: the engine warns of things that are normal."""
    lines: list[str] = []
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            lines.extend(file.read().decode(errors="replace").splitlines())


def _refusal(session: str) -> str:
    return f"mooncake refused to write to {session}: it cannot be reached, or its port had another owner"
