"""The messages of a chat, as the chat template takes them, and the prompt that it makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ...runtime.errors import RequestError
from ..generation import ModelCard
from ..http.json_slices import JsonTooLargeError, decode_slices
from ..refusals import bad_type, bad_value, unsupported
from ..slices import MAX_INLINE_MESSAGES, at_once, in_thread
from ..text.prompts import encode_prompt, too_long_text
from ..text.tokenization import Tokenizer

_ROLES = ("system", "developer", "user", "assistant", "tool")
_UNSUPPORTED_IN_MESSAGES = ("function_call", "audio")
# Clients send them empty; templates ask whether they are there.
_ASSISTANT_FIELDS = ("tool_calls", *_UNSUPPORTED_IN_MESSAGES, "refusal", "annotations")


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
