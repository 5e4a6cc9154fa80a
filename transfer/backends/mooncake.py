"""Hand-off by Mooncake's Transfer Engine, over RDMA or TCP.

Built on two calls alone: ``transfer_submit_write`` and ``transfer_check_status``. The second says *pending*
until a write is truly over; Mooncake's blocking calls report a timeout as failure while bytes still fly.

Every submission takes an engine-wide lock, and meeting a frozen peer holds it for a minute; checking takes
none. `pump.py` is shaped by that.

Over TCP the engine listens on all interfaces, whatever host it is given, and lets anyone who reaches its
ports write into registered memory: for trusted networks only.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ...messages.memory_region import MemoryRegion
from ...runtime.errors import StartupError
from ..pool_memory import PoolMemory
from .base import SCRATCH_BYTES, Write, WriteState
from .devices import check_devices, rdma_devices
from .pump import Ended, RefusedError
from .pumped import PumpedBackend

logger = logging.getLogger(__name__)

INVALID_BATCH_IDS = (0, (1 << 64) - 1)  # what a refused submission returns; older wheels the second

# Lines of the engine's log while it starts.
INSTALLED_TRANSPORT = re.compile(r"installTransport, type=(\w+)")
OPENED_DEVICE = re.compile(r"RDMA device: (\w+), .*?GID: (.+)")
GLOG_LEVELS = {"TRACE": 0, "INFO": 0, "WARNING": 1, "ERROR": 2}
GLOG_LEVEL_SYMBOL = "_ZN3fLI17FLAGS_minloglevelE"
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # torch reads both
_starting = threading.Lock()


class Engine(Protocol):
    """The part of ``mooncake.engine.TransferEngine`` that is used."""

    def initialize(self, host: str, metadata: str, protocol: str, device: str, /) -> int: ...
    def get_rpc_port(self) -> int: ...
    def register_memory(self, address: int, num_bytes: int, /) -> int: ...
    def unregister_memory(self, address: int, /) -> int: ...
    def transfer_submit_write(self, session: str, local: int, peer: int, num_bytes: int, /) -> int: ...
    def transfer_check_status(self, batch_id: int, /) -> int: ...


class MooncakeBackend(PumpedBackend):
    """See TransferBackend."""

    def __init__(self, transport: str, host: str, ib_device: str, *, settle_s: float) -> None:
        self.settle_s = settle_s
        self._engine = start_engine(transport, host, ib_device)
        bracketed = f"[{host}]" if ":" in host and not host.startswith("[") else host
        self._session = f"{bracketed}:{self._engine.get_rpc_port()}"
        super().__init__("mooncake", transport)

    def _register(self, memory: PoolMemory) -> str:
        if not memory.is_host and (reason := device_refusal()):
            raise StartupError(reason)
        code = self._engine.register_memory(memory.address, memory.num_bytes)
        if code != 0:
            raise StartupError(
                f"mooncake cannot register {memory.num_bytes >> 20} MiB (code {code}); over RDMA this is "
                "most often the limit of locked memory: ulimit -l unlimited"
            )
        return self._session

    def _deregister(self) -> None:
        self._engine.unregister_memory(self._address)

    # ---- what the pump asks (Mover) -----------------------------------------------------------------

    def meet(self, region: MemoryRegion) -> int:
        return self._submit(region.session, self._scratch_address, region.scratch_address, SCRATCH_BYTES)

    def start(self, write: Write) -> int:
        run = write.run
        source, dest = self._address + run.source, write.region.address + run.dest
        return self._submit(write.region.session, source, dest, run.num_bytes)

    def check(self, transfer: int) -> Ended | None:
        status = self._engine.transfer_check_status(transfer)
        if status == 1:
            return Ended(WriteState.DONE)
        if status == -1:
            return Ended(WriteState.FAILED, "mooncake could not write to the peer")
        return None

    def let_go(self, region: MemoryRegion) -> None:
        """Nothing to do: the engine keeps a peer's handle for ever, and offers no way to drop it."""

    def _submit(self, session: str, source: int, dest: int, num_bytes: int) -> int:
        batch_id = self._engine.transfer_submit_write(session, source, dest, num_bytes)
        if batch_id in INVALID_BATCH_IDS:
            raise RefusedError(
                f"mooncake refused to write to {session}: it cannot be reached, or its port had another owner"
            )
        return batch_id


