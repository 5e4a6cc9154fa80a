"""A prompt as text before its outputs, and where its tokens stand in it."""

from __future__ import annotations

from ..slices import SLICE_ENTRIES, sliced
from .detokenizer import text_decoder
from .pieces import Echo
from .prompts import Prompt
from .tokenization import Tokenizer


async def echo_of(
    tokenizer: Tokenizer, prompt: Prompt, *, skip_special_tokens: bool, with_offsets: bool
) -> Echo:
    text = prompt.text
    if text is None:
        text = await tokenizer.decode_async(prompt.token_ids, skip_special_tokens=skip_special_tokens)
    offsets = await _offsets(tokenizer, prompt, skip_special_tokens) if with_offsets else ()
    return Echo(text, prompt.token_ids, offsets)


async def _offsets(tokenizer: Tokenizer, prompt: Prompt, skip_special_tokens: bool) -> tuple[int, ...]:
    """Where the text of each prompt token begins in the echo.

    A prompt given as text is echoed as it is: a special token counts where the text spells it, and not where
    the tokenizer has added it.
    """
    skips_special = prompt.text is not None or skip_special_tokens
    decoder = text_decoder(tokenizer, skip_special_tokens=skips_special)
    offsets: list[int] = []
    num_chars = 0
    async for token_ids in sliced(prompt.token_ids, SLICE_ENTRIES):
        for token_id in token_ids:
            offsets.append(num_chars)
            piece = decoder.push(token_id)
            if prompt.text is not None and token_id in tokenizer.special_ids:
                spelled = tokenizer.token_string(token_id)
                piece = spelled if prompt.text.startswith(spelled, num_chars) else ""
            num_chars += len(piece)
    return tuple(offsets)
