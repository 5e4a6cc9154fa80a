"""Prompts as OpenAI's endpoints take them: a text, a list of texts, token ids, or a list of those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from ..generation import ModelCard
from ..http.slices import spaced
from ..http.validation import Limits, bad_type, bad_value, check_prompt, too_long_text
from .tokenization import Tokenizer


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
    limits: Limits,
    add_special_tokens: bool = True,
    generates: bool = True,
) -> list[Prompt]:
    """`generates`: tokens are wanted behind each. Raises RequestError that names `param`."""
    items = [given] if isinstance(given, str) else batch_of(given, param, card=card, limits=limits)
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
    given: Sequence[str | int | list[int]], param: str, *, card: ModelCard, limits: Limits
) -> Sequence[str | list[int]]:
    """A list as prompts: itself, or the one that its ids are.

    Raises RequestError, but not for an id too many: the length is told, by `check_prompt`, before a million
    items are looked at.
    """
    is_one = bool(given) and isinstance(given[0], int)
    if not is_one and not 1 <= len(given) <= limits.max_prompts:
        raise bad_value(param, f"`{param}` takes 1 to {limits.max_prompts} prompts, got {len(given)}.")
    is_too_long = is_one and len(given) > card.max_model_len
    if not is_too_long and len(set(map(type, given))) > 1:
        raise bad_type(param, f"`{param}` must not mix texts, token ids and lists of those.")
    return [cast("list[int]", given)] if is_one else cast("Sequence[str | list[int]]", given)
