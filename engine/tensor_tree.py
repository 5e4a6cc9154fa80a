"""Tensors that stand in tuples and dataclasses, however deep: all of them at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def map_tensors(tree: T, change: Callable[[Tensor], Tensor]) -> T:
    """The same tree with ``change(tensor)`` in the place of each tensor, in the order of fields."""
    changed: T = _mapped(tree, change)
    return changed


def tensors_of(tree: object) -> list[Tensor]:
    """In the order of `map_tensors`."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(tree, note)
    return found


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401
    if isinstance(tree, Tensor):
        return change(tree)
    if type(tree) is tuple:
        return tuple(_mapped(part, change) for part in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {each.name: getattr(tree, each.name) for each in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **{name: _mapped(value, change) for name, value in fields.items()})
    return tree
