"""An answer as /v1/completions writes it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from ..slices import HOLE, filled
from ..text.pieces import Echo, OutputDelta
from ..text.pipeline import TextRun
from ..text.timelines import TimelineBody
from .logprobs import completion_logprobs, concatenated
from .openai_answers import SYSTEM_FINGERPRINT, OpenAIAnswer
from .openai_types import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Extension,
    Usage,
)
from .serving import Serving


class CompletionRenderer:
    def __init__(self, serving: Serving, body: CompletionRequest, run: TextRun, answer_id: str) -> None:
        self._num_top = body.logprobs
        self._run = run
        self._answer = OpenAIAnswer(serving, body, run, answer_id)
        self._echoed: dict[int, CompletionLogprobs] = {}  # by prompt

    async def chunks(self, delta: OutputDelta) -> list[bytes]:
        answer = self._answer
        choices = [await self._choice(delta)]
        return [
            self._encoded(choices, usage=answer.chunk_usage(), weight_version=answer.weight_version(delta))
        ]

    async def last_chunks(self) -> list[bytes]:
        answer = self._answer
        if not answer.has_last_chunk:
            return []
        timeline = await answer.timeline()
        return [self._encoded([], usage=answer.last_usage(), timeline=timeline, sglext=answer.extension())]

    async def output(self, delta: OutputDelta) -> bytes:
        return msgspec.json.encode(await self._choice(delta))

    async def whole(self, outputs: Sequence[bytes]) -> list[bytes]:
        answer = self._answer
        document = self._encoded(
            [HOLE],
            usage=answer.usage(),
            weight_version=self._run.weight_version,
            timeline=await answer.timeline(),
            sglext=answer.extension(),
        )
        return filled(document, outputs)

    def _encoded(
        self,
        choices: list[CompletionChoice],
        *,
        usage: Usage | UnsetType,
        weight_version: str | UnsetType = UNSET,
        timeline: TimelineBody | UnsetType = UNSET,
        sglext: Extension | UnsetType = UNSET,
    ) -> bytes:
        return msgspec.json.encode(
            Completion(
                id=self._answer.id,
                created=self._answer.created,
                model=self._answer.model,
                system_fingerprint=SYSTEM_FINGERPRINT,
                choices=choices,
                usage=usage,
                weight_version=weight_version,
                timeline=timeline,
                sglext=sglext,
            )
        )

    async def _choice(self, delta: OutputDelta) -> CompletionChoice:
        """A choice's first tells of its prompt, too."""
        answer, prompt = self._answer, delta.output.prompt
        return CompletionChoice(
            index=delta.output.index,
            text=delta.content if delta.echo is None else delta.echo.text + delta.content,
            logprobs=await self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=answer.stop_reason(delta),
            token_ids=answer.token_ids(delta),
            weight_versions=answer.weight_versions(delta),
            prompt_token_ids=answer.prompt_token_ids(prompt) if delta.is_first else UNSET,
            prompt_logprobs=await answer.prompt_logprobs(prompt) if delta.is_first else UNSET,
        )

    async def _logprobs(self, delta: OutputDelta) -> CompletionLogprobs | None:
        if self._num_top is None:
            return None
        generated = await completion_logprobs(
            self._answer.name, delta.token_ids, delta.logprobs, delta.text_offsets, self._num_top
        )
        if delta.echo is None:
            return generated
        return concatenated(
            await self._echo_logprobs(delta.output.prompt, delta.echo, self._num_top), generated
        )

    async def _echo_logprobs(self, prompt: int, echo: Echo, num_top: int) -> CompletionLogprobs:
        """One for all of the prompt's choices."""
        if prompt not in self._echoed:
            self._echoed[prompt] = await completion_logprobs(
                self._answer.name,
                echo.token_ids,
                self._run.info(prompt).report.logprobs,
                echo.text_offsets,
                num_top,
            )
        return self._echoed[prompt]
