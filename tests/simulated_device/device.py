"""The tensors, and the mode that computes on what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from . import private_torch
from .findings import Finding, Kind, MixedDevicesError, here

DEVICE = torch.device("cuda", 0)
_HOST = torch.device("cpu")
_aten = torch.ops.aten

# Operators whose result, or its shape, depends on values: the host waits for them.
_HOST_READS = {
    _aten._local_scalar_dense.default,
    _aten.item.default,
    _aten.is_nonzero.default,
    _aten.nonzero.default,
    _aten.nonzero_numpy.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten.bincount.default,
    _aten.repeat_interleave.Tensor,
}

_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}

# Made of others, and computed whole: by what the CPU path computes them with, so that the bits are the same.
_WHOLE = {
    _aten.linear.default,
    _aten.matmul.default,
    _aten.scaled_dot_product_attention.default,
    _aten.rms_norm.default,
}


class SimulatedTensor(Tensor):
    """Says that it is on DEVICE. `held` is a tensor of the host with the same shape, strides and values."""

    held: Tensor
    __torch_function__ = private_torch.no_torch_function  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[SimulatedTensor], held: Tensor) -> SimulatedTensor:
        tensor: SimulatedTensor = private_torch.wrapper(cls, held, DEVICE)
        tensor.held = held
        return tensor

    def tolist(self) -> Any:  # noqa: ANN401
        _found(Kind.HOST_READ, "tolist")
        return self.held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: OpOverload[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        return _run(func, args, kwargs or {})


def to_device(host: Tensor) -> SimulatedTensor:
    """A copy of it there; no finding."""
    return SimulatedTensor(host.detach().clone())


def to_host(tensor: Tensor) -> Tensor:
    """What it holds; no finding."""
    return tensor.held if isinstance(tensor, SimulatedTensor) else tensor


_current: list[SimulatedDevice] = []  # those entered, the innermost last


class SimulatedDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered there is a DEVICE. `findings`: what would have made the host wait, in order."""

    _mode_key = private_torch.NO_CUDA_MODE_KEY

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.findings: list[Finding] = []
        self._undo = ExitStack()

    def __enter__(self) -> SimulatedDevice:
        private_torch.allow_cuda_tensors()
        self._undo.enter_context(private_torch.lists_become_tensors_on_the_host())
        self._undo.enter_context(_entered(self))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        self._undo.close()

    def __torch_dispatch__(
        self,
        func: OpOverload[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func not in _HOST_READS and func not in _WHOLE and private_torch.is_composite(func):
            with self._again():
                result = private_torch.decomposed(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return _run(func, args, kwargs)

    @contextmanager
    def _again(self) -> Iterator[None]:
        """The mode is off while it handles an operator; for the parts of one it is to be on."""
        TorchDispatchMode.__enter__(self)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)  # type: ignore[no-untyped-call]


@contextmanager
def _entered(device: SimulatedDevice) -> Iterator[None]:
    _current.append(device)
    try:
        yield
    finally:
        _current.remove(device)


def _found(kind: Kind, operator: str) -> None:
    if _current:
        _current[-1].findings.append(Finding(kind, operator, here()))


def _mixed(operator: str) -> MixedDevicesError:
    _found(Kind.MIXED_DEVICES, operator)
    return MixedDevicesError(f"{operator}: tensors of two devices")


def _unwrapped(value: Any) -> Any:  # noqa: ANN401
    return tree_map(to_host, value) if isinstance(value, tuple | list | dict) else to_host(value)


def _wrapped(value: Any) -> Any:  # noqa: ANN401
    def wrap(leaf: object) -> object:
        return SimulatedTensor(leaf) if type(leaf) is Tensor else leaf

    return tree_map(wrap, value)


def _check_index(indices: Sequence[Tensor | None]) -> None:
    """A list or a tensor of the host is copied to the device first, and a mask is counted on the host."""
    for index in indices:
        if isinstance(index, SimulatedTensor):
            if index.dtype in (torch.bool, torch.uint8):
                _found(Kind.HOST_READ, "a mask as an index")
        elif index is not None:
            _found(Kind.BLOCKING_COPY, "an index of the host")


def _run(func: OpOverload[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    if func in _HOST_READS and ours:
        _found(Kind.HOST_READ, str(func))
    if func is _aten.copy_.default:
        return _copy_(*args, **kwargs)
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if func is _aten._to_copy.default and device is not None:
        return _moved(args[0], device, kwargs)
    others = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor)]
    if func in _INDEXING and isinstance(args[0], SimulatedTensor):
        _check_index(args[1])
        others = [tensor for tensor in args[2:3] if not isinstance(tensor, SimulatedTensor)]
    # A number as a tensor goes with any device; the host knows its value.
    if ours and any(tensor.dim() for tensor in others):
        raise _mixed(str(func))
    result = func(*_unwrapped(args), **{**_unwrapped(dict(kwargs)), **({"device": _HOST} if device else {})})
    if not ours and (device is None or device.type == _HOST.type):
        return result
    given = {id(tensor.held): tensor for tensor in ours}  # operators in place return what they were given
    return tree_map(lambda leaf: given[id(leaf)] if id(leaf) in given else _wrapped(leaf), result)


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    crosses = isinstance(target, SimulatedTensor) != isinstance(source, SimulatedTensor)
    if crosses and not non_blocking and source.dim():
        _found(Kind.BLOCKING_COPY, "copy_")
    to_host(target).copy_(to_host(source))
    return target


def _moved(source: Tensor, device: torch.device, kwargs: Mapping[str, Any]) -> Tensor:
    is_there = device.type != _HOST.type
    if isinstance(source, SimulatedTensor) != is_there and not kwargs.get("non_blocking"):
        _found(Kind.BLOCKING_COPY, "to")
    copied: Tensor = _aten._to_copy.default(to_host(source), **{**kwargs, "device": _HOST})
    return SimulatedTensor(copied) if is_there else copied
