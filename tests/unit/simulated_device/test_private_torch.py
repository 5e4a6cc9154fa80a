"""What torch does not promise: a test that fails here names what a new torch has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pdserve.tests.simulated_device import private_torch

CUDA = torch.device("cuda", 0)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators, and returns host tensors for all of them."""

    _mode_key = private_torch.NO_CUDA_MODE_KEY

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Any] = []
        self.devices: list[Any] = []

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Sequence[type],
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        kwargs = dict(kwargs or {})
        self.operators.append(func)
        self.devices.append(kwargs.get("device"))
        return func(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})


class Wrapped(Tensor):
    __torch_function__ = private_torch.no_torch_function  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,  # noqa: ANN401
        *_: object,
    ) -> None:
        raise ReachedError(str(func))


class ReachedError(Exception):
    """An operator came this far."""


def test_a_mode_with_fakes_key_sees_tensors_made_on_cuda_where_there_is_none() -> None:
    with Recorder() as seen:
        torch.zeros(2, device=CUDA)
    assert seen.devices == [CUDA]


def test_a_list_becomes_a_tensor_on_the_host_and_then_moves() -> None:
    with private_torch.lists_become_tensors_on_the_host(), Recorder() as seen:
        torch.tensor([1, 2], device=CUDA)
    assert torch.ops.aten._to_copy.default in seen.operators


def test_methods_find_a_guard_of_the_device() -> None:
    private_torch.allow_cuda_tensors()
    with torch.inference_mode():
        wrapper = private_torch.wrapper(Wrapped, torch.ones(2, 2, dtype=torch.int64), CUDA)
        with pytest.raises(ReachedError, match="bitwise_not"):
            _ = ~wrapper
        with pytest.raises(ReachedError, match="select"):
            _ = wrapper[0]


def test_a_wrapper_has_no_memory_and_the_shape_strides_and_device_that_it_is_told() -> None:
    inner = torch.arange(12).view(3, 4)[:, 1:]
    wrapper = private_torch.wrapper(Wrapped, inner, CUDA)
    assert (type(wrapper), wrapper.device, wrapper.dtype) == (Wrapped, CUDA, torch.int64)
    assert (wrapper.shape, wrapper.stride(), wrapper.storage_offset()) == ((3, 3), (4, 1), 1)


def test_composite_operators_are_told_from_others_and_come_apart() -> None:
    softmax = torch.ops.aten.log_softmax.int
    assert private_torch.is_composite(softmax)
    assert not private_torch.is_composite(torch.ops.aten.add.Tensor)
    x = torch.randn(2, 3)
    assert torch.equal(private_torch.decomposed(softmax, (x, -1), {}), x.log_softmax(-1))


def test_inference_mode_hands_composite_operators_over_whole() -> None:
    with torch.inference_mode(), Recorder() as seen:
        torch.zeros(3).log_softmax(-1)
    assert torch.ops.aten.log_softmax.int in seen.operators
