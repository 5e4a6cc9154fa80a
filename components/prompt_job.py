"""A prompt that this node computes, chunk by chunk: on a prefill node, and on a decode node that prefills."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from ..engine.forward_batch import RowOutput
from ..engine.schedule_batch import ScheduledRow
from ..messages.sampling import SamplingParams, TokenLogprob
from .prefix_cache import num_reusable_tokens


class Prompt(Protocol):
    """What a request says of its prompt."""

    @property
    def request_id(self) -> str: ...

    @property
    def prompt_ids(self) -> tuple[int, ...]: ...

    @property
    def output_ids(self) -> tuple[int, ...]: ...

    @property
    def sampling(self) -> SamplingParams: ...


@dataclass(slots=True, eq=False)
class PromptJob:
    """How far a prompt with its kept output is.

    Token positions, in order:
    [0, num_cached)                 held by the prefix cache
    [num_cached, num_computed)      KV is in our pool
    [num_computed, num_scheduled)   in forwards that run or wait on the engine thread
    [num_scheduled, num_tokens)     to do
    """

    prompt: Prompt
    token_ids: tuple[int, ...]  # prompt and kept output
    choices: tuple[int, ...]  # that its end samples
    pages: list[int] = field(default_factory=list)  # one per page of token_ids, cached ones first
    num_cached: int = 0
    num_computed: int = 0
    num_scheduled: int = 0
    num_forwards: int = 0  # on the engine thread right now
    logprobs: list[TokenLogprob | None] = field(default_factory=list)  # of the prompt, where asked for
    hidden_states: list[bytes] = field(default_factory=list)  # of each chunk, where asked for

    @classmethod
    def of(cls, prompt: Prompt, choices: tuple[int, ...]) -> PromptJob:
        return cls(prompt, (*prompt.prompt_ids, *prompt.output_ids), choices)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_unscheduled(self) -> int:
        return self.num_tokens - self.num_scheduled

    @property
    def reusable_tokens(self) -> int:
        """How many leading tokens may come from the prefix cache."""
        prompt = self.prompt
        return num_reusable_tokens(self.num_tokens, prompt.sampling, has_output=bool(prompt.output_ids))

    def take_pages(self, pages: list[int], num_cached: int) -> None:
        """It can begin: all of its pages, of which the cache holds the first `num_cached` tokens."""
        self.pages = pages
        self.num_cached = self.num_computed = self.num_scheduled = num_cached

    def chunk(self, num_tokens: int) -> ScheduledRow:
        """The next tokens as a row of a forward. It samples every choice if it reaches the prompt's end."""
        prompt, sampling = self.prompt, self.prompt.sampling
        end = self.num_scheduled + num_tokens
        # They belong to the prompt's first attempt: later ones know them already.
        wants_logprobs = sampling.num_prompt_logprobs is not None and not prompt.output_ids
        return ScheduledRow(
            row_id=prompt.request_id,
            token_ids=self.token_ids,
            num_prompt_tokens=len(prompt.prompt_ids),
            start=self.num_scheduled,
            num_tokens=num_tokens,
            pages=self.pages,
            sampling=sampling,
            choices=self.choices if end == self.num_tokens else (),
            num_output_tokens=len(prompt.output_ids),
            prompt_logprobs_from=sampling.prompt_logprobs_start if wants_logprobs else None,
        )

    def scheduled(self, row: ScheduledRow) -> None:
        """This chunk was handed to the engine."""
        self.num_scheduled += row.num_tokens
        self.num_forwards += 1

    def computed(self, row: ScheduledRow, result: RowOutput) -> None:
        """This chunk's forward is done."""
        self.num_forwards -= 1
        self.num_computed += row.num_tokens
        if row.prompt_logprobs_from == 0 and row.start == 0:
            self.logprobs.append(None)  # nothing precedes the first token
        self.logprobs += result.prompt_logprobs
        self.hidden_states.append(result.prompt_hidden_states)
