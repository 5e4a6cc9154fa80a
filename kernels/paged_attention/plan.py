"""What attention does in one step, worked out once for all layers.

Decode rows (one new token) whose tables have nearly the same number of pages form one group, computed
together over a rectangle of pages; every longer row is computed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

_LONGEST_EXACT_TABLE = 4


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """Positions ``[start, start + num_tokens)`` of one sequence; ``pages`` covers at least ``[0, end)``."""

    start: int
    num_tokens: int
    pages: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True)
class DecodeGroup:
    """Rows of one new token each, B of them, over tables padded to M pages."""

    first_token: int
    num_rows: int
    pages: Tensor  # [B · M] int64
    ends: Tensor  # [B] int64: the positions a row may look at
    # What a rectangle holds beyond the rows' ends; None for a group of one, which is cut to its length.
    unwritten: Tensor | None  # [num_unwritten] int64: slots of [B · M · page_size] that may hold NaN
    num_slots: int  # slots a row may look at: M · page_size, or the exact length for a group of one
    dtype: torch.dtype

    @cached_property
    def bias(self) -> Tensor | None:
        """``[1, B, 1, M · page_size]``: 0 where a row may look, -inf elsewhere; None: it may look anywhere.
        Made at its first use, where its rows are."""
        if self.unwritten is None:
            return None
        device = self.ends.device
        bias = torch.zeros((self.num_rows, self.num_slots), dtype=self.dtype, device=device)
        slots = torch.arange(self.num_slots, device=device)
        return bias.masked_fill_(slots >= self.ends[:, None], float("-inf"))[None, :, None]


@dataclass(frozen=True)
class PrefillRow:
    """One row of several new tokens."""

    first_token: int
    num_tokens: int
    pages: Tensor  # [num_pages] int64
    start: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @cached_property
    def bias(self) -> Tensor | None:
        """``[num_tokens, end]``: 0 or -inf; None: the row starts at 0, plain causal.

        Made at its first use, so by the engine's thread and not by the loop's, which plans: a long chunk deep
        in a prompt has a mask of many megabytes.
        """
        if self.start == 0:
            return None
        shape = (self.num_tokens, self.end)
        mask = torch.full(shape, float("-inf"), dtype=self.dtype, device=self.pages.device)
        return mask.triu_(self.start + 1)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    groups: tuple[DecodeGroup, ...]
    prefills: tuple[PrefillRow, ...]


def grouping_key(num_tokens: int, num_pages: int) -> tuple[bool, int]:
    """Rows with equal keys are computed together if they stand side by side; sort the rows of a batch by it.

    Tables are alike when they round up to the same quarter of a power of two, so that padding wastes less
    than a quarter. Groups of padded tables hold rows of at least two pages each: a row's first page is full.
    """
    if num_tokens > 1:
        return True, 0
    if num_pages <= _LONGEST_EXACT_TABLE:
        return False, num_pages
    quarter = 1 << ((num_pages - 1).bit_length() - 3)
    return False, -(-num_pages // quarter) * quarter


def plan_attention(rows: Sequence[AttentionRow], page_size: int, dtype: torch.dtype) -> AttentionPlan:
    """The plan for rows that stand in this order in the flat batch. `dtype` is that of queries and pool."""
    groups: list[DecodeGroup] = []
    prefills: list[PrefillRow] = []
    first_token = 0
    for (is_prefill, num_pages), same in groupby(
        rows, key=lambda row: grouping_key(row.num_tokens, -(-row.end // page_size))
    ):
        members = list(same)
        if is_prefill:
            for row in members:
                prefills.append(_prefill(row, first_token, page_size, dtype))
                first_token += row.num_tokens
        else:
            groups.append(_decode(members, first_token, num_pages, page_size, dtype))
            first_token += len(members)
    return AttentionPlan(tuple(groups), tuple(prefills))


def _prefill(row: AttentionRow, first_token: int, page_size: int, dtype: torch.dtype) -> PrefillRow:
    pages = torch.tensor(row.pages[: -(-row.end // page_size)], dtype=torch.int64)
    return PrefillRow(first_token, row.num_tokens, pages, row.start, dtype)


def _decode(
    rows: Sequence[AttentionRow], first_token: int, num_pages: int, page_size: int, dtype: torch.dtype
) -> DecodeGroup:
    if len(rows) == 1:
        row = rows[0]
        pages = torch.tensor(row.pages[: -(-row.end // page_size)], dtype=torch.int64)
        return DecodeGroup(first_token, 1, pages, torch.tensor([row.end]), None, row.end, dtype)
    tables: list[int] = []
    unwritten: list[int] = []
    for index, row in enumerate(rows):
        used = -(-row.end // page_size)
        tables += row.pages[:used]
        # A padding page is masked, and still its values are multiplied by 0: it must be finite.
        tables += [row.pages[0]] * (num_pages - used)
        first_slot = index * num_pages * page_size
        unwritten += range(first_slot + row.end, first_slot + used * page_size)
    return DecodeGroup(
        first_token=first_token,
        num_rows=len(rows),
        pages=torch.from_numpy(np.array(tables, dtype=np.int64)),  # torch reads a list far more slowly
        ends=torch.tensor([row.end for row in rows]),
        unwritten=torch.tensor(unwritten, dtype=torch.int64),
        num_slots=num_pages * page_size,
        dtype=dtype,
    )
