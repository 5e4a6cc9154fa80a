"""Sampling parameters as they travel from the router to whoever samples a token."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

# Hidden states of the last layer, behind the final norm: none; for each output token the one that it was
# sampled from; those and the ones of every prompt token.
HiddenStates: TypeAlias = Literal["none", "sampled", "all"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen. Validated where the request enters (``api``).

    Stop *strings* are not here: they are matched where ids become text. ``seed`` is always set;
    whoever creates the request draws one if the client gave none.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0
    seed: int = 0  # [0, 2**64)
    repetition_penalty: float = 1.0  # over prompt and output
    frequency_penalty: float = 0.0  # over output
    presence_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int = 16
    # None: no logprobs. k: the chosen token's and the k most likely, of the raw logits.
    num_logprobs: int | None = None
    # None: no prompt logprobs. k: of every prompt token from `prompt_logprobs_start` on.
    num_prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    hidden_states: HiddenStates = "none"

    @property
    def uses_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one chosen (or prompt) token and of the most likely ones at its position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first
