"""Token ids to pieces, and the stop strings that end them.

The text of an output's pieces, joined, is what its ids add to ``tokenizer.decode`` of the prompt: exactly,
also when the output ends inside a multi-byte character. What a later token may still change is held back
until it cannot.

When a stop string completes, the choice ends with the token whose text completed it: that token's id and
logprobs are the last ones given and it is counted in the usage; the text is cut before the stop string (or
after it, when the client wants it included). A stop or EOS *token* ends a choice on the node; its id and
logprobs are given and counted too, its text is not shown unless the client wants the stop included.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from ...messages.node import FinishReason
from ..generation import ChoiceDelta
from .pieces import Echo, Output, OutputDelta, content_pieces
from .tokenization import Tokenizer


class TextDecoder(Protocol):
    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; often one token's, sometimes none."""
        ...

    def finish(self) -> str:
        """The rest: what was held back in the hope of further tokens."""
        ...


class ByteLevelDecoder:
    """For byte-level vocabularies: a token is a run of bytes, so this is incremental UTF-8."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


_NUM_CONTEXT_TOKENS = 4  # of a prompt; what stands further left changes no token's text


class WindowDecoder:
    """For any other vocabulary: decodes a short window twice, without and with the new tokens.

    A window begins with the tokens of the piece before, because a token's text may depend on what stands left
    of it, and is cut only behind text that later tokens cannot change: not after a replacement character, and
    not inside a run of byte tokens, which are decoded together or all become replacement characters.
    The first window begins with the end of the prompt: a SentencePiece decoder drops the space before the
    first word of what it is given, and that is the prompt's, not the answer's.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window = self._context(prompt_ids)
        self._num_shown = len(self._window)  # leading tokens of the window whose text was given

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens, without byte tokens: bytes of an answer must not join their run."""
        visible = (
            token_id
            for token_id in reversed(prompt_ids)
            if not self._is_hidden(token_id) and not self._tokenizer.is_byte_token(token_id)
        )
        return list(islice(visible, _NUM_CONTEXT_TOKENS))[::-1]

    def _is_hidden(self, token_id: int) -> bool:
        return token_id in self._skipped or not self._tokenizer.token_string(token_id)

    def push(self, token_id: int) -> str:
        if self._is_hidden(token_id):
            return ""  # as if it were not there: a run of byte tokens goes on behind it
        self._window.append(token_id)
        if self._tokenizer.is_byte_token(token_id):
            return ""
        piece = self._new_text()
        if not piece or piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        del self._window[: self._num_shown]
        self._num_shown = len(self._window)
        return piece

    def finish(self) -> str:
        piece = self._new_text()
        self._num_shown = len(self._window)
        return piece

    def _new_text(self) -> str:
        shown = self._decode(self._window[: self._num_shown])
        return self._decode(self._window)[len(shown) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def text_decoder(
    tokenizer: Tokenizer, *, skip_special_tokens: bool, prompt_ids: Sequence[int] = ()
) -> TextDecoder:
    """For tokens that stand behind `prompt_ids`."""
    if tokenizer.is_byte_level:
        return ByteLevelDecoder(tokenizer, skip_special_tokens)
    return WindowDecoder(tokenizer, skip_special_tokens, prompt_ids)


class StopStrings:
    """Looks for stop strings in a growing text and holds back what may become one.

    The stop that *completes* first wins, of those the one that began first; so the answer does not depend on
    how the text was split into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str, *, may_match: bool = True) -> str:
        """The text that may be shown now. Sets ``matched`` when a stop string has completed in `piece`; where
        it must not match, what may become one later is held back all the same."""
        if not self._stops or not piece:
            return piece
        text = self._held + piece
        match = self._first_match(text, len(self._held)) if may_match else None
        if match is not None:
            start, self.matched = match
            self._held = ""
            return text[: start + len(self.matched)] if self._include else text[:start]
        split = len(text) - self._num_held(text)
        self._held = text[split:]
        return text[:split]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, num_old: int) -> tuple[int, str] | None:
        """Where a stop string begins that ends behind the first `num_old` characters, and which."""
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop, max(0, num_old - len(stop) + 1))) >= 0
        ]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            start = max(0, len(text) - len(stop) + 1)
            while (start := text.find(stop[0], start)) >= 0:
                if stop.startswith(text[start:]):
                    longest = max(longest, len(text) - start)
                    break
                start += 1
        return longest


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """How a request wants its text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0  # a stop string that completes in an earlier token does not count


class Detokenizer:
    """One output's tokens to pieces."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: TextOptions,
        output: Output,
        prompt_ids: Sequence[int] = (),
        echo: Echo | None = None,
    ) -> None:
        """`echo`: what stands before the output's own text, and is given with its first delta."""
        self._decoder = text_decoder(
            tokenizer, skip_special_tokens=options.skip_special_tokens, prompt_ids=prompt_ids
        )
        self._stops = StopStrings(options.stops, include=options.include_stop)
        self._include_stop = options.include_stop
        self._min_tokens = options.min_tokens
        self._output = output
        self._echo = echo
        self._is_begun = False
        self._num_tokens = 0  # decoded
        self._num_shown = 0  # given, a hidden stop token too
        self._num_chars = 0 if echo is None else len(echo.text)  # decoded so far, shown or held back
        self.is_finished = False

    def push(self, delta: ChoiceDelta) -> OutputDelta:
        """The client's view of `delta`; it ends early where a stop string completes."""
        text = ""
        offsets: list[int] = []
        shown = delta.token_ids[:-1] if self._hides_last(delta) else delta.token_ids
        for token_id in shown:
            offsets.append(self._num_chars)
            self._num_tokens += 1
            text += self._show(self._decoder.push(token_id))
            if self._stops.matched is not None:
                return self._stopped(delta, text, offsets)
        if delta.finish_reason is not None:
            offsets += [self._num_chars] * (len(delta.token_ids) - len(shown))
            text += self._show(self._decoder.finish())
            if self._stops.matched is not None:
                return self._stopped(delta, text, offsets)
            text += self._stops.finish()
            self.is_finished = True
        return self._shown(delta, text, offsets, delta.finish_reason, delta.matched)

    def _hides_last(self, delta: ChoiceDelta) -> bool:
        """Whether the last token is a stop token, whose text the client does not want."""
        return delta.finish_reason == "stop" and delta.matched is not None and not self._include_stop

    def _stopped(self, delta: ChoiceDelta, text: str, offsets: Sequence[int]) -> OutputDelta:
        self.is_finished = True
        return self._shown(delta, text, offsets, "stop", self._stops.matched)

    def _shown(
        self,
        delta: ChoiceDelta,
        text: str,
        offsets: Sequence[int],
        finish_reason: FinishReason | None,
        matched: str | int | None,
    ) -> OutputDelta:
        """The first of the delta's tokens, as many as have offsets."""
        is_first, self._is_begun = not self._is_begun, True
        num_new = len(offsets)
        self._num_shown += num_new
        return OutputDelta(
            self._output,
            content_pieces(text),
            delta.token_ids[:num_new],
            delta.logprobs[:num_new],
            tuple(offsets),
            self._num_shown,
            finish_reason,
            matched,
            delta.hidden_states[:num_new],
            is_first,
            self._echo if is_first else None,
        )

    def _show(self, piece: str) -> str:
        self._num_chars += len(piece)
        return self._stops.push(piece, may_match=self._num_tokens >= self._min_tokens)
