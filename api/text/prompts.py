"""Prompts as the endpoints take them (a text, texts, token ids, lists of those), and what bounds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from ...runtime.errors import RequestError
from ..generation import ModelCard
from ..refusals import bad_type, bad_value
from ..slices import spaced
from .tokenization import Tokenizer

MAX_PROMPTS = 1024
MAX_OUTPUTS = 16_384  # prompts times choices


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    text: str | None  # None: given as token ids


async def encode_prompt(
    text: str, param: str, *, card: ModelCard, tokenizer: Tokenizer, add_special_tokens: bool
) -> list[int]:
    """Raises RequestError that names `param`; a hopelessly long text is not encoded for it."""
    if await tokenizer.is_longer_than(text, card.max_model_len):
        raise too_long_text(len(text), card, param)
    return await tokenizer.encode_async(text, add_special_tokens=add_special_tokens)


async def read_prompts(
    given: str | list[str | int | list[int]],
    param: str,
    *,
    card: ModelCard,
    tokenizer: Tokenizer,
    add_special_tokens: bool = True,
    generates: bool = True,
) -> list[Prompt]:
    """`generates`: tokens are wanted behind each. Raises RequestError that names `param`."""
    items = [given] if isinstance(given, str) else batch_of(given, param, card=card)
    prompts: list[Prompt] = []
    async for item in spaced(items):
        if isinstance(item, str):
            ids = await encode_prompt(
                item, param, card=card, tokenizer=tokenizer, add_special_tokens=add_special_tokens
            )
            prompts.append(Prompt(tuple(ids), item))
        elif isinstance(item, list):
            prompts.append(Prompt(tuple(item), None))
        check_prompt(prompts[-1].token_ids, card, param, generates=generates)
    return prompts


def batch_of(
    given: Sequence[str | int | list[int]], param: str, *, card: ModelCard
) -> Sequence[str | list[int]]:
    """A list as prompts: itself, or the one that its ids are.

    Raises RequestError, but not for an id too many: the length is told, by `check_prompt`, before a million
    items are looked at.
    """
    is_one = bool(given) and isinstance(given[0], int)
    if not is_one and not 1 <= len(given) <= MAX_PROMPTS:
        raise bad_value(param, f"`{param}` takes 1 to {MAX_PROMPTS} prompts, got {len(given)}.")
    is_too_long = is_one and len(given) > card.max_model_len
    if not is_too_long and len(set(map(type, given))) > 1:
        raise bad_type(param, f"`{param}` must not mix texts, token ids and lists of those.")
    return [cast("list[int]", given)] if is_one else cast("Sequence[str | list[int]]", given)


def check_num_outputs(num_outputs: int) -> None:
    """Of a request: prompts times choices."""
    if num_outputs > MAX_OUTPUTS:
        raise bad_value("n", f"`n` times the prompts must be at most {MAX_OUTPUTS}, got {num_outputs}.")


def check_prompt(prompt_ids: Sequence[int], card: ModelCard, param: str, *, generates: bool = True) -> None:
    """`generates`: tokens are wanted behind it, else only what the model says of it."""
    if not prompt_ids:
        raise bad_value(param, "The prompt is empty.")
    if len(prompt_ids) + generates > card.max_model_len:
        more = " and at least one more" if generates else ""
        raise RequestError(
            f"The prompt has {len(prompt_ids)} tokens; the model's context of {card.max_model_len} tokens "
            f"must hold it{more}.",
            param=param,
            code="context_length_exceeded",
        )
    check_ids(prompt_ids, card, param)  # of no more ids than the context has


def check_ids(token_ids: Sequence[int], card: ModelCard, param: str) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= card.vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < card.vocab_size)
        raise bad_value(param, f"Token id {wrong} is outside the vocabulary of {card.vocab_size} tokens.")


def too_long_text(num_chars: int, card: ModelCard, param: str) -> RequestError:
    return RequestError(
        f"The prompt has {num_chars} characters; the model's context of {card.max_model_len} tokens cannot "
        "hold them.",
        param=param,
        code="context_length_exceeded",
    )
