"""Which RDMA devices this machine has."""

from __future__ import annotations

from pathlib import Path

from ...runtime.errors import StartupError

INFINIBAND = Path("/sys/class/infiniband")


def rdma_devices() -> list[str]:
    return sorted(path.name for path in INFINIBAND.glob("*"))


def check_devices(ib_device: str) -> list[str]:
    """The devices here. StartupError when there is none, or a name in `ib_device` is missing."""
    devices = rdma_devices()
    if not devices:
        raise StartupError(
            f"transport rdma was asked for and {INFINIBAND} shows no RDMA device; load the driver, pass "
            "/dev/infiniband into the container, or use --transport tcp"
        )
    wanted = [name.partition(":")[0] for name in ib_device.split(",") if name]
    missing = [name for name in wanted if name not in devices]
    if missing:
        raise StartupError(f"no RDMA device {', '.join(missing)} here; found {', '.join(devices)}")
    return devices
