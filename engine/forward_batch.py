"""A step as tensors, and what comes of it. Built on the loop's thread, read on the engine's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.paged_attention import AttentionPlan, AttentionRow, grouping_key, plan_attention
from ..messages.kv_layout import KVLayout
from ..messages.report import NOTHING_TOLD, PromptReport, SampledToken
from ..messages.sampling import AskedLogprobs
from ..models.config import ModelConfig
from .kv_pool import TORCH_DTYPES
from .sampling_batch import Entry, SamplingBatch
from .schedule_batch import ScheduleBatch, ScheduledRow


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Logprobs that one row wants of its prompt: hidden state ``first + i`` predicts ``targets[i]``."""

    row_index: int
    first: int  # in the flat batch
    targets: Tensor  # [n] int64
    asked: AskedLogprobs
    named: Tensor  # [J] int64: asked.token_ids


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """Hidden states that one row wants, by their places in the flat batch: of the `num_prompt` tokens from
    `first` on, and of the token at `sampled_from`, where it samples."""

    row_index: int
    first: int
    num_prompt: int
    sampled_from: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """T tokens of all rows, flat: decode rows first, alike ones side by side, then prefill rows."""

    step: int
    row_ids: tuple[str | int, ...]  # in the schedule's order; entries and prompt logprobs index it
    num_decode_rows: int
    num_prefill_tokens: int
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_pages: Tensor  # [T] int64: the page each token's K and V go to
    slot_offsets: Tensor  # [T] int64: and the slot in it
    attention: AttentionPlan
    sampled_from: Tensor  # [R] int64, flat index of the last token of each row that samples
    sampling: SamplingBatch | None
    entries: tuple[tuple[int, int], ...]  # (row index, choice) of each sampled token
    prompt_logprobs: tuple[PromptLogprobs, ...]
    hidden_rows: tuple[HiddenRows, ...]

    @classmethod
    def build(cls, batch: ScheduleBatch, *, step: int, config: ModelConfig, layout: KVLayout) -> ForwardBatch:
        """Copies all it needs: the scheduler may append to token_ids and page tables at once."""
        page_size = layout.page_size
        order = sorted(
            range(len(batch.rows)),
            key=lambda index: grouping_key(
                batch.rows[index].num_tokens, layout.pages_for(batch.rows[index].end)
            ),
        )
        token_ids: list[int] = []
        positions: list[int] = []
        sampled_from: list[int] = []
        entries: list[Entry] = []
        prompt_logprobs: list[PromptLogprobs] = []
        hidden_rows: list[HiddenRows] = []
        pages: list[int] = []
        for index in order:
            row = batch.rows[index]
            wanted = _prompt_logprobs(row, index, first=len(token_ids))
            if wanted is not None:
                prompt_logprobs.append(wanted)
            if row.work.sampling.hidden_states != "none":
                hidden_rows.append(_hidden_rows(row, index, first=len(token_ids)))
            token_ids += row.token_ids[row.start : row.end]
            positions += range(row.start, row.end)
            pages += (row.pages[position // page_size] for position in range(row.start, row.end))
            if row.choices:
                entries += (Entry(index, len(sampled_from), choice, row) for choice in row.choices)
                sampled_from.append(len(token_ids) - 1)
        position_tensor = torch.tensor(positions)
        attention_rows = [AttentionRow(row.start, row.num_tokens, row.pages) for row in _at(batch, order)]
        prefill_tokens = [row.num_tokens for row in batch.rows if row.num_tokens > 1]
        return cls(
            step=step,
            row_ids=tuple(row.row_id for row in batch.rows),
            num_decode_rows=len(batch.rows) - len(prefill_tokens),
            num_prefill_tokens=sum(prefill_tokens),
            token_ids=torch.tensor(token_ids),
            positions=position_tensor,
            slot_pages=torch.tensor(pages),
            slot_offsets=position_tensor % page_size,
            attention=plan_attention(attention_rows, page_size, TORCH_DTYPES[layout.dtype]),
            sampled_from=torch.tensor(sampled_from, dtype=torch.int64),
            sampling=(
                SamplingBatch.build(entries, config.eos_token_ids, config.vocab_size) if entries else None
            ),
            entries=tuple((entry.row_index, entry.choice) for entry in entries),
            prompt_logprobs=tuple(prompt_logprobs),
            hidden_rows=tuple(hidden_rows),
        )


@dataclass(frozen=True, slots=True)
class RowOutput:
    row_id: str | int
    tokens: tuple[SampledToken, ...]  # in the order of the row's choices
    # On the row's part of the prompt. Logprobs: of each prompt token at a position p in
    # (start, start + num_tokens] with p >= work.prompt_logprobs_from, that of token_ids[p] given [0, p).
    report: PromptReport = NOTHING_TOLD


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    step: int
    rows: tuple[RowOutput, ...]  # in the schedule's order
    started: float  # monotonic seconds
    finished: float


def _at(batch: ScheduleBatch, order: list[int]) -> list[ScheduledRow]:
    return [batch.rows[index] for index in order]


def _prompt_logprobs(row: ScheduledRow, index: int, first: int) -> PromptLogprobs | None:
    wanted_from, asked = row.work.prompt_logprobs_from, row.work.sampling.asked_prompt_logprobs
    if wanted_from is None or asked is None:
        return None
    begin = max(wanted_from, row.start + 1)
    end = min(row.end + 1, row.num_prompt_tokens)
    if begin >= end:
        return None
    return PromptLogprobs(
        row_index=index,
        first=first + begin - 1 - row.start,
        targets=torch.tensor(row.token_ids[begin:end], dtype=torch.int64),
        asked=asked,
        named=torch.tensor(asked.token_ids, dtype=torch.int64),
    )


def _hidden_rows(row: ScheduledRow, index: int, first: int) -> HiddenRows:
    wants_prompt = row.work.wants_prompt_states and row.start < row.num_prompt_tokens
    return HiddenRows(
        row_index=index,
        first=first,
        num_prompt=row.num_tokens if wants_prompt else 0,
        sampled_from=first + row.num_tokens - 1 if row.choices else None,
    )
