"""Text to token ids and back, as a Hugging Face tokenizer does it, over ``tokenizers`` alone."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders

from ...runtime.errors import RequestError, StartupError, UnexpectedError, is_panic
from .chat_template import ChatTemplate, UnreadableTemplateError, read_given

_log = logging.getLogger(__name__)

# Encoding runs at about 1 MB/s; what is longer than this goes to a thread so that streams do not stutter.
_INLINE_CHARS = 2_000
_INLINE_TOKENS = 10_000  # likewise for decoding, at about 5 million tokens a second
# What is longer than this waits for the one thread of the large, so that small ones overtake it.
_LARGE_CHARS = 100_000
_LARGE_TOKENS = 100_000
_NUM_SMALL_THREADS = 2
# Canonical composition makes at most one byte of three (https://unicode.org/faq/normalization.html#12).
_COMPOSITION = 3
_PROBE_CHARS_PER_TOKEN = 16
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary, and back."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(shifted)}


_BYTE_OF_CHAR = _byte_level_alphabet()


_NO_TEMPLATE = "The model has no chat template; use /v1/completions."


class Tokenizer:
    """One model's tokenizer with its chat template. Read-only, so threads may share it."""

    def __init__(
        self,
        backend: RustTokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        no_chat: str = _NO_TEMPLATE,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """`no_chat`: why there is no template, for who asks for a chat."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._no_chat = no_chat
        self._chat = None if chat_template is None else self._compiled(chat_template, special_tokens or {})
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.config = dict(config or {})  # tokenizer_config.json as it is
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        # Every token of a byte-level vocabulary is a fixed run of bytes, whatever stands around it.
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        self._longest_token = self._longest_token_bytes()
        # Threads start with their first work. One for the large bounds their memory (about 100 bytes a byte).
        self._small = ThreadPoolExecutor(_NUM_SMALL_THREADS, thread_name_prefix="tokenize")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="tokenize-large")

    @classmethod
    def from_directory(cls, directory: str | Path, given_template: str = "") -> Tokenizer:
        """Reads tokenizer.json, and tokenizer_config.json and chat_template.jinja where there are any; with
        `given_template`, what ``--chat-template`` names, that one is used instead.

        Raises StartupError when there is no tokenizer to be had, or `given_template` is none. Of a chat
        template of the folder that cannot be read a warning tells, and who asks for a chat: completions need
        none.
        """
        folder = Path(directory)
        vocabulary = folder / "tokenizer.json"
        if not vocabulary.is_file():
            raise StartupError(f"{folder} has no tokenizer.json: name a Hugging Face checkpoint's folder")
        try:
            backend = RustTokenizer.from_file(str(vocabulary))
        except Exception as error:  # tokenizers raises nothing more special
            raise StartupError(f"{vocabulary} is no tokenizer: {_one_line(error)}") from error
        config = _read_json(folder / "tokenizer_config.json")
        template, no_chat = None, _NO_TEMPLATE
        try:
            template = read_given(given_template) if given_template else _chat_template(folder, config)
        except UnreadableTemplateError as error:
            no_chat = _unreadable(error)
        return cls(
            backend,
            special_tokens=_special_tokens(config),
            chat_template=template,
            no_chat=no_chat,
            config=config,
        )

    def _compiled(self, source: str, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
        try:
            return ChatTemplate(source, special_tokens)
        except UnreadableTemplateError as error:
            self._no_chat = _unreadable(error)
            return None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        with _panics_contained():
            if len(text) <= _INLINE_CHARS:
                return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            # As a batch of one, which releases the GIL; `encode` keeps it all along.
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Like ``encode``; a long text is encoded in a thread, and a short one need not wait for it."""
        if len(text) <= _INLINE_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        threads = self._small if len(text) <= _LARGE_CHARS else self._large
        encode = partial(self.encode, text, add_special_tokens=add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(threads, encode)

    def max_text_bytes(self, num_tokens: int) -> int:
        """No text longer than this, as UTF-8, has only `num_tokens` tokens.

        Each token stands for at most the bytes of the vocabulary's longest one, and for three times as many
        where the tokenizer normalizes. A vocabulary with an unknown token, or a normalizer that drops text,
        can squeeze any length into a few tokens: such texts are beyond the bound all the same.
        """
        shrinks = self._backend.normalizer is not None
        return num_tokens * self._longest_token * (_COMPOSITION if shrinks else 1)

    async def is_longer_than(self, text: str, num_tokens: int) -> bool:
        """Whether `text` has surely more than `num_tokens` tokens: told by its length, or by its beginning.

        Encoding costs time and about 100 bytes of memory a byte: hopeless texts are not encoded whole. Where
        the beginning alone has twice as many tokens, a cut inside a word can make no difference.
        """
        if len(text) > (most := self.max_text_bytes(num_tokens)) or (
            len(text) * 4 > most and len(text.encode(errors="replace")) > most
        ):
            return True
        beginning = _PROBE_CHARS_PER_TOKEN * num_tokens
        if len(text) <= 2 * beginning:
            return False
        return len(await self.encode_async(text[:beginning], add_special_tokens=False)) > 2 * num_tokens

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        with _panics_contained():
            if len(token_ids) <= _INLINE_TOKENS:
                return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
            # As a batch of one, which releases the GIL; `decode` keeps it all along.
            return self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)[0]

    async def decode_async(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Like ``decode``; many ids are decoded in a thread, and a few need not wait for it."""
        if len(token_ids) <= _INLINE_TOKENS:
            return self.decode(token_ids, skip_special_tokens=skip_special_tokens)
        threads = self._small if len(token_ids) <= _LARGE_TOKENS else self._large
        decode = partial(self.decode, token_ids, skip_special_tokens=skip_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(threads, decode)

    def token_string(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for an id that has none."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(self.token_string(token_id))
        return known

    def token_text(self, token_id: int) -> str:
        """The token's own text; ``bytes:\\xe4\\xbd`` for a piece of a character, so names stay distinct."""
        known = self._texts.get(token_id)
        if known is None:
            known = self._texts[token_id] = _printable(self.token_bytes(token_id))
        return known

    def is_byte_token(self, token_id: int) -> bool:
        """Whether this is one byte of a byte-fallback vocabulary, which decodes only as part of its run."""
        return _BYTE_TOKEN.fullmatch(self.token_string(token_id)) is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        if self._chat is None:
            raise RequestError(
                self._no_chat,
                code="no_chat_template",
                param="messages",
            )
        return self._chat.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template_kwargs=template_kwargs,
        )

    def _longest_token_bytes(self) -> int:
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        return max(
            (
                len(token) if self.is_byte_level and token not in added else len(token.encode())
                for token in self._backend.get_vocab(with_added_tokens=True)
            ),
            default=1,
        )

    def _spell(self, token: str) -> bytes:
        if self.is_byte_level:
            if all(char in _BYTE_OF_CHAR for char in token):
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            return token.encode()  # an added token, spelled as it is
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte:
            return bytes.fromhex(byte[1])
        return token.replace("▁", " ").encode()


@contextmanager
def _panics_contained() -> Iterator[None]:
    """A panic of the library in Rust is no Exception, and would end more than the request that it is of."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise UnexpectedError(f"the tokenizer has panicked: {error}") from error


def _printable(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _read_json(path: Path) -> dict[str, Any]:
    """Its object; empty without a file. Raises StartupError."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(f"{path} cannot be read: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise StartupError(f"{path} must hold a JSON object")
    return content


def _unreadable(error: UnreadableTemplateError) -> str:
    """What who asks for a chat is told; the log is, now."""
    _log.warning("chats are refused, as the chat template is unreadable: %s", _one_line(error))
    return f"The model's chat template is unreadable ({_one_line(error)}); use /v1/completions."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Name → token, of those that tokenizer_config.json sets (as a string, or as an added token's fields)."""
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or the config's template: a string, or a list of named ones.

    Raises UnreadableTemplateError.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UnreadableTemplateError(f"{file.name}: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise UnreadableTemplateError("chat_template of tokenizer_config.json is no text")
    return template
