"""All that the simulated device uses of torch that torch does not promise to keep.

`test_private_torch.py` calls each of them alone, so when torch changes, its name is in the failing test.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

# A mode with this key is taken for FakeTensorMode: no operator under it initialises CUDA.
NO_CUDA_MODE_KEY = torch._C._TorchDispatchModeKey.FAKE

# Methods of a subclass are torch's own, and their results what operators return.
no_torch_function = torch._C._disabled_torch_function_impl

_COMPOSITE = "CompositeImplicitAutograd"
_CUDA, _META = 1, 14  # of c10::DeviceType


@contextmanager
def lists_become_tensors_on_the_host() -> Iterator[None]:
    """``torch.tensor(list, device="cuda")`` makes a host tensor, and copies it by an operator that a mode
    sees."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def allow_cuda_tensors() -> None:
    """Methods such as indexing ask for the guard of a tensor's device, which keeps the current device, before
    any operator is called. A build for CUDA without a driver gets one that does nothing; a build for the CPU
    has none, and is lent that of "meta", which does nothing either."""
    torch._C._ensureCUDADeviceGuardSet()
    guards = _device_guards()
    if guards[_CUDA] is None:
        guards[_CUDA] = guards[_META]


def _device_guards() -> Any:  # noqa: ANN401
    """torch's table of them, a pointer a device type."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    return (ctypes.c_void_p * (_META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")


def wrapper(kind: type[Tensor], inner: Tensor, device: torch.device) -> Any:  # noqa: ANN401
    """A tensor of class `kind` without memory, which says that it is `inner` on `device`."""
    return Tensor._make_wrapper_subclass(
        kind,
        inner.shape,
        strides=inner.stride(),
        storage_offset=inner.storage_offset(),
        dtype=inner.dtype,
        layout=inner.layout,
        device=device,
        requires_grad=False,
    )


def is_composite(operator: OpOverload[..., Any]) -> bool:
    """Whether it is made of other operators alone. In inference mode such operators reach a mode whole."""
    name = operator.name()  # type: ignore[no-untyped-call]
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, _COMPOSITE))


def decomposed(operator: OpOverload[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ANN401
    """What it returns, computed by those; NotImplemented where it has none."""
    return operator.decompose(*args, **kwargs)
