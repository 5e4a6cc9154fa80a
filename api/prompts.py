"""Prompts as OpenAI's endpoints take them: a text, a list of texts, token ids, or a list of those."""

from __future__ import annotations

from dataclasses import dataclass

from .generation import ModelCard
from .tokenization import Tokenizer
from .validation import Limits, bad_type, bad_value, check_prompt


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    text: str | None  # None: given as token ids


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
    if isinstance(given, list) and all(isinstance(item, int) for item in given):
        given = [[item for item in given if isinstance(item, int)]]
    items = [given] if isinstance(given, str) else given
    if not 1 <= len(items) <= limits.max_prompts:
        raise bad_value(param, f"`{param}` takes 1 to {limits.max_prompts} prompts, got {len(items)}.")
    if len({type(item) for item in items}) > 1:
        raise bad_type(param, f"`{param}` must not mix texts and token ids.")
    prompts: list[Prompt] = []
    for item in items:
        if isinstance(item, str):
            ids = await tokenizer.encode_async(item, add_special_tokens=add_special_tokens)
            prompts.append(Prompt(tuple(ids), item))
        elif isinstance(item, list):
            prompts.append(Prompt(tuple(item), None))
        check_prompt(prompts[-1].token_ids, card, param, generates=generates)
    return prompts
