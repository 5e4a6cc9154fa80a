"""Renders a chat into a prompt as Hugging Face's ``apply_chat_template`` does, without transformers.

Templates come with checkpoints and are untrusted code: they run in jinja2's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...runtime.errors import PdserveError, RequestError, StartupError

# Appended to the message to be continued, so that the cut is found whatever the template adds after it. The
# trailing space tells whether the template strips its messages.
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks what the assistant says, for training. Here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(fmt: str) -> str:
    return datetime.now().strftime(fmt)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter, this one does not escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class UnreadableTemplateError(PdserveError):
    """A checkpoint's chat template is no template. The message says why."""


def read_given(argument: str) -> str:
    """The template that ``--chat-template`` names: a file's text, or the argument itself when it is a
    template, which has braces. Raises StartupError when it cannot be compiled either way."""
    source, file = argument, Path(argument).expanduser()
    if not any(mark in argument for mark in ("{{", "{%", "\n")):
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"--chat-template {argument} cannot be read: {error}") from error
    try:
        ChatTemplate(source, {})
    except UnreadableTemplateError as error:
        raise StartupError(f"--chat-template: {' '.join(str(error).split())}") from error
    return source


class ChatTemplate:
    """One compiled template. ``special_tokens`` (``bos_token`` …) are visible to it by name.

    Raises UnreadableTemplateError.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError) as error:
            # from jinja2's parser, or from Python's, which compiles what jinja2 makes of it
            raise UnreadableTemplateError(f"it cannot be compiled: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._knows_developer = "developer" in source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Raises RequestError (400) when the template refuses the messages."""
        chat = [dict(message) for message in messages]
        if not self._knows_developer:  # OpenAI's newer name of the system role
            for message in chat:
                if message["role"] == "developer":
                    message["role"] = "system"
        if continue_final_message:
            if not chat[-1].get("content"):
                raise RequestError("The final message has no text to continue.", param="messages")
            chat[-1]["content"] += _CONTINUE_TAG
        variables = {
            **self._special_tokens,
            "tools": list(tools) or None,
            "documents": None,
            **(template_kwargs or {}),
            "messages": chat,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(variables)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            AttributeError,
        ) as error:
            # The template is code and the messages are its input: whatever it trips over is in the request.
            raise RequestError(
                f"The model's chat template refused the messages: {error}", param="messages"
            ) from error
        return _cut_at_tag(text) if continue_final_message else text


def _cut_at_tag(text: str) -> str:
    cut = text.rfind(_CONTINUE_TAG.strip())
    if cut < 0:
        raise RequestError(
            "The model's chat template drops the final message, so it cannot be continued.",
            param="continue_final_message",
        )
    keeps_spaces = text[cut:].startswith(_CONTINUE_TAG)
    return text[:cut] if keeps_spaces else text[:cut].rstrip()
