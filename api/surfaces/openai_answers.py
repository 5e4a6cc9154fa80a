"""What the answers of /v1/completions and /v1/chat/completions have in common."""

from __future__ import annotations

import time

from msgspec import UNSET, UnsetType

from ...runtime.version import VERSION
from ..generation import WeightSpan
from ..text.pieces import OutputDelta
from ..text.pipeline import TextRun
from ..text.timelines import TimelineBody
from .logprobs import prompt_logprobs, token_namer
from .openai_types import (
    CachedTokensDetails,
    Extension,
    OpenAIRequest,
    PromptLogprobs,
    PromptTokensDetails,
    Usage,
)
from .serving import Serving

SYSTEM_FINGERPRINT = f"pdserve-{VERSION}"


class OpenAIAnswer:
    """The fields of one answer, as far as its request asked for them; UNSET where it did not."""

    def __init__(self, serving: Serving, body: OpenAIRequest, run: TextRun, answer_id: str) -> None:
        self._tokenizer = serving.tokenizer
        self._eos_token_ids = serving.card.eos_token_ids
        self._body = body
        self._run = run
        self.id = answer_id
        self.model = serving.card.name
        self.created = int(time.time())
        options = body.stream_options
        self._tells_usage = options is not None and options.include_usage
        self._tells_every_usage = self._tells_usage and options is not None and options.continuous_usage_stats
        self.name = token_namer(serving.tokenizer, by_id=body.return_tokens_as_token_ids)  # in logprobs

    @property
    def has_last_chunk(self) -> bool:
        """Whether a chunk without choices ends the stream."""
        return self._tells_usage or self._body.timeline or self._body.return_cached_tokens_details

    # ---- of the whole ---------------------------------------------------------------------------

    def usage(self) -> Usage:
        counts = self._run.counts()
        return Usage(
            prompt_tokens=counts.prompt,
            completion_tokens=counts.completion,
            total_tokens=counts.prompt + counts.completion,
            prompt_tokens_details=PromptTokensDetails(counts.cached),
        )

    def chunk_usage(self) -> Usage | UnsetType:
        """So far, in a chunk that is not the last."""
        return self.usage() if self._tells_every_usage else UNSET

    def last_usage(self) -> Usage | UnsetType:
        return self.usage() if self._tells_usage else UNSET

    def extension(self) -> Extension | UnsetType:
        if not self._body.return_cached_tokens_details:
            return UNSET
        return Extension(cached_tokens_details=CachedTokensDetails(device=self._run.counts().cached))

    async def timeline(self) -> TimelineBody | UnsetType:
        return await self._run.timeline() if self._body.timeline else UNSET

    async def prompt_logprobs(self, prompt: int) -> PromptLogprobs | UnsetType:
        if (num_top := self._body.prompt_logprobs) is None:
            return UNSET
        return await prompt_logprobs(self._tokenizer, self._run.info(prompt).report.logprobs, num_top)

    def prompt_token_ids(self, prompt: int) -> tuple[int, ...] | UnsetType:
        return self._run.spec(prompt).work.prompt_ids if self._body.return_token_ids else UNSET

    # ---- of an output ---------------------------------------------------------------------------

    def token_ids(self, delta: OutputDelta) -> tuple[int, ...] | UnsetType:
        return delta.token_ids if self._body.return_token_ids else UNSET

    def stop_reason(self, delta: OutputDelta) -> str | int | None:
        """As in vLLM: the stop string or stop token; null when the model ended by itself."""
        return None if delta.matched in self._eos_token_ids else delta.matched

    def weight_version(self, delta: OutputDelta) -> str | UnsetType:
        """In the chunk that ends it."""
        return UNSET if delta.finish_reason is None else self._run.weight_version

    def weight_versions(self, delta: OutputDelta) -> list[WeightSpan] | UnsetType:
        if delta.finish_reason is None:
            return UNSET
        return self._run.weight_versions(delta.output) or UNSET
