"""POST /v1/completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ..generation import GenerateSpec
from ..http.fields import OPENAI_RULES, chosen_salt
from ..http.sse import event
from ..refusals import bad_value, check_model, unsupported
from ..request_ids import bare_id
from ..slices import HOLE, SLICE_ENTRIES, filled, sliced, spaced
from ..text.detokenizer import TextDelta, empty_delta, joined, text_decoder
from ..text.pipeline import TextJob, TextRun
from ..text.prompts import Prompt, check_num_outputs, read_prompts
from ..text.sampling import checked_choices, checked_logprobs, checked_priority, resolve_max_tokens
from ..text.timelines import Laps, TimelineBody
from .answering import receive, respond
from .logprobs import completion_logprobs, concatenated, prompt_logprobs, token_namer
from .metrics import RequestMeter
from .openai_requests import (
    SYSTEM_FINGERPRINT,
    Envelope,
    choose_request_id,
    extension_of,
    has_last_chunk,
    includes_usage,
    openai_sampling,
    stop_reason,
    text_options,
    usage_in_every_chunk,
    usage_of,
)
from .openai_types import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Extension,
    PromptLogprobs,
    Usage,
)
from .serving import Serving

DEFAULT_MAX_TOKENS = 16


class Completions:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def handle(self, http: Request) -> Response:
        serving = self._serving
        body, laps = await receive(http, serving, CompletionRequest, OPENAI_RULES)
        meter = serving.metrics.meter(streamed=body.stream)
        check_model(body.model, serving.card)
        laps.lap("receive")
        prompts = await self._prompts(body)
        laps.lap("tokenize")
        request_id = choose_request_id(http, body, serving)
        envelope = Envelope(f"cmpl-{bare_id(request_id)}", serving.card.name)
        jobs = await self._jobs(body, prompts, envelope.id)
        answer = _CompletionAnswer(serving, body, prompts, jobs, envelope, meter, laps)
        return await respond(
            http, answer, jobs, request_id=request_id, stream=body.stream, in_flight=serving.in_flight
        )

    async def _prompts(self, body: CompletionRequest) -> list[Prompt]:
        return await read_prompts(
            body.prompt,
            "prompt",
            card=self._serving.card,
            tokenizer=self._serving.tokenizer,
            add_special_tokens=body.add_special_tokens,
            generates=body.max_tokens != 0,
        )

    async def _jobs(
        self, body: CompletionRequest, prompts: Sequence[Prompt], answer_id: str
    ) -> list[TextJob]:
        serving = self._serving
        choices = checked_choices(body.n)
        check_num_outputs(len(prompts) * choices)
        if body.best_of not in (None, choices):
            raise unsupported("best_of", "only the value of `n`")
        num_logprobs = checked_logprobs("logprobs", body.logprobs)
        wanted = [checked_logprobs("prompt_logprobs", body.prompt_logprobs)]
        if body.echo:
            wanted.append(num_logprobs)
        num_prompt_logprobs = max((number for number in wanted if number is not None), default=None)
        if body.max_tokens == 0:
            _check_scoring(body)
        options = text_options(body)
        specs = [
            GenerateSpec(
                request_id=answer_id if len(prompts) == 1 else f"{answer_id}-{position}",
                prompt_ids=prompt.token_ids,
                sampling=openai_sampling(
                    body,
                    serving,
                    max_tokens=(
                        1
                        if body.max_tokens == 0
                        else resolve_max_tokens(
                            body.max_tokens,
                            DEFAULT_MAX_TOKENS,
                            len(prompt.token_ids),
                            serving.card,
                            "max_tokens",
                        )
                    ),
                    num_logprobs=num_logprobs,
                    num_prompt_logprobs=num_prompt_logprobs,
                ),
                has_default_length=body.max_tokens is None,
                num_choices=choices,
                stream=body.stream or bool(options.stops),
                priority=checked_priority(body.priority),
                cache_salt=chosen_salt(body.cache_salt, body.extra_key),
            )
            async for position, prompt in spaced(enumerate(prompts))
        ]
        return [TextJob(spec, options, is_scored=body.max_tokens == 0) for spec in specs]


def _check_scoring(body: CompletionRequest) -> None:
    """``max_tokens`` 0 asks for nothing but the prompt itself."""
    if not body.echo and body.prompt_logprobs is None:
        raise bad_value("max_tokens", "`max_tokens` may be 0 only with `echo` or `prompt_logprobs`.")
    if body.n != 1:
        raise bad_value("n", "`n` must be 1 when `max_tokens` is 0.")


@dataclass(frozen=True, slots=True)
class _Ending:
    """What stands in the last part of an answer alone, where it was asked for."""

    timeline: TimelineBody | UnsetType = UNSET
    extension: Extension | UnsetType = UNSET


_NOT_THE_LAST = _Ending()


class _CompletionAnswer:
    def __init__(
        self,
        serving: Serving,
        body: CompletionRequest,
        prompts: Sequence[Prompt],
        jobs: Sequence[TextJob],
        envelope: Envelope,
        meter: RequestMeter,
        laps: Laps,
    ) -> None:
        self._tokenizer = serving.tokenizer
        self._card = serving.card
        self._body = body
        self._prompts = prompts
        self._jobs = jobs
        self._envelope = envelope
        self._meter = meter
        self._run = TextRun(serving.pipeline, jobs, laps)
        self._begun: set[tuple[int, int]] = set()  # (prompt, choice) whose first chunk is out
        self._echo_texts: dict[int, str] = {}  # by prompt, of those given as ids
        self._echoed: dict[int, CompletionLogprobs] = {}  # by prompt

    async def events(self) -> AsyncGenerator[bytes, None]:
        every_usage = usage_in_every_chunk(self._body)
        async with aclosing(self._deltas()) as deltas:
            async for prompt, delta in deltas:
                self._meter.add_chunk((prompt, delta.choice), len(delta.token_ids), delta.finish_reason)
                choice = await self._choice(prompt, delta)
                yield self._event([choice], usage_of(self._run.counts()) if every_usage else UNSET)
        usage = usage_of(self._run.counts())
        self._meter.answered(usage.prompt_tokens)
        if has_last_chunk(self._body):
            yield self._event([], usage if includes_usage(self._body) else UNSET, await self._ending())

    async def whole(self) -> list[bytes]:
        parts: dict[tuple[int, int], list[TextDelta]] = defaultdict(list)
        async with aclosing(self._deltas()) as deltas:
            async for prompt, delta in deltas:
                parts[prompt, delta.choice].append(delta)
        choices = []
        async for (prompt, number), pieces in spaced(sorted(parts.items())):
            delta = joined(pieces)
            self._meter.add_chunk((prompt, number), len(delta.token_ids), delta.finish_reason)
            choices.append(msgspec.json.encode(await self._choice(prompt, delta)))
        usage = usage_of(self._run.counts())
        self._meter.answered(usage.prompt_tokens)
        version, ending = self._run.weight_version, await self._ending()
        return filled(msgspec.json.encode(self._completion([HOLE], usage, version, ending)), choices)

    def _deltas(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        if self._body.max_tokens == 0 and self._jobs[0].spec.sampling.num_prompt_logprobs is None:
            return self._echoes()
        return self._run.deltas()

    async def _echoes(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Nothing but the prompts is asked for: no node is needed."""
        for prompt in range(len(self._prompts)):
            yield prompt, empty_delta("length")

    def _event(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType, ending: _Ending = _NOT_THE_LAST
    ) -> bytes:
        ends_choice = any(choice.finish_reason is not None for choice in choices)
        weight_version = self._run.weight_version if ends_choice else UNSET
        return event(msgspec.json.encode(self._completion(choices, usage, weight_version, ending)))

    async def _ending(self) -> _Ending:
        return _Ending(
            timeline=await self._run.timeline() if self._body.timeline else UNSET,
            extension=extension_of(self._run.counts()) if self._body.return_cached_tokens_details else UNSET,
        )

    def _completion(
        self,
        choices: list[CompletionChoice],
        usage: Usage | UnsetType,
        weight_version: str | UnsetType,
        ending: _Ending,
    ) -> Completion:
        return Completion(
            id=self._envelope.id,
            created=self._envelope.created,
            model=self._envelope.model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=choices,
            usage=usage,
            weight_version=weight_version,
            timeline=ending.timeline,
            sglext=ending.extension,
        )

    async def _choice(self, prompt: int, delta: TextDelta) -> CompletionChoice:
        body = self._body
        is_first = (prompt, delta.choice) not in self._begun
        self._begun.add((prompt, delta.choice))
        echo = await self._echo(prompt) if is_first and body.echo else ""
        return CompletionChoice(
            index=prompt * body.n + delta.choice,
            text=echo + delta.text,
            logprobs=await self._logprobs(prompt, delta, is_first=is_first),
            finish_reason=delta.finish_reason,
            stop_reason=stop_reason(delta, self._card),
            token_ids=delta.token_ids if body.return_token_ids else UNSET,
            weight_versions=(
                UNSET if delta.finish_reason is None else self._run.weight_versions(prompt, delta.choice)
            ),
            prompt_token_ids=(
                self._prompts[prompt].token_ids if is_first and body.return_token_ids else UNSET
            ),
            prompt_logprobs=await self._prompt_logprobs(prompt) if is_first else UNSET,
        )

    async def _echo(self, prompt: int) -> str:
        text = self._prompts[prompt].text
        if text is None:
            text = self._echo_texts.get(prompt)
        if text is None:
            text = self._echo_texts[prompt] = await self._tokenizer.decode_async(
                self._prompts[prompt].token_ids, skip_special_tokens=self._body.skip_special_tokens
            )
        return text

    async def _logprobs(self, prompt: int, delta: TextDelta, *, is_first: bool) -> CompletionLogprobs | None:
        num_top = self._body.logprobs
        if num_top is None:
            return None
        start = len(await self._echo(prompt)) if self._body.echo else 0
        name = token_namer(self._tokenizer, by_id=self._body.return_tokens_as_token_ids)
        generated = await completion_logprobs(
            name,
            delta.token_ids,
            delta.logprobs,
            [start + offset for offset in delta.text_offsets],
            num_top,
        )
        if not (is_first and self._body.echo):
            return generated
        if prompt not in self._echoed:  # one for all choices
            self._echoed[prompt] = await completion_logprobs(
                name,
                self._prompts[prompt].token_ids,
                self._run.info(prompt).prompt_logprobs,
                await self._offsets(self._prompts[prompt]),
                num_top,
            )
        return concatenated(self._echoed[prompt], generated)

    async def _offsets(self, prompt: Prompt) -> list[int]:
        """Where the text of each prompt token begins in the echo.

        A prompt given as text is echoed as it is: a special token counts where the text spells it, and not
        where the tokenizer has added it.
        """
        skips_special = prompt.text is not None or self._body.skip_special_tokens
        decoder = text_decoder(self._tokenizer, skip_special_tokens=skips_special)
        offsets: list[int] = []
        num_chars = 0
        async for token_ids in sliced(prompt.token_ids, SLICE_ENTRIES):
            for token_id in token_ids:
                offsets.append(num_chars)
                piece = decoder.push(token_id)
                if prompt.text is not None and token_id in self._tokenizer.special_ids:
                    spelled = self._tokenizer.token_string(token_id)
                    piece = spelled if prompt.text.startswith(spelled, num_chars) else ""
                num_chars += len(piece)
        return offsets

    async def _prompt_logprobs(self, prompt: int) -> PromptLogprobs | UnsetType:
        num_top = self._body.prompt_logprobs
        if num_top is None:
            return UNSET
        return await prompt_logprobs(self._tokenizer, self._run.info(prompt).prompt_logprobs, num_top)
