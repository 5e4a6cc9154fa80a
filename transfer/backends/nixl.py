"""Hand-off by NVIDIA's NIXL, on its UCX plugin, over TCP or RDMA.

A peer is met by its agent's metadata, which travels in the region's session: addresses, ports and memory
keys. UCX would choose among all the transports it finds: UCX_TLS is set to the one that was asked for, so
that nothing else can be used, and a machine without it does not start.

NIXL's agent has a thread of its own that serves incoming writes; over TCP nothing lands without it. As
NIXL's own Python class starts it, it spins (half a core, measured); with a delay it sleeps on UCX's
descriptors, writes take the same time, and an idle process stays under 1 % of a core. That class does not
let the delay be set, so the bindings below it are used.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import importlib
import itertools
import os
import uuid
from types import ModuleType
from typing import Any

from ...messages.memory_region import MemoryRegion
from ...runtime.errors import StartupError
from ..pool_memory import PoolMemory
from .base import SCRATCH_BYTES, Write, WriteState
from .devices import check_devices, rdma_devices
from .pump import Ended, RefusedError
from .pumped import PumpedBackend

UCX_TRANSPORTS = {"tcp": "tcp", "rdma": "rc"}  # rc: reliable connections over verbs, and what sets them up
BINDINGS = (
    "nixl_cu12._bindings",
    "nixl_cu13._bindings",
)  # one wheel per CUDA version; either works without CUDA
PROGRESS_DELAY_US = 10_000
NAME_PREFIX = "pdserve-"


class NixlBackend(PumpedBackend):
    """See TransferBackend. NIXL's errors have no class in common but Exception."""

    def __init__(self, transport: str, ib_device: str, *, settle_s: float) -> None:
        self.settle_s = settle_s
        self._bindings = import_bindings()
        self._agent_name = f"{NAME_PREFIX}{uuid.uuid4().hex}"
        self._agent, self._ucx = start_agent(self._bindings, self._agent_name, transport, ib_device)
        self._registered: Any = None  # NIXL's list of what was registered
        self._numbers = itertools.count()
        self._transfers: dict[int, Any] = {}  # number -> NIXL's handle
        super().__init__("nixl", transport)

    def _register(self, memory: PoolMemory) -> str:
        if not memory.is_host:
            raise StartupError(
                "transfer backend nixl moves the host's memory only; use --transfer-backend mooncake"
            )
        listed = self._bindings.nixlRegDList(
            self._bindings.DRAM_SEG, [(memory.address, memory.num_bytes, 0, "")]
        )
        try:
            self._agent.registerMem(listed, [self._ucx])
        except Exception as error:
            raise StartupError(
                f"nixl cannot register {memory.num_bytes >> 20} MiB ({error}); over RDMA this is most often "
                "the limit of locked memory: ulimit -l unlimited"
            ) from None
        self._registered = listed
        metadata = base64.b64encode(self._agent.getLocalMD()).decode()
        return f"{self._agent_name} {metadata}"

    def _deregister(self) -> None:
        self._agent.deregisterMem(self._registered, [self._ucx])

    def _close_engine(self) -> None:
        for transfer in self._transfers.values():
            self._release(transfer)
        self._transfers.clear()
        super()._close_engine()
        self._agent = None  # over TCP its end is what keeps further writes out: a taken-back key does not

    # ---- what the pump asks (Mover) -----------------------------------------------------------------

    def meet(self, region: MemoryRegion) -> int:
        name, metadata = _split(region.session)
        try:
            met = self._agent.loadRemoteMD(metadata)
        except Exception as error:
            raise RefusedError(f"nixl cannot take the metadata of {name}: {error}") from None
        if met.decode() != name:
            raise RefusedError(f"the metadata of {name} is that of another agent")
        return self._post(name, self._scratch_address, region.scratch_address, SCRATCH_BYTES)

    def start(self, write: Write) -> int:
        name, _ = _split(write.region.session)
        run = write.run
        return self._post(name, self._address + run.source, write.region.address + run.dest, run.num_bytes)

    def check(self, transfer: int) -> Ended | None:
        try:
            status = self._agent.getXferStatus(self._transfers[transfer])
        except Exception as error:
            self._release(self._transfers.pop(transfer))
            return Ended(WriteState.FAILED, f"nixl could not write to the peer: {error}")
        if status == self._bindings.NIXL_IN_PROG:
            return None
        self._release(self._transfers.pop(transfer))
        return Ended(WriteState.DONE)

    def let_go(self, region: MemoryRegion) -> None:
        name, _ = _split(region.session)
        with contextlib.suppress(Exception):  # a peer that was never met, or whose end NIXL saw itself
            self._agent.invalidateRemoteMD(name)

    def _post(self, name: str, source: int, dest: int, num_bytes: int) -> int:
        bindings = self._bindings
        try:
            transfer = self._agent.createXferReq(
                bindings.NIXL_WRITE,
                bindings.nixlXferDList(bindings.DRAM_SEG, [(source, num_bytes, 0)]),
                bindings.nixlXferDList(bindings.DRAM_SEG, [(dest, num_bytes, 0)]),
                name,
                b"",
                [self._ucx],
            )
        except Exception as error:
            raise RefusedError(f"nixl refused to write to {name}: {error}") from None
        number = next(self._numbers)
        self._transfers[number] = transfer
        # A failure to post shows in the status, where every other failure does: something may have been sent.
        with contextlib.suppress(Exception):
            self._agent.postXferReq(transfer, b"")
        return number

    def _release(self, transfer: Any) -> None:  # noqa: ANN401  NIXL has no types
        with contextlib.suppress(Exception):  # it keeps what it cannot end, and ends it with the agent
            self._agent.releaseXferReq(transfer)


def start_agent(bindings: ModuleType, name: str, transport: str, ib_device: str) -> tuple[Any, int]:
    """An agent whose UCX can use `transport` alone, with UCX's handle; or StartupError."""
    if transport == "rdma":
        check_devices(ib_device)
    os.environ["UCX_TLS"] = UCX_TRANSPORTS[transport]
    if transport == "rdma" and ib_device:
        os.environ["UCX_NET_DEVICES"] = ",".join(
            device if ":" in device else f"{device}:1" for device in ib_device.split(",") if device
        )
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    config = bindings.nixlAgentConfig()
    config.useProgThread = True
    config.pthrDelay = PROGRESS_DELAY_US
    config.syncMode = bindings.NIXL_THREAD_SYNC_STRICT  # a contact's thread calls beside the pump's
    try:
        agent = bindings.nixlAgent(name, config)
        return agent, agent.createBackend("UCX", {})
    except Exception as error:
        tls, found = os.environ["UCX_TLS"], ", ".join(rdma_devices()) or "none"
        raise StartupError(
            f"nixl cannot start UCX with UCX_TLS={tls} ({error}); RDMA devices here: {found}"
        ) from None


def import_bindings() -> ModuleType:
    reasons = []
    for module in BINDINGS:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        except ImportError as error:
            reasons.append(f"{module}: {error}")
    if reasons:
        raise StartupError(f"nixl cannot be loaded ({'; '.join(reasons)})")
    raise StartupError(
        "transfer backend nixl needs its wheel: pip install 'pdserve[nixl]' (nixl-cu12; nixl-cu13 on CUDA 13)"
    )


def _split(session: str) -> tuple[str, bytes]:
    """An agent's name and metadata."""
    name, _, encoded = session.partition(" ")
    try:
        return name, base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise RefusedError(f"the session of {name[:80]} is not one of nixl's") from None
