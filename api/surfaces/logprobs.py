"""Log-probabilities in the shapes of OpenAI, vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import starmap
from typing import Any, Literal

from ...messages.sampling import AskedLogprobs, TokenLogprob
from ..slices import rows
from ..text.tokenization import Tokenizer
from .native_types import NativeLogprob
from .openai_types import (
    ChatLogprobs,
    ChatTokenLogprob,
    ChatTopLogprob,
    CompletionLogprobs,
    PromptLogprobs,
    VllmLogprob,
)

_LOWEST = -9999.0  # JSON has no infinity


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def _width(logprobs: Sequence[TokenLogprob | None]) -> int:
    """Entries of a row: of all tokens of a request the same is told."""
    of_one = logprobs[-1] if logprobs else None  # of the first prompt token there is none
    return 1 if of_one is None else 1 + len(of_one.top) + len(of_one.named)


def token_namer(tokenizer: Tokenizer, *, by_id: bool) -> Callable[[int], str]:
    """What tokens are called in logprobs: by their text, or as vLLM does by their ids."""
    return "token_id:{}".format if by_id else tokenizer.token_text


async def completion_logprobs(
    name: Callable[[int], str],
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    offsets: Sequence[int],
    num_top: int,
) -> CompletionLogprobs:
    """Parallel lists. Every dict holds the chosen token beside the most likely ones and those that the client
    named; null where there is no logprob (the first prompt token)."""

    def candidates(entry: TokenLogprob | None) -> dict[str, float] | None:
        return None if entry is None else _candidates(name, entry, num_top)

    return CompletionLogprobs(
        tokens=await rows(token_ids, name),
        token_logprobs=await rows(logprobs, lambda entry: None if entry is None else _finite(entry.logprob)),
        top_logprobs=await rows(logprobs, candidates, _width(logprobs)),
        text_offset=list(offsets),
    )


def _candidates(name: Callable[[int], str], entry: TokenLogprob, num_top: int) -> dict[str, float]:
    candidates: dict[str, float] = {}
    for token_id, logprob in (*entry.top[:num_top], (entry.token_id, entry.logprob), *entry.named):
        candidates.setdefault(name(token_id), _finite(logprob))
    return candidates


def concatenated(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


async def chat_logprobs(
    tokenizer: Tokenizer, name: Callable[[int], str], logprobs: Sequence[TokenLogprob]
) -> ChatLogprobs:
    """`top_logprobs` holds the most likely ones, then those that the client named."""

    def row(entry: TokenLogprob) -> ChatTokenLogprob:
        return ChatTokenLogprob(
            token=name(entry.token_id),
            logprob=_finite(entry.logprob),
            bytes=list(tokenizer.token_bytes(entry.token_id)),
            top_logprobs=[
                ChatTopLogprob(
                    token=name(token_id),
                    logprob=_finite(logprob),
                    bytes=list(tokenizer.token_bytes(token_id)),
                )
                for token_id, logprob in dict((*entry.top, *entry.named)).items()
            ],
        )

    return ChatLogprobs(content=await rows(logprobs, row, _width(logprobs)))


async def prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob | None], num_top: int
) -> PromptLogprobs:
    """vLLM's form: one dict per prompt token, from token id to candidate; the first is null."""

    def row(entry: TokenLogprob | None) -> dict[str, VllmLogprob] | None:
        return None if entry is None else _ranked(tokenizer, entry, num_top)

    return await rows(logprobs, row, _width(logprobs))


def _ranked(tokenizer: Tokenizer, entry: TokenLogprob, num_top: int) -> dict[str, VllmLogprob]:
    ranked = {
        str(token_id): VllmLogprob(
            logprob=_finite(logprob), rank=rank, decoded_token=tokenizer.token_text(token_id)
        )
        for rank, (token_id, logprob) in enumerate(entry.top[:num_top], 1)
    }
    chosen = VllmLogprob(
        logprob=_finite(entry.logprob), rank=None, decoded_token=tokenizer.token_text(entry.token_id)
    )
    ranked.setdefault(str(entry.token_id), chosen)
    return ranked


async def native_logprobs(
    tokenizer: Tokenizer,
    side: Literal["input", "output"],
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    asked: AskedLogprobs,
    *,
    with_text: bool,
) -> dict[str, Any]:
    """The fields of ``meta_info`` about the prompt (``input``) or the output, in SGLang's triples.

    Of a token that has no logprob they hold null.
    """

    def triple(token_id: int, logprob: float | None) -> NativeLogprob:
        finite = None if logprob is None else _finite(logprob)
        return finite, token_id, tokenizer.token_text(token_id) if with_text else None

    def own(pair: tuple[int, TokenLogprob | None]) -> NativeLogprob:
        token_id, entry = pair
        return triple(token_id, None if entry is None else entry.logprob)

    def likeliest(entry: TokenLogprob | None) -> list[NativeLogprob] | None:
        return None if entry is None else list(starmap(triple, entry.top))

    def named(entry: TokenLogprob | None) -> list[NativeLogprob] | None:
        return None if entry is None else list(starmap(triple, entry.named))

    fields: dict[str, Any] = {
        f"{side}_token_logprobs": await rows(list(zip(token_ids, logprobs, strict=True)), own)
    }
    if asked.num_top:
        fields[f"{side}_top_logprobs"] = await rows(logprobs, likeliest, _width(logprobs))
    if asked.token_ids:
        fields[f"{side}_token_ids_logprobs"] = await rows(logprobs, named, _width(logprobs))
    return fields
