"""One forward: hidden states, logits where they are wanted, tokens and logprobs."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..messages.sampling import TokenLogprob
from .forward_batch import ForwardBatch, ForwardOutput, PromptLogprobs, RowOutput, SampledToken
from .kv_pool import KVPool
from .model_config import ModelConfig
from .models.decoder import Decoder
from .operators import EAGER, Operators
from .sampler import sample, token_logprobs
from .weights import Weights

# Rows of logits computed at once for prompt logprobs: a vocabulary of 150,000 takes 77 MB.
_PROMPT_LOGITS_ROWS = 128


class ModelRunner:
    """Runs on one thread at a time, the engine's."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        pool: KVPool,
        device: torch.device,
        operators: Operators = EAGER,
    ) -> None:
        self._decoder = Decoder(config, device, operators)
        self._weights = weights
        self._pool = pool

    def swap_weights(self, weights: Weights) -> None:
        """The next forward uses `weights`. What the pool holds was computed with the old ones."""
        self._weights = weights

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        started = time.monotonic()
        hidden = self._decoder.hidden_states(self._weights, self._pool, batch)
        tokens: list[list[SampledToken]] = [[] for _ in batch.row_ids]
        if batch.sampling is not None:
            logits = self._decoder.logits(self._weights, hidden[batch.sampled_from])
            for (row, choice), token_id, logprob in zip(
                batch.entries, *sample(logits, batch.sampling), strict=True
            ):
                tokens[row].append(SampledToken(choice, token_id, logprob))
        prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = {
            wanted.row_index: self._prompt_logprobs(hidden, wanted) for wanted in batch.prompt_logprobs
        }
        rows = tuple(
            RowOutput(row_id, tuple(tokens[index]), prompt_logprobs.get(index, ()))
            for index, row_id in enumerate(batch.row_ids)
        )
        return ForwardOutput(batch.step, rows, started, time.monotonic())

    def _prompt_logprobs(self, hidden: Tensor, wanted: PromptLogprobs) -> tuple[TokenLogprob, ...]:
        logprobs: list[TokenLogprob] = []
        for done in range(0, wanted.targets.numel(), _PROMPT_LOGITS_ROWS):
            targets = wanted.targets[done : done + _PROMPT_LOGITS_ROWS].tolist()
            first = wanted.first + done
            logits = self._decoder.logits(self._weights, hidden[first : first + len(targets)])
            logprobs += token_logprobs(logits, targets, wanted.num_top)
        return tuple(logprobs)
