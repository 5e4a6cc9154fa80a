"""A device that is not the host's, without one: its tensors say ``cuda:0`` and hold real values, so what is
computed on it can be compared with the CPU's bit for bit. Every time that the host waits for it is written
down, and operators on tensors of both are refused.

    with SimulatedDevice() as device:
        x = torch.zeros(4, device=DEVICE)
        x.sum().item()
    device.findings  # a host read, and the file, line and function of pdserve that made it

Everything in it is created under `torch.inference_mode`, as a forward is.
"""

from .device import DEVICE, SimulatedDevice, SimulatedTensor, to_device, to_host
from .findings import Finding, Kind, MixedDevicesError
from .runtime import SimulatedRuntime

__all__ = [
    "DEVICE",
    "Finding",
    "Kind",
    "MixedDevicesError",
    "SimulatedDevice",
    "SimulatedRuntime",
    "SimulatedTensor",
    "to_device",
    "to_host",
]
