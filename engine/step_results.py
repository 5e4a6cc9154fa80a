"""What a forward computed, where it computed it; and what is told of it, once all of it is the host's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..messages.report import NOTHING_TOLD, PromptReport, SampledToken
from ..messages.sampling import TokenLogprob
from .device import DeviceRuntime
from .forward_batch import ForwardBatch, RowOutput
from .sampler import LogprobValues, Sampled, told_logprobs, told_tokens
from .tensor_tree import map_tensors, tensors_of


@dataclass(frozen=True, slots=True)
class StepResults:
    """Of one batch, in its order."""

    sampled: Sampled | None
    prompt_logprobs: tuple[tuple[LogprobValues, ...], ...]  # of each row that wants them, block by block
    prompt_states: tuple[Tensor, ...]  # of each row that wants hidden states, [num_prompt, H] float32
    sampled_states: tuple[Tensor, ...]  # of the same rows: [1, H], or [0, H] where one does not sample

    def on_host(self, runtime: DeviceRuntime) -> StepResults:
        """The same, when all of it has been computed: the one time that a forward waits for its device."""
        if runtime.is_host:
            return self
        arrived = iter(runtime.read_back(tensors_of(self)).take())
        return map_tensors(self, lambda _: next(arrived))

    def rows(self, batch: ForwardBatch) -> tuple[RowOutput, ...]:
        """What is told of each row. They are the host's."""
        states = {
            wanted.row_index: _bytes(tensor)
            for wanted, tensor in zip(batch.hidden_rows, self.sampled_states, strict=True)
        }
        tokens: list[list[SampledToken]] = [[] for _ in batch.row_ids]
        if self.sampled is not None and batch.sampling is not None:
            for (row, choice), token_id, logprob in zip(
                batch.entries, *told_tokens(self.sampled, batch.sampling), strict=True
            ):
                tokens[row].append(SampledToken(choice, token_id, logprob, states.get(row, b"")))
        reports = self._reports(batch)
        return tuple(
            RowOutput(row_id, tuple(tokens[index]), reports.get(index, NOTHING_TOLD))
            for index, row_id in enumerate(batch.row_ids)
        )

    def _reports(self, batch: ForwardBatch) -> dict[int, PromptReport]:
        logprobs: dict[int, tuple[TokenLogprob, ...]] = {
            wanted.row_index: tuple(
                logprob for values in blocks for logprob in told_logprobs(values, wanted.asked)
            )
            for wanted, blocks in zip(batch.prompt_logprobs, self.prompt_logprobs, strict=True)
        }
        states = {
            wanted.row_index: _bytes(tensor)
            for wanted, tensor in zip(batch.hidden_rows, self.prompt_states, strict=True)
        }
        return {
            index: PromptReport(logprobs=logprobs.get(index, ()), hidden_states=states.get(index, b""))
            for index in logprobs.keys() | states.keys()
        }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
