"""Applies what each entry of a sampling batch asks for, and nothing else, to its logits.

`sample` and `token_logprobs` compute where the logits are and read nothing on the host; `told_tokens` and
`told_logprobs` make answers of their tensors once these are the host's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import sampling as ops
from ..messages.sampling import AskedLogprobs, TokenLogprob
from .sampling_batch import Drawn, SamplingBatch


@dataclass(frozen=True, slots=True)
class LogprobValues:
    """Of N tokens, each under its row of logits."""

    token_ids: Tensor  # [N] int64
    chosen: Tensor  # [N] float32
    top_ids: Tensor  # [N, K] int64, best first
    top_values: Tensor  # [N, K] float32
    named: Tensor  # [N, J] float32


@dataclass(frozen=True, slots=True)
class Sampled:
    tokens: Tensor  # [E] int64
    logprobs: tuple[LogprobValues, ...]  # of each of the batch's wishes


def sample(logits: Tensor, batch: SamplingBatch) -> Sampled:
    """``logits [R, V]`` float32, not changed. → of the E entries."""
    if batch.logits_index is not None:
        logits = logits[batch.logits_index]
    tokens = _choose(logits, batch)
    return Sampled(
        tokens,
        tuple(
            token_logprobs(logits, tokens, wish.asked.num_top, wish.named)
            if wish.entries is None
            else token_logprobs(logits[wish.entries], tokens[wish.entries], wish.asked.num_top, wish.named)
            for wish in batch.wishes
        ),
    )


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int, named: Tensor) -> LogprobValues:
    """Of each of ``token_ids [N]`` int64 under its row of ``logits [N, V]`` float32, of the `num_top` most
    likely ones and of ``named [J]`` int64."""
    best = ops.log_probs(logits, num_top)
    return LogprobValues(
        token_ids=token_ids,
        chosen=logits.gather(1, token_ids[:, None])[:, 0] - best.normalizer,
        top_ids=best.top_ids,
        top_values=best.top_values,
        named=logits.index_select(1, named) - best.normalizer[:, None],
    )


def told_tokens(sampled: Sampled, batch: SamplingBatch) -> tuple[list[int], list[TokenLogprob | None]]:
    """Token and logprob of each of the E entries. `sampled` is the host's."""
    tokens: list[int] = sampled.tokens.tolist()
    logprobs: list[TokenLogprob | None] = [None] * len(tokens)
    for wish, values in zip(batch.wishes, sampled.logprobs, strict=True):
        for index, logprob in zip(wish.indices, told_logprobs(values, wish.asked), strict=True):
            logprobs[index] = logprob
    return tokens, logprobs


def told_logprobs(values: LogprobValues, asked: AskedLogprobs) -> list[TokenLogprob]:
    """`values` are the host's."""
    return [
        TokenLogprob(
            token_id,
            logprob,
            tuple(zip(top_ids, top_values, strict=True)),
            tuple(zip(asked.token_ids, named, strict=True)),
        )
        for token_id, logprob, top_ids, top_values, named in zip(
            values.token_ids.tolist(),
            values.chosen.tolist(),
            values.top_ids.tolist(),
            values.top_values.tolist(),
            values.named.tolist(),
            strict=True,
        )
    ]


def _choose(logits: Tensor, batch: SamplingBatch) -> Tensor:
    if batch.changes_logits:
        logits = _transformed(logits, batch)
    if batch.drawn is None:
        return ops.greedy(logits)
    if batch.drawn.entries.numel() == logits.shape[0]:
        return _draw(logits, batch.drawn)
    tokens = ops.greedy(logits)
    tokens[batch.drawn.entries] = _draw(logits[batch.drawn.entries], batch.drawn)
    return tokens


def _transformed(raw: Tensor, batch: SamplingBatch) -> Tensor:
    logits = raw.clone()
    if batch.bias is not None:
        ops.add_bias_(logits, batch.bias.entries, batch.bias.tokens, batch.bias.values)
    if (seen := batch.penalties) is not None:
        ops.apply_penalties_(
            logits,
            seen.entries,
            seen.tokens,
            seen.counts,
            seen.repetition,
            seen.frequency,
            seen.presence,
        )
    if batch.forbidden is not None:
        ops.forbid_(logits, batch.forbidden.entries, batch.forbidden.tokens)
    return logits


def _draw(logits: Tensor, drawn: Drawn) -> Tensor:
    scaled = logits / drawn.temperature[:, None]
    threshold = torch.full((scaled.shape[0],), float("-inf"), device=scaled.device)
    filters = drawn.filters
    if filters is not None:
        threshold[filters.drawn] = ops.keep_threshold(
            scaled[filters.drawn],
            filters.top_k,
            filters.top_p,
            filters.min_p,
            largest_top_k=filters.largest_top_k,
            some_top_p=filters.some_top_p,
        )
    return ops.gumbel_argmax(scaled, threshold, drawn.seeds, drawn.choices, drawn.positions)
