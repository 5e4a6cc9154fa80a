"""Applies what each entry of a sampling batch asks for, and nothing else, to its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import sampling as ops
from ..messages.sampling import AskedLogprobs, TokenLogprob
from .sampling_batch import Drawn, SamplingBatch


def sample(logits: Tensor, batch: SamplingBatch) -> tuple[list[int], list[TokenLogprob | None]]:
    """``logits [R, V]`` float32, not changed. → token and logprob of each of the E entries."""
    if batch.logits_index is not None:
        logits = logits[batch.logits_index]
    tokens = _choose(logits, batch).tolist()
    return tokens, _logprobs(logits, tokens, batch.logprobs)


def token_logprobs(logits: Tensor, token_ids: list[int], asked: AskedLogprobs) -> list[TokenLogprob]:
    """Of each of N tokens under its row of ``logits [N, V]`` float32, with what is asked beside it."""
    best = ops.log_probs(logits, asked.num_top)
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0] - best.normalizer
    named = logits[:, list(asked.token_ids)] - best.normalizer[:, None]
    return [
        TokenLogprob(
            token_id,
            logprob,
            tuple(zip(ids, values, strict=True)),
            tuple(zip(asked.token_ids, named_values, strict=True)),
        )
        for token_id, logprob, ids, values, named_values in zip(
            token_ids,
            chosen.tolist(),
            best.top_ids.tolist(),
            best.top_values.tolist(),
            named.tolist(),
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
    for penalties in batch.penalties:
        ops.apply_penalties_(
            logits,
            penalties.entry,
            penalties.prompt,
            penalties.output,
            repetition=penalties.repetition,
            frequency=penalties.frequency,
            presence=penalties.presence,
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
            scaled[filters.drawn], filters.top_k, filters.top_p, filters.min_p
        )
    return ops.gumbel_argmax(scaled, threshold, drawn.seeds, drawn.choices, drawn.positions)


def _logprobs(
    logits: Tensor, tokens: list[int], asked: tuple[AskedLogprobs | None, ...]
) -> list[TokenLogprob | None]:
    logprobs: list[TokenLogprob | None] = [None] * len(tokens)
    # Rows that ask for the same together, so that no row's answer depends on another's wish.
    for wish in {each for each in asked if each is not None}:
        entries = [index for index, each in enumerate(asked) if each == wish]
        of_entries = token_logprobs(logits[entries], [tokens[index] for index in entries], wish)
        for index, logprob in zip(entries, of_entries, strict=True):
            logprobs[index] = logprob
    return logprobs
