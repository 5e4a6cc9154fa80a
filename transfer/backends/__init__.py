"""Transfer backends: one small protocol, one file each."""

from __future__ import annotations

from ...runtime.errors import StartupError
from ...runtime.timing import UNSCALED, Timing
from .base import TransferBackend

TRANSPORTS = {"shm": ("shm",), "mooncake": ("tcp", "rdma"), "nixl": ("tcp", "rdma")}


def create_backend(
    name: str,
    transport: str,
    host: str,
    ib_device: str = "",
    faults: str = "",
    timing: Timing = UNSCALED,
) -> TransferBackend:
    """The backend that was asked for, on the transport that was asked for, or StartupError.

    `host` is the address by which peers reach this node; `ib_device` a comma-separated choice of RDMA
    devices, all when empty; `faults` a plan of what goes wrong on purpose (`FaultPlan.parse`).
    """
    if name not in TRANSPORTS:
        raise StartupError(f"no transfer backend {name!r}; there are {', '.join(TRANSPORTS)}")
    if transport not in TRANSPORTS[name]:
        raise StartupError(f"transfer backend {name} has no transport {transport!r}, only {TRANSPORTS[name]}")
    if not faults:
        return _create(name, transport, host, ib_device, timing.settle_s)
    from .faulty import FaultPlan, FaultyBackend

    plan = FaultPlan.parse(faults)  # before anything is opened
    return FaultyBackend(_create(name, transport, host, ib_device, timing.settle_s), plan)


def _create(name: str, transport: str, host: str, ib_device: str, settle_s: float) -> TransferBackend:
    if name == "shm":
        from .shm import ShmBackend

        return ShmBackend()
    if name == "nixl":
        from .nixl import NixlBackend

        return NixlBackend(transport, ib_device, settle_s=settle_s)
    from .mooncake import MooncakeBackend

    return MooncakeBackend(transport, host, ib_device, settle_s=settle_s)
