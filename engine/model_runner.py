"""One forward: hidden states, logits where they are wanted, tokens and logprobs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ..models.config import ModelConfig
from .decoder import Decoder
from .device import DeviceRuntime
from .forward_batch import ForwardBatch, ForwardOutput, PromptLogprobs
from .kv_pool import KVPool
from .model_weights import Weights
from .operators import EAGER, Operators
from .sampler import LogprobValues, sample, token_logprobs
from .step_inputs import staged
from .step_results import StepResults
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
        results = StepResults(
            sampled=(
                None
                if batch.sampling is None
                else sample(self._logits(hidden[batch.sampled_from]), batch.sampling)
            ),
            prompt_logprobs=tuple(
                tuple(self._prompt_logprobs(hidden, wanted)) for wanted in batch.prompt_logprobs
            ),
            prompt_states=tuple(
                self._shown(hidden, wanted.first, wanted.num_prompt) for wanted in batch.hidden_rows
            ),
            sampled_states=tuple(
                self._shown(hidden, wanted.sampled_from or 0, int(wanted.sampled_from is not None))
                for wanted in batch.hidden_rows
            ),
        )
        rows = results.on_host(self._runtime).rows(batch)
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

    def _shown(self, hidden: Tensor, first: int, num_rows: int) -> Tensor:
        """``[num_rows, H]`` float32: rows of the flat batch behind the final norm."""
        rows = hidden[first : first + num_rows]
        return (self._decoder.final_norm(self._weights, rows) if num_rows else rows).float()

    def _prompt_logprobs(self, hidden: Tensor, wanted: PromptLogprobs) -> Iterator[LogprobValues]:
        """Block by block."""
        for first, num_rows in _blocks(wanted):
            done = first - wanted.first
            logits = self._logits(hidden[first : first + num_rows])
            targets = wanted.targets[done : done + num_rows]
            yield token_logprobs(logits, targets, wanted.asked.num_top, wanted.named)


def _blocks(wanted: PromptLogprobs) -> Iterator[tuple[int, int]]:
    """First hidden state and number of rows of each block of logits."""
    end = wanted.first + wanted.targets.numel()
    for first in range(wanted.first, end, _PROMPT_LOGITS_ROWS):
        yield first, min(_PROMPT_LOGITS_ROWS, end - first)
