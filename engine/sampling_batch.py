"""What the sampler needs to know of a step, as tensors; built with the forward batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..messages.sampling import AskedLogprobs
from .schedule_batch import ScheduledRow

# Below this a distribution is its best token, and dividing by it would overflow.
GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class Entry:
    """One token to sample: a choice of a row, from one row of logits."""

    row_index: int  # among the schedule batch's rows
    logits_index: int
    choice: int
    row: ScheduledRow


@dataclass(frozen=True, slots=True)
class PerToken:
    """``values[i]`` belongs to token ``tokens[i]`` of entry ``entries[i]``; all ``[*]``."""

    entries: Tensor
    tokens: Tensor
    values: Tensor  # float32


@dataclass(frozen=True, slots=True)
class Penalties:
    """Of one entry; ``prompt, output [*]`` int64 are its tokens so far."""

    entry: int
    prompt: Tensor
    output: Tensor
    repetition: float
    frequency: float
    presence: float


@dataclass(frozen=True, slots=True)
class Filters:
    """Of the F drawn entries that ask for any; ``drawn [F]`` indexes the drawn ones."""

    drawn: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True, slots=True)
class Drawn:
    """The S entries that are drawn at a temperature; the others take the best token. All ``[S]``."""

    entries: Tensor
    temperature: Tensor  # float32
    seeds: Tensor  # int64, two's complement
    choices: Tensor
    positions: Tensor  # of the drawn token in its sequence
    filters: Filters | None


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """E tokens to sample. A part that no entry asks for is None or empty, and costs nothing."""

    logits_index: Tensor | None  # [E] int64; None: entry i samples from row i
    bias: PerToken | None
    penalties: tuple[Penalties, ...]
    forbidden: PerToken | None
    drawn: Drawn | None
    logprobs: tuple[AskedLogprobs | None, ...]  # of each entry

    @property
    def changes_logits(self) -> bool:
        return self.bias is not None or self.forbidden is not None or bool(self.penalties)

    @classmethod
    def build(
        cls, entries: Sequence[Entry], eos_token_ids: Collection[int], vocab_size: int
    ) -> SamplingBatch:
        logits_index = [entry.logits_index for entry in entries]
        return cls(
            logits_index=None if logits_index == list(range(len(entries))) else torch.tensor(logits_index),
            bias=_per_token([e.row.work.sampling.logit_bias for e in entries], vocab_size),
            penalties=tuple(
                _penalties(index, entry.row)
                for index, entry in enumerate(entries)
                if entry.row.work.sampling.uses_penalties
            ),
            forbidden=_per_token([_forbidden(entry.row, eos_token_ids) for entry in entries], vocab_size),
            drawn=_drawn(entries),
            logprobs=tuple(entry.row.work.sampling.asked_logprobs for entry in entries),
        )


def _per_token(of_entries: Sequence[dict[int, float]], vocab_size: int) -> PerToken | None:
    # An id outside the vocabulary cannot be sampled, so what is asked of it already holds.
    items = [
        (index, token, value)
        for index, values in enumerate(of_entries)
        for token, value in values.items()
        if token < vocab_size
    ]
    if not items:
        return None
    entries, tokens, values = zip(*items, strict=True)
    return PerToken(torch.tensor(entries), torch.tensor(tokens), torch.tensor(values, dtype=torch.float32))


def _forbidden(row: ScheduledRow, eos_token_ids: Collection[int]) -> dict[int, float]:
    """The tokens that would end the request before its min_tokens."""
    sampling = row.work.sampling
    if row.num_output_tokens >= sampling.min_tokens:
        return {}
    endings = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        endings.update(eos_token_ids)
    return dict.fromkeys(endings, float("-inf"))


def _penalties(index: int, row: ScheduledRow) -> Penalties:
    # By way of NumPy: it reads a list several times faster than torch, and an array at the speed of memory.
    known = torch.from_numpy(np.array(row.token_ids[: row.end], dtype=np.int64))
    return Penalties(
        entry=index,
        prompt=known[: row.num_prompt_tokens],
        output=known[row.num_prompt_tokens :],
        repetition=row.work.sampling.repetition_penalty,
        frequency=row.work.sampling.frequency_penalty,
        presence=row.work.sampling.presence_penalty,
    )


def _drawn(entries: Sequence[Entry]) -> Drawn | None:
    drawn = [(i, e) for i, e in enumerate(entries) if e.row.work.sampling.temperature >= GREEDY_TEMPERATURE]
    if not drawn:
        return None
    rows = [entry.row for _, entry in drawn]
    return Drawn(
        entries=torch.tensor([index for index, _ in drawn]),
        temperature=torch.tensor([row.work.sampling.temperature for row in rows], dtype=torch.float32),
        seeds=torch.tensor([_twos_complement(row.work.sampling.seed) for row in rows]),
        choices=torch.tensor([entry.choice for _, entry in drawn]),
        positions=torch.tensor([row.end for row in rows]),
        filters=_filters(rows),
    )


def _filters(rows: Sequence[ScheduledRow]) -> Filters | None:
    asking = [
        (index, row.work.sampling)
        for index, row in enumerate(rows)
        if row.work.sampling.top_k > 0 or row.work.sampling.top_p < 1.0 or row.work.sampling.min_p > 0.0
    ]
    if not asking:
        return None
    return Filters(
        drawn=torch.tensor([index for index, _ in asking]),
        top_k=torch.tensor([sampling.top_k for _, sampling in asking]),
        top_p=torch.tensor([sampling.top_p for _, sampling in asking], dtype=torch.float32),
        min_p=torch.tensor([sampling.min_p for _, sampling in asking], dtype=torch.float32),
    )


def _twos_complement(seed: int) -> int:
    return seed - (1 << 64) if seed >= 1 << 63 else seed
