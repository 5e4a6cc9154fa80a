"""Prompts as OpenAI's endpoints take them: a text, a list of texts, token ids, or a list of those."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import cast

from .generation import ModelCard
from .tokenization import Tokenizer
from .validation import Limits, bad_type, bad_value, check_prompt, too_long_text


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
    kinds = set(map(type, given)) if isinstance(given, list) else {str}  # of maybe a million items
    if isinstance(given, list) and kinds <= {int}:
        given = [cast("list[int]", given)]
    items = [given] if isinstance(given, str) else given
    if not 1 <= len(items) <= limits.max_prompts:
        raise bad_value(param, f"`{param}` takes 1 to {limits.max_prompts} prompts, got {len(items)}.")
    if len(kinds) > 1:
        raise bad_type(param, f"`{param}` must not mix texts and token ids.")
    prompts: list[Prompt] = []
    for item in items:
        if isinstance(item, str):
            ids = await encode_prompt(
                item, param, card=card, tokenizer=tokenizer, add_special_tokens=add_special_tokens
            )
            prompts.append(Prompt(tuple(ids), item))
        elif isinstance(item, list):
            prompts.append(Prompt(tuple(item), None))
        check_prompt(prompts[-1].token_ids, card, param, generates=generates)
        await asyncio.sleep(0)
    return prompts
