"""POST /v1/chat/completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ...runtime.errors import RequestError
from ..generation import GenerateSpec, ModelCard, WeightSpan
from ..http.fields import OPENAI_RULES, chosen_salt
from ..http.json_slices import JsonTooLargeError, decode_slices
from ..http.sse import event
from ..refusals import bad_type, bad_value, check_model, unsupported
from ..request_ids import bare_id
from ..slices import HOLE, MAX_INLINE_MESSAGES, at_once, filled, in_thread, spaced
from ..text.detokenizer import TextDelta, joined
from ..text.pipeline import TextJob, TextRun
from ..text.prompts import check_prompt, encode_prompt, too_long_text
from ..text.sampling import checked_choices, checked_logprobs, checked_priority, resolve_max_tokens
from ..text.timelines import Laps, TimelineBody
from ..text.tokenization import Tokenizer
from .answering import receive, respond
from .logprobs import chat_logprobs, prompt_logprobs, token_namer
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

_ROLES = ("system", "developer", "user", "assistant", "tool")
_UNSUPPORTED_IN_MESSAGES = ("function_call", "audio")
# Clients send them empty; templates ask whether they are there.
_ASSISTANT_FIELDS = ("tool_calls", *_UNSUPPORTED_IN_MESSAGES, "refusal", "annotations")
_ROLE_DELTA = ChatDelta(role="assistant", content="")


def normalized_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each message with a known role and its content as one text; other fields are the template's affair."""
    if not messages:
        raise bad_value("messages", "`messages` is empty.")
    return [_normalized(message, f"messages[{position}]") for position, message in enumerate(messages)]


def _normalized(message: Mapping[str, Any], param: str) -> dict[str, Any]:
    role = message.get("role")
    if role not in _ROLES:
        raise bad_value(f"{param}.role", f"`role` must be one of {', '.join(_ROLES)}, got {role!r}.")
    for name in _UNSUPPORTED_IN_MESSAGES:
        if message.get(name):
            raise unsupported(f"{param}.{name}")
    given = {name: value for name, value in message.items() if name not in _ASSISTANT_FIELDS or value}
    given = {name: value for name, value in given.items() if value is not None}
    if calls := given.get("tool_calls"):
        given["tool_calls"] = _tool_calls(calls, f"{param}.tool_calls")
    content = message.get("content")
    if content is None and role == "assistant":  # it has called tools, or said nothing
        content = ""
    return {**given, "content": _text(content, f"{param}.content")}


def _tool_calls(calls: object, param: str) -> list[dict[str, Any]]:
    """Of a history: arguments as objects, which is what templates take; OpenAI's clients send JSON texts."""
    if not isinstance(calls, list):
        raise bad_type(param, "`tool_calls` must be a list.")
    parsed: list[dict[str, Any]] = []
    for position, call in enumerate(calls):
        here = f"{param}[{position}].function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_type(here, "A tool call must have a `function` with a `name`.")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = at_once(decode_slices(arguments.encode()))
            except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
                raise bad_value(f"{here}.arguments", f"`arguments` is not valid JSON: {error}") from None
            except JsonTooLargeError as error:
                raise bad_value(f"{here}.arguments", f"`arguments` has {error}.") from None
        if not isinstance(arguments, dict):
            raise bad_type(f"{here}.arguments", "`arguments` must be a JSON object.")
        parsed.append({**call, "function": {**function, "arguments": arguments}})
    return parsed


