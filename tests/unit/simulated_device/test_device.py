from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pdserve.kernels.rms_norm import rms_norm
from pdserve.tests.simulated_device import (
    DEVICE,
    Kind,
    MixedDevicesError,
    SimulatedDevice,
    to_device,
    to_host,
)


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with torch.inference_mode(), SimulatedDevice() as device:
        yield device


def test_values_are_those_of_the_host(device: SimulatedDevice) -> None:
    host = torch.randn(4, 5)
    there: Tensor = to_device(host)
    there += 1
    there[2] = 7.0
    there[:, 0] = there[:, 1]
    there[torch.tensor([0, 1], device=DEVICE), 2] = -1.0
    host += 1
    host[2] = 7.0
    host[:, 0] = host[:, 1]
    host[torch.tensor([0, 1]), 2] = -1.0
    assert there.device == there.softmax(-1).device == torch.empty_like(there).device == DEVICE
    assert there.new_full((2,), 1).device == there[1:].T.device == DEVICE
    assert torch.equal(to_host(there.softmax(-1)), host.softmax(-1))


def test_an_operator_in_place_returns_the_tensor_it_was_given(device: SimulatedDevice) -> None:
    there = to_device(torch.ones(3))
    assert there.mul_(2) is there
    assert there.is_cuda


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "int": lambda x: int(x.amax()),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: torch.unique(x),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
}
COPIES: dict[str, Callable[[Tensor], Any]] = {
    "cpu": lambda x: x.cpu(),
    "to": lambda x: torch.ones(3).to(x.device),
    "from a list": lambda x: torch.tensor([1, 2], device=x.device),
    "copy_": lambda x: x.copy_(torch.ones(3)),
    "a slice": lambda x: x.__setitem__(slice(None), torch.ones(3)),
    "list as an index": lambda x: x[[0, 2]],
    "host index": lambda x: x[torch.tensor([0, 2])],
}


@pytest.mark.parametrize("name", READS)
def test_a_host_read_is_found(device: SimulatedDevice, name: str) -> None:
    READS[name](to_device(torch.tensor([1.0, 2.0, 0.0])))
    assert [found.kind for found in device.findings] == [Kind.HOST_READ]


@pytest.mark.parametrize("name", COPIES)
def test_a_blocking_copy_is_found(device: SimulatedDevice, name: str) -> None:
    COPIES[name](to_device(torch.tensor([1.0, 2.0, 0.0])))
    assert [found.kind for found in device.findings] == [Kind.BLOCKING_COPY]


def test_a_copy_that_is_not_waited_for_is_none(device: SimulatedDevice) -> None:
    there = torch.ones(3).to(DEVICE, non_blocking=True)
    there.copy_(torch.zeros(3), non_blocking=True)
    there.to("cpu", non_blocking=True)
    assert device.findings == []


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, host: x + host,
        lambda x, host: host[x.long()],
        lambda x, host: torch.nn.functional.embedding(host.long(), x[:, None]),
        lambda x, host: x.__setitem__(x.long(), host),
    ],
)
def test_tensors_of_two_devices_are_refused(
    device: SimulatedDevice, mix: Callable[[Tensor, Tensor], Any]
) -> None:
    with pytest.raises(MixedDevicesError):
        mix(to_device(torch.ones(3)), torch.ones(3))
    assert [found.kind for found in device.findings] == [Kind.MIXED_DEVICES]


def test_a_number_goes_with_any_device(device: SimulatedDevice) -> None:
    assert torch.equal(to_host(to_device(torch.ones(3)) * torch.tensor(2.0)), torch.full((3,), 2.0))
    assert device.findings == []


def test_a_finding_says_where_in_the_product(device: SimulatedDevice) -> None:
    with pytest.raises(MixedDevicesError):
        rms_norm(to_device(torch.ones(2, 4)), torch.ones(4), 1e-6)
    (found,) = device.findings
    assert (found.place.file, found.place.function) == ("kernels/rms_norm/eager.py", "rms_norm")
    assert f"eager.py:{found.place.line} " in str(found)
    assert str(found.place.line) not in found.summary
