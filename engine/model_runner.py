"""One forward: hidden states, logits where they are wanted, tokens and logprobs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ..messages.report import NOTHING_TOLD, PromptReport, SampledToken
from ..messages.sampling import TokenLogprob
from ..models.config import ModelConfig
from .decoder import Decoder
from .device import DeviceRuntime
from .forward_batch import (
    ForwardBatch,
    ForwardOutput,
    PromptLogprobs,
    RowOutput,
)
from .kv_pool import KVPool
from .model_weights import Weights
from .operators import EAGER, Operators
from .sampler import sample, token_logprobs
from .step_inputs import staged
from .tensor_parallel import RankCollective

# Rows of logits computed at once for prompt logprobs: a vocabulary of 150,000 takes 77 MB.
_PROMPT_LOGITS_ROWS = 128


class ModelRunner:
    """Runs on one thread at a time, the engine's."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        pool: KVPool,
        runtime: DeviceRuntime,
        *,
        operators: Operators = EAGER,
        collective: RankCollective | None = None,
    ) -> None:
        self._runtime = runtime
        self._decoder = Decoder(config, runtime.device, operators, collective)
        self._follows = collective is not None and collective.shard.rank > 0
        self._weights = weights
        self._pool = pool

    def swap_weights(self, weights: Weights) -> None:
        """The next forward uses `weights`. What the pool holds was computed with the old ones."""
        self._weights = weights

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        """`batch` is the host's. Every rank is given the same one; those but the first sample nothing and
        return no rows."""
        started = time.monotonic()
        on_device = staged(batch, self._runtime)
        return self._follow(on_device, started) if self._follows else self._lead(on_device, started)

    def _lead(self, batch: ForwardBatch, started: float) -> ForwardOutput:
        hidden = self._decoder.hidden_states(self._weights, self._pool, batch)
        sampled_from = {
            wanted.row_index: self._shown(hidden, wanted.sampled_from, 1)
            for wanted in batch.hidden_rows
            if wanted.sampled_from is not None
        }
        tokens: list[list[SampledToken]] = [[] for _ in batch.row_ids]
        if batch.sampling is not None:
            logits = self._logits(hidden[batch.sampled_from])
            for (row, choice), token_id, logprob in zip(
                batch.entries, *sample(logits, batch.sampling), strict=True
            ):
                tokens[row].append(SampledToken(choice, token_id, logprob, sampled_from.get(row, b"")))
        prompt_logprobs = {
            wanted.row_index: self._prompt_logprobs(hidden, wanted) for wanted in batch.prompt_logprobs
        }
        prompt_states = {
            wanted.row_index: self._shown(hidden, wanted.first, wanted.num_prompt)
            for wanted in batch.hidden_rows
        }
        reports = {
            index: PromptReport(
                logprobs=prompt_logprobs.get(index, ()), hidden_states=prompt_states.get(index, b"")
            )
            for index in prompt_logprobs.keys() | prompt_states.keys()
        }
        rows = tuple(
            RowOutput(row_id, tuple(tokens[index]), reports.get(index, NOTHING_TOLD))
            for index, row_id in enumerate(batch.row_ids)
        )
        return ForwardOutput(batch.step, rows, started, time.monotonic())

    def _follow(self, batch: ForwardBatch, started: float) -> ForwardOutput:
        """The same collectives as `_lead`, and nothing sampled."""
        hidden = self._decoder.hidden_states(self._weights, self._pool, batch)
        if batch.sampled_from.numel():
            self._decoder.logits(self._weights, hidden[batch.sampled_from])
        for wanted in batch.prompt_logprobs:
            for first, num_rows in _blocks(wanted):
                self._decoder.logits(self._weights, hidden[first : first + num_rows])
        return ForwardOutput(batch.step, (), started, time.monotonic())

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._decoder.logits(self._weights, hidden)
        assert logits is not None, "only the first rank samples"
        return logits

    def _shown(self, hidden: Tensor, first: int, num_rows: int) -> bytes:
        """Rows of the flat batch behind the final norm, as float32."""
        if not num_rows:
            return b""
        rows = hidden[first : first + num_rows]
        return self._decoder.final_norm(self._weights, rows).float().cpu().numpy().tobytes()

    def _prompt_logprobs(self, hidden: Tensor, wanted: PromptLogprobs) -> tuple[TokenLogprob, ...]:
        logprobs: list[TokenLogprob] = []
        for first, num_rows in _blocks(wanted):
            done = first - wanted.first
            targets = wanted.targets[done : done + num_rows].tolist()
            logprobs += token_logprobs(self._logits(hidden[first : first + num_rows]), targets, wanted.asked)
        return tuple(logprobs)


def _blocks(wanted: PromptLogprobs) -> Iterator[tuple[int, int]]:
    """First hidden state and number of rows of each block of logits."""
    end = wanted.first + wanted.targets.numel()
    for first in range(wanted.first, end, _PROMPT_LOGITS_ROWS):
        yield first, min(_PROMPT_LOGITS_ROWS, end - first)