def _text(content: object, param: str) -> str:
    """A message's text: as it is, or its text parts, one a line."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_type(param, "`content` must be a text or a list of text parts.")
    texts: list[str] = []
    for position, part in enumerate(content):
        here = f"{param}[{position}]"
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise unsupported(f"{here}.type", f"{part['type']!r}; only text parts are")
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise bad_type(here, "A part of `content` must be an object with `type` and `text`.")
        texts.append(text)
    return "\n".join(texts)


def _num_parts(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    return 1 + (len(content) if isinstance(content, list) else 0)


async def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    add_special_tokens: bool,
    tools: Sequence[Mapping[str, Any]],
    template_kwargs: Mapping[str, Any],
    card: ModelCard,
) -> list[int]:
    """Messages to prompt ids through the chat template. To continue the final message excludes a new one.

    Each message, part and tool is at least a token: more than the context has are not rendered for it.
    """
    num_parts = len(tools) + sum(map(_num_parts, messages))
    if num_parts > card.max_model_len:
        raise RequestError(
            f"The chat has {num_parts} messages, parts and tools; the model's context of "
            f"{card.max_model_len} tokens cannot hold them.",
            param="messages",
            code="context_length_exceeded",
        )

    def render() -> str:
        normalized = normalized_messages(messages)
        num_chars = sum(len(message["content"]) for message in normalized)
        if num_chars > tokenizer.max_text_bytes(card.max_model_len):
            raise too_long_text(num_chars, card, "messages")
        return tokenizer.apply_chat_template(
            normalized,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            tools=tools,
            template_kwargs=template_kwargs,
        )

    # The arguments of a call may be megabytes of JSON.
    is_small = num_parts <= MAX_INLINE_MESSAGES and not any("tool_calls" in each for each in messages)
    prompt = render() if is_small else await in_thread(render)
    return await encode_prompt(
        prompt, "messages", card=card, tokenizer=tokenizer, add_special_tokens=add_special_tokens
    )


class ChatCompletions:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def handle(self, http: Request) -> Response:
        serving = self._serving
        body, laps = await receive(http, serving, ChatRequest, OPENAI_RULES)
        meter = serving.metrics.meter(streamed=body.stream)
        check_model(body.model, serving.card)
        if body.tool_choice not in ("none", "auto"):
            raise unsupported("tool_choice", 'only "none" and "auto" are')
        if body.tools and body.tool_choice != "none":
            raise unsupported(
                "tools", 'answers are not parsed for calls; `tool_choice` "none" shows them only'
            )
        laps.lap("receive")
        prompt_ids = await encode_chat(
            serving.tokenizer,
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            add_special_tokens=body.add_special_tokens,
            tools=body.tools,
            template_kwargs=body.chat_template_kwargs,
            card=serving.card,
        )
        check_prompt(prompt_ids, serving.card, "messages")
        laps.lap("tokenize")
        request_id = choose_request_id(http, body, serving)
        envelope = Envelope(f"chatcmpl-{bare_id(request_id)}", serving.card.name)
        job = self._job(body, prompt_ids, envelope.id)
        answer = _ChatAnswer(serving, body, job, envelope, meter, laps)
        return await respond(
            http, answer, [job], request_id=request_id, stream=body.stream, in_flight=serving.in_flight
        )

    def _job(self, body: ChatRequest, prompt_ids: Sequence[int], answer_id: str) -> TextJob:
        serving = self._serving
        top_logprobs = checked_logprobs("top_logprobs", body.top_logprobs)
        if top_logprobs and not body.logprobs:
            raise bad_value("top_logprobs", "`top_logprobs` needs `logprobs` to be true.")
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        options = text_options(body)
        spec = GenerateSpec(
            request_id=answer_id,
            prompt_ids=tuple(prompt_ids),
            sampling=openai_sampling(
                body,
                serving,
                max_tokens=resolve_max_tokens(wanted, None, len(prompt_ids), serving.card, name),
                num_logprobs=(top_logprobs or 0) if body.logprobs else None,
                num_prompt_logprobs=checked_logprobs("prompt_logprobs", body.prompt_logprobs),
            ),
            has_default_length=wanted is None,
            num_choices=checked_choices(body.n),
            stream=body.stream or bool(options.stops),
            priority=checked_priority(body.priority),
            cache_salt=chosen_salt(body.cache_salt, body.extra_key),
        )
        return TextJob(spec, options)


class _ChatAnswer:
    def __init__(
        self,
        serving: Serving,
        body: ChatRequest,
        job: TextJob,
        envelope: Envelope,
        meter: RequestMeter,
        laps: Laps,
    ) -> None:
        self._tokenizer = serving.tokenizer
        self._card = serving.card
        self._body = body
        self._prompt_ids = job.spec.prompt_ids
        self._envelope = envelope
        self._meter = meter
        self._run = TextRun(serving.pipeline, [job], laps)

    async def events(self) -> AsyncGenerator[bytes, None]:
        every_usage = usage_in_every_chunk(self._body)
        begun: set[int] = set()
        async with aclosing(self._run.deltas()) as deltas:
            async for _, delta in deltas:
                if delta.choice not in begun:
                    yield await self._role_event(delta.choice, is_first=not begun)
                    begun.add(delta.choice)
                self._meter.add_chunk(delta.choice, len(delta.token_ids), delta.finish_reason)
                yield self._event(
                    [await self._chunk_choice(delta)], usage_of(self._run.counts()) if every_usage else UNSET
                )
        usage = usage_of(self._run.counts())
        self._meter.answered(usage.prompt_tokens)
        if has_last_chunk(self._body):
            timeline = await self._timeline()
            yield self._event([], usage if includes_usage(self._body) else UNSET, timeline, is_last=True)

    async def whole(self) -> list[bytes]:
        parts: dict[int, list[TextDelta]] = defaultdict(list)
        async with aclosing(self._run.deltas()) as deltas:
            async for _, delta in deltas:
                parts[delta.choice].append(delta)
        choices = []
        async for number, pieces in spaced(sorted(parts.items())):
            delta = joined(pieces)
            self._meter.add_chunk(number, len(delta.token_ids), delta.finish_reason)
            choices.append(msgspec.json.encode(await self._choice(delta)))
        usage = usage_of(self._run.counts())
        self._meter.answered(usage.prompt_tokens)
        document = msgspec.json.encode(
            ChatCompletion(
                id=self._envelope.id,
                created=self._envelope.created,
                model=self._envelope.model,
                system_fingerprint=SYSTEM_FINGERPRINT,
                choices=[HOLE],
                usage=usage,
                weight_version=self._run.weight_version,
                prompt_token_ids=self._prompt_token_ids(),
                prompt_logprobs=await self._prompt_logprobs(),
                timeline=await self._timeline(),
                sglext=self._extension(),
            )
        )
        return filled(document, choices)

    async def _role_event(self, choice: int, *, is_first: bool) -> bytes:
        chunk = ChatChunk(
            id=self._envelope.id,
            created=self._envelope.created,
            model=self._envelope.model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=[ChatChunkChoice(index=choice, delta=_ROLE_DELTA)],
            prompt_token_ids=self._prompt_token_ids() if is_first else UNSET,
            prompt_logprobs=await self._prompt_logprobs() if is_first else UNSET,
        )
        return event(msgspec.json.encode(chunk))

    def _event(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType,
        timeline: TimelineBody | UnsetType = UNSET,
        *,
        is_last: bool = False,
    ) -> bytes:
        ends_choice = any(choice.finish_reason is not None for choice in choices)
        chunk = ChatChunk(
            id=self._envelope.id,
            created=self._envelope.created,
            model=self._envelope.model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=choices,
            usage=usage,
            weight_version=self._run.weight_version if ends_choice else UNSET,
            timeline=timeline,
            sglext=self._extension() if is_last else UNSET,
        )
        return event(msgspec.json.encode(chunk))

    async def _chunk_choice(self, delta: TextDelta) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=delta.choice,
            delta=ChatDelta(content=delta.text or UNSET),
            logprobs=await self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=stop_reason(delta, self._card),
            token_ids=delta.token_ids if self._body.return_token_ids else UNSET,
            weight_versions=self._weight_versions(delta),
        )

    async def _choice(self, delta: TextDelta) -> ChatChoice:
        return ChatChoice(
            index=delta.choice,
            message=ChatMessage(content=delta.text),
            logprobs=await self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=stop_reason(delta, self._card),
            token_ids=delta.token_ids if self._body.return_token_ids else UNSET,
            weight_versions=self._weight_versions(delta),
        )

    def _weight_versions(self, delta: TextDelta) -> list[WeightSpan] | UnsetType:
        return UNSET if delta.finish_reason is None else self._run.weight_versions(0, delta.choice)

    async def _logprobs(self, delta: TextDelta) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        name = token_namer(self._tokenizer, by_id=self._body.return_tokens_as_token_ids)
        return await chat_logprobs(self._tokenizer, name, delta.logprobs, self._body.top_logprobs or 0)

    def _prompt_token_ids(self) -> tuple[int, ...] | UnsetType:
        return self._prompt_ids if self._body.return_token_ids else UNSET

    async def _prompt_logprobs(self) -> PromptLogprobs | UnsetType:
        num_top = self._body.prompt_logprobs
        if num_top is None:
            return UNSET
        return await prompt_logprobs(self._tokenizer, self._run.info(0).prompt_logprobs, num_top)

    def _extension(self) -> Extension | UnsetType:
        return extension_of(self._run.counts()) if self._body.return_cached_tokens_details else UNSET

    async def _timeline(self) -> TimelineBody | UnsetType:
        return await self._run.timeline() if self._body.timeline else UNSET
