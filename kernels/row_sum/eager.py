"""Sums of 64 neighbours, then sums of 64 of those, and so on."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDTH = 64


def row_sum(x: Tensor) -> Tensor:
    while (length := x.shape[-1]) > _WIDTH:
        whole = length - length % _WIDTH
        sums = x[..., :whole].reshape(*x.shape[:-1], -1, _WIDTH).sum(dim=-1)
        rest = (x[..., whole:].sum(dim=-1, keepdim=True),) if whole < length else ()
        x = torch.cat((sums, *rest), dim=-1) if rest else sums
    return x.sum(dim=-1)
