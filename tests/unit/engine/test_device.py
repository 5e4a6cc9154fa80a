"""What a device is asked for, and how a step's numbers reach one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pdserve.engine.device import HOST, create_runtime
from pdserve.engine.step_inputs import staged
from pdserve.engine.tensor_tree import map_tensors, tensors_of
from pdserve.runtime.errors import StartupError
from pdserve.tests.simulated_device import DEVICE, SimulatedDevice, SimulatedRuntime, to_host


@dataclass(frozen=True)
class Inner:
    names: tuple[str, ...]
    values: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    ids: Tensor
    parts: tuple[Inner, ...]
    missing: Tensor | None = None


STEP = Step(
    ids=torch.tensor([[3, -1, 1 << 40]]),
    parts=(
        Inner(("odd",), torch.tensor([1.5, -2.0, float("inf")])),
        Inner(("empty",), torch.tensor([], dtype=torch.int64)),
        Inner(("a column",), torch.arange(6.0).view(3, 2)[:, 1]),
    ),
)


def test_tensors_of_a_tree_are_found_and_changed_in_its_order() -> None:
    found = tensors_of(STEP)
    assert [tensor.numel() for tensor in found] == [3, 3, 0, 3]
    doubled = map_tensors(STEP, lambda tensor: tensor * 2)
    assert [torch.equal(a, b * 2) for a, b in zip(tensors_of(doubled), found, strict=True)] == [True] * 4
    assert (doubled.parts[0].names, doubled.missing) == (("odd",), None)


def test_on_the_host_a_step_is_used_as_it_is() -> None:
    assert staged(STEP, HOST) is STEP


def test_a_step_reaches_a_device_by_one_copy() -> None:
    runtime = SimulatedRuntime()
    with torch.inference_mode(), SimulatedDevice() as device:
        there = staged(STEP, runtime)
    assert runtime.num_staged == 1
    assert device.findings == []
    for ours, its in zip(tensors_of(STEP), tensors_of(there), strict=True):
        assert its.device == DEVICE
        assert its.dtype == ours.dtype
        assert torch.equal(to_host(its), ours)


def test_the_host_stages_a_copy_and_has_results_at_once() -> None:
    packed = torch.arange(8, dtype=torch.uint8).numpy()
    there = HOST.stage(packed)
    packed.fill(0)
    assert there.tolist() == list(range(8))
    assert HOST.read_back([there]).take()[0] is there


@pytest.mark.parametrize("wanted", ["auto", "cpu"])
def test_the_processor_is_chosen(wanted: str) -> None:
    assert create_runtime(wanted).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("num_gpus", "wanted", "told"),
    [(0, "cuda", "no GPU"), (0, "cuda:0", "no GPU"), (2, "cuda:2", "2 GPUs")],
)
def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, wanted: str, told: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(StartupError, match=rf"--device {wanted}: torch .* sees {told} here; leave it out"):
        create_runtime(wanted)


@pytest.mark.parametrize(("wanted", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch, wanted: str, index: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    runtime = create_runtime(wanted)
    assert (runtime.device, runtime.is_host) == (torch.device("cuda", index), False)
    assert "bfloat16" in runtime.dtypes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_numbers_travel_to_a_gpu_and_back() -> None:
    runtime = create_runtime("cuda")
    there = staged(STEP, runtime)
    sums = [tensor + tensor for tensor in tensors_of(there)]
    for ours, its in zip(tensors_of(STEP), runtime.read_back(sums).take(), strict=True):
        assert torch.equal(ours + ours, its)