def start_engine(transport: str, host: str, ib_device: str) -> Engine:
    """An engine that uses `transport`, or StartupError: Mooncake itself falls back to TCP in silence."""
    if transport == "rdma":
        check_devices(ib_device)
        os.environ.pop("MC_FORCE_TCP", None)
    else:
        os.environ["MC_FORCE_TCP"] = "1"
    engine_type = _import_engine()
    # A process may start several; what is captured here is the process's.
    with _starting, _informative_log(), _captured_stderr() as lines:
        engine = engine_type()
        code = engine.initialize(host, "P2PHANDSHAKE", transport, ib_device)
    for line in lines:
        logger.debug("mooncake: %s", line)
    if code != 0:
        reason = "; ".join(line for line in lines if line.startswith(("E", "W"))) or "no reason"
        raise StartupError(f"mooncake cannot start on {host} (code {code}): {reason}")
    if transport == "rdma":
        check_verbs_in_use(lines, rdma_devices())
    return engine


def device_refusal() -> str:
    """Why a device's memory cannot be registered here; empty when it can."""
    if not supports_cuda():
        return (
            "this wheel of mooncake moves the host's memory only: pip install "
            "mooncake-transfer-engine-cuda13 (mooncake-transfer-engine for CUDA 12) in its place"
        )
    for name in ALLOCATOR_SETTINGS:
        if "expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", ""):
            return f"{name} has expandable_segments, which changes what lies behind an address: leave it out"
    return ""


def supports_cuda() -> bool:
    from mooncake import engine

    return bool(engine.SUPPORT_CUDA)


def check_verbs_in_use(log: list[str], devices: list[str]) -> None:
    """Raises StartupError unless the engine's own log says that it installed RDMA, and nothing beside it."""
    text = "\n".join(log)
    installed = set(INSTALLED_TRANSPORT.findall(text))
    if installed == {"rdma"}:
        for device, gid in OPENED_DEVICE.findall(text):
            logger.info("mooncake uses RDMA device %s, GID %s", device, gid)
        return
    raise StartupError(
        f"transport rdma was asked for, devices {', '.join(devices)} exist, and mooncake came up without "
        f"them{_also(installed)}: check that /dev/infiniband is accessible here; or use --transport tcp"
    )


def _also(installed: set[str]) -> str:
    return f" (on {', '.join(sorted(installed))})" if installed else ""


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


@contextlib.contextmanager
def _informative_log() -> Iterator[None]:
    """Meanwhile the engine says what it does; before and after only what MC_LOG_LEVEL asks for.

    It reads MC_LOG_LEVEL once in the life of a process; from then on glog's own variable holds the level.
    """
    wanted = os.environ.get("MC_LOG_LEVEL", "ERROR").upper()
    level = _glog_level()
    os.environ["MC_LOG_LEVEL"] = "INFO"
    level.value = GLOG_LEVELS["INFO"]
    try:
        yield
    finally:
        os.environ["MC_LOG_LEVEL"] = wanted
        level.value = GLOG_LEVELS.get(wanted, GLOG_LEVELS["ERROR"])


def _glog_level() -> ctypes.c_int:
    """The level below which glog, as loaded with the engine, drops a line."""
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            path = line.rstrip("\n").split(maxsplit=5)[5:]
            if path and Path(path[0]).name.startswith("libglog"):
                return ctypes.c_int.in_dll(ctypes.CDLL(path[0]), GLOG_LEVEL_SYMBOL)
    return ctypes.c_int()  # linked in otherwise: the level cannot be reached, and the environment decides


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
