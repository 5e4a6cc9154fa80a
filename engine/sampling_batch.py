"""What the sampler needs to know of a step, as tensors; built with the forward batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
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
    """Token ``tokens[i]`` stands ``counts[i]`` times in the output of entry ``entries[i]``, or in its prompt
    alone; and what that entry asks. Each token of an entry once; all ``[*]``, float32 but the first two."""

    entries: Tensor
    tokens: Tensor
    counts: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


@dataclass(frozen=True, slots=True)
class Wish:
    """Entries that ask for the same logprobs are answered together, so that no row's answer depends on
    another's wish."""

    asked: AskedLogprobs
    indices: tuple[int, ...]  # of its n entries
    entries: Tensor | None  # [n] int64: the same; None: they are all entries
    named: Tensor  # [J] int64: asked.token_ids


@dataclass(frozen=True, slots=True)
class Filters:
    """Of the F drawn entries that ask for any; ``drawn [F]`` indexes the drawn ones."""

    drawn: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    largest_top_k: int
    some_top_p: bool  # any is below 1


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
    penalties: Penalties | None
    forbidden: PerToken | None
    drawn: Drawn | None
    wishes: tuple[Wish, ...]

    @property
    def changes_logits(self) -> bool:
        return any(part is not None for part in (self.bias, self.penalties, self.forbidden))

    @classmethod
    def build(
        cls, entries: Sequence[Entry], eos_token_ids: Collection[int], vocab_size: int
    ) -> SamplingBatch:
        logits_index = [entry.logits_index for entry in entries]
        return cls(
            logits_index=None if logits_index == list(range(len(entries))) else torch.tensor(logits_index),
            bias=_per_token([e.row.work.sampling.logit_bias for e in entries], vocab_size),
            penalties=_penalties(entries),
            forbidden=_per_token([_forbidden(entry.row, eos_token_ids) for entry in entries], vocab_size),
            drawn=_drawn(entries),
            wishes=tuple(_wishes([entry.row.work.sampling.asked_logprobs for entry in entries])),
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


def _penalties(entries: Sequence[Entry]) -> Penalties | None:
    penalized = [(index, e.row) for index, e in enumerate(entries) if e.row.work.sampling.uses_penalties]
    if not penalized:
        return None
    seen = [_seen(row) for _, row in penalized]
    num_seen = [len(tokens) for tokens, _ in seen]

    def each(values: Sequence[float], dtype: type[np.generic]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=dtype), num_seen))

    asked = [row.work.sampling for _, row in penalized]
    return Penalties(
        entries=each([index for index, _ in penalized], np.int64),
        tokens=torch.from_numpy(np.concatenate([tokens for tokens, _ in seen])),
        counts=torch.from_numpy(np.concatenate([counts for _, counts in seen])),
        repetition=each([sampling.repetition_penalty for sampling in asked], np.float32),
        frequency=each([sampling.frequency_penalty for sampling in asked], np.float32),
        presence=each([sampling.presence_penalty for sampling in asked], np.float32),
    )


def _seen(row: ScheduledRow) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The tokens of a row so far, each once, and how often each is in its output."""
    known = np.array(row.token_ids[: row.end], dtype=np.int64)
    tokens, places = np.unique(known, return_inverse=True)
    counts = np.bincount(places[row.num_prompt_tokens :], minlength=len(tokens))
    return tokens, counts.astype(np.float32)


def _wishes(asked: Sequence[AskedLogprobs | None]) -> Iterator[Wish]:
    for wish in dict.fromkeys(asked):
        if wish is None:
            continue
        indices = tuple(index for index, each in enumerate(asked) if each == wish)
        entries = None if len(indices) == len(asked) else torch.tensor(indices)
        yield Wish(wish, indices, entries, torch.tensor(wish.token_ids, dtype=torch.int64))


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
        largest_top_k=max(sampling.top_k for _, sampling in asking),
        some_top_p=any(sampling.top_p < 1.0 for _, sampling in asking),
    )


def _twos_complement(seed: int) -> int:
    return seed - (1 << 64) if seed >= 1 << 63 else seed
