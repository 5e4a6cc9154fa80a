"""What an answer is made of, in no client's terms: surfaces render it.

A request asks for outputs: each of its prompts is continued by one or more choices. An output comes in
deltas, each with the pieces that its new tokens are to a client, and what is known of each of these tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias, assert_never

from ...messages.node import FinishReason
from ...messages.sampling import TokenLogprob


@dataclass(frozen=True, slots=True)
class Content:
    """What the model says to its reader."""

    text: str


# A tagged union: who reads pieces does so by ``match``, with ``assert_never`` for what it does not know.
Piece: TypeAlias = Content


@dataclass(frozen=True, slots=True)
class Output:
    """One continuation that a request has asked for."""

    prompt: int  # which of the request's
    choice: int  # of that prompt
    index: int  # among all: the first prompt's choices, then the second one's


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that stands before its outputs."""

    text: str
    token_ids: tuple[int, ...]
    text_offsets: tuple[int, ...]  # where each token's text begins; empty where no logprobs are told


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """New tokens of one output, in order, each exactly once."""

    output: Output
    pieces: tuple[Piece, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]  # as long as token_ids when asked for
    text_offsets: tuple[int, ...]  # where each token's text begins in the output's, behind the echo's
    num_tokens: int  # of the output with these
    finish_reason: FinishReason | None = None  # set on the last
    matched: str | int | None = None  # the stop string, or the stop or EOS token, that ended the output
    hidden_states: tuple[bytes, ...] = ()  # float32, as long as token_ids when asked for
    is_first: bool = False
    echo: Echo | None = None  # on the first, where it was asked for

    @property
    def content(self) -> str:
        """The text of its content, without pieces of any other kind."""
        return _content(self.pieces)


def joined(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Successive deltas of one output, as one."""
    if len(deltas) == 1:
        return deltas[0]
    first, last = deltas[0], deltas[-1]
    return OutputDelta(
        last.output,
        merged(chain.from_iterable(delta.pieces for delta in deltas)),
        tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
        tuple(chain.from_iterable(delta.text_offsets for delta in deltas)),
        last.num_tokens,
        last.finish_reason,
        last.matched,
        tuple(chain.from_iterable(delta.hidden_states for delta in deltas)),
        first.is_first,
        first.echo,
    )


def merged(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Neighbours of one kind as one piece."""
    return content_pieces(_content(pieces))


def content_pieces(text: str) -> tuple[Piece, ...]:
    return (Content(text),) if text else ()


def _content(pieces: Iterable[Piece]) -> str:
    texts: list[str] = []
    for piece in pieces:
        match piece:
            case Content(text):
                texts.append(text)
            case _:
                assert_never(piece)
    return "".join(texts)
