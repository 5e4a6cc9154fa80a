"""An answer as /v1/chat/completions writes it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from ..slices import HOLE, filled
from ..text.pieces import OutputDelta
from ..text.pipeline import TextRun
from ..text.timelines import TimelineBody
from .logprobs import chat_logprobs
from .openai_answers import SYSTEM_FINGERPRINT, OpenAIAnswer
from .openai_types import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Extension,
    PromptLogprobs,
    Usage,
)
from .serving import Serving

_ROLE_DELTA = ChatDelta(role="assistant", content="")


class ChatRenderer:
    def __init__(self, serving: Serving, body: ChatRequest, run: TextRun, answer_id: str) -> None:
        self._tokenizer = serving.tokenizer
        self._tells_logprobs = body.logprobs
        self._run = run
        self._answer = OpenAIAnswer(serving, body, run, answer_id)
        self._is_begun = False

    async def chunks(self, delta: OutputDelta) -> list[bytes]:
        """Before a choice's first comes one that tells the role; the very first tells of the prompt, too."""
        answer = self._answer
        choice = ChatChunkChoice(
            index=delta.output.index,
            delta=ChatDelta(content=delta.content or UNSET),
            logprobs=await self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=answer.stop_reason(delta),
            token_ids=answer.token_ids(delta),
            weight_versions=answer.weight_versions(delta),
        )
        chunk = self._chunk([choice], usage=answer.chunk_usage(), weight_version=answer.weight_version(delta))
        return [await self._role_chunk(delta.output.index), chunk] if delta.is_first else [chunk]

    async def last_chunks(self) -> list[bytes]:
        answer = self._answer
        if not answer.has_last_chunk:
            return []
        timeline = await answer.timeline()
        return [self._chunk([], usage=answer.last_usage(), timeline=timeline, sglext=answer.extension())]

    async def output(self, delta: OutputDelta) -> bytes:
        answer = self._answer
        return msgspec.json.encode(
            ChatChoice(
                index=delta.output.index,
                message=ChatMessage(content=delta.content),
                logprobs=await self._logprobs(delta),
                finish_reason=delta.finish_reason,
                stop_reason=answer.stop_reason(delta),
                token_ids=answer.token_ids(delta),
                weight_versions=answer.weight_versions(delta),
            )
        )

    async def whole(self, outputs: Sequence[bytes]) -> list[bytes]:
        answer = self._answer
        document = ChatCompletion(
            id=answer.id,
            created=answer.created,
            model=answer.model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=[HOLE],
            usage=answer.usage(),
            weight_version=self._run.weight_version,
            prompt_token_ids=answer.prompt_token_ids(0),
            prompt_logprobs=await answer.prompt_logprobs(0),
            timeline=await answer.timeline(),
            sglext=answer.extension(),
        )
        return filled(msgspec.json.encode(document), outputs)

    async def _role_chunk(self, index: int) -> bytes:
        choices = [ChatChunkChoice(index=index, delta=_ROLE_DELTA)]
        if self._is_begun:
            return self._chunk(choices)
        self._is_begun = True
        return self._chunk(
            choices,
            prompt_token_ids=self._answer.prompt_token_ids(0),
            prompt_logprobs=await self._answer.prompt_logprobs(0),
        )

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        *,
        usage: Usage | UnsetType = UNSET,
        weight_version: str | UnsetType = UNSET,
        prompt_token_ids: tuple[int, ...] | UnsetType = UNSET,
        prompt_logprobs: PromptLogprobs | UnsetType = UNSET,
        timeline: TimelineBody | UnsetType = UNSET,
        sglext: Extension | UnsetType = UNSET,
    ) -> bytes:
        return msgspec.json.encode(
            ChatChunk(
                id=self._answer.id,
                created=self._answer.created,
                model=self._answer.model,
                system_fingerprint=SYSTEM_FINGERPRINT,
                choices=choices,
                usage=usage,
                weight_version=weight_version,
                prompt_token_ids=prompt_token_ids,
                prompt_logprobs=prompt_logprobs,
                timeline=timeline,
                sglext=sglext,
            )
        )

    async def _logprobs(self, delta: OutputDelta) -> ChatLogprobs | None:
        if not self._tells_logprobs:
            return None
        return await chat_logprobs(self._tokenizer, self._answer.name, delta.logprobs)
