"""When a choice ends, by its tokens alone: EOS, stop ids and length.

One pure function, asked by whoever has just sampled or accepted a token: prefill for the first one, decode
for the others, the router for what it kept before it makes a new attempt. Stop *strings* are matched where
ids become text (api).
"""

from __future__ import annotations

from collections.abc import Collection

from ..messages.node import Finish
from ..messages.sampling import SamplingParams


def check_finish(
    token_id: int,
    num_output_tokens: int,
    sampling: SamplingParams,
    eos_token_ids: Collection[int],
    max_model_len: int,
    total_len: int,
) -> Finish | None:
    """Why the choice ends with this token, or None if it goes on.

    `num_output_tokens` counts this token and all before it, those kept from earlier attempts included;
    `total_len` counts the prompt too. EOS and stop ids end nothing until `sampling.min_tokens` tokens are
    there (the sampler avoids them until then); the length limits always do. A token that both ends the text
    and reaches a limit is a "stop": the answer is complete. ``ignore_eos`` leaves the stop ids in force.
    """
    if num_output_tokens >= sampling.min_tokens:
        is_eos = token_id in eos_token_ids and not sampling.ignore_eos
        if is_eos or token_id in sampling.stop_token_ids:
            return Finish(reason="stop", matched=token_id)
    if num_output_tokens >= sampling.max_tokens or total_len >= max_model_len:
        return Finish(reason="length")
    return None
