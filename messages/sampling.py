"""Sampling parameters as they travel from the router to whoever samples a token."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta

from .bounds import MAX_TOKENS, Blob, Count, Measured, TokenId, Unsigned64

MAX_TEMPERATURE = 1e4  # float32 logits are divided by it, forbidden ones (-inf) too: infinity would give NaN
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0  # likewise
MAX_OUTPUT_PENALTY = 2.0  # and as much below zero
MAX_BIAS = 100.0  # likewise
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_LOGPROB_TOKEN_IDS = 128  # logprobs of so many are told at each position

Temperature: TypeAlias = Annotated[float, Meta(ge=0, le=MAX_TEMPERATURE)]
Probability: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
RepetitionPenalty: TypeAlias = Annotated[float, Meta(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)]
OutputPenalty: TypeAlias = Annotated[float, Meta(ge=-MAX_OUTPUT_PENALTY, le=MAX_OUTPUT_PENALTY)]
LogitBias: TypeAlias = Annotated[
    dict[TokenId, Annotated[float, Meta(ge=-MAX_BIAS, le=MAX_BIAS)]], Meta(max_length=MAX_LOGIT_BIASES)
]
StopTokenIds: TypeAlias = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_STOP_TOKEN_IDS)]
LogprobTokenIds: TypeAlias = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_LOGPROB_TOKEN_IDS)]
NumLogprobs: TypeAlias = Annotated[int, Meta(ge=0, le=2**15)]
TopLogprobs: TypeAlias = Annotated[tuple[tuple[TokenId, Measured], ...], Meta(max_length=2**15)]
NamedLogprobs: TypeAlias = Annotated[
    tuple[tuple[TokenId, Measured], ...], Meta(max_length=MAX_LOGPROB_TOKEN_IDS)
]

# Hidden states of the last layer, behind the final norm: none; for each output token the one that it was
# sampled from; those and the ones of every prompt token.
HiddenStates: TypeAlias = Literal["none", "sampled", "all"]


class AskedLogprobs(NamedTuple):
    """What is told of the logprobs at one position, beside the logprob of its own token."""

    num_top: int  # the most likely ones
    token_ids: tuple[int, ...]  # and these, which the client named


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen. Checked with a reason where the request enters (``api``).

    Stop *strings* are not here: they are matched where ids become text. ``seed`` is always set;
    whoever creates the request draws one if the client gave none.
    """

    temperature: Temperature = 1.0  # 0 is greedy
    top_p: Probability = 1.0
    top_k: TokenId = 0  # 0 keeps all
    min_p: Probability = 0.0
    seed: Unsigned64 = 0  # [0, 2**64)
    repetition_penalty: RepetitionPenalty = 1.0  # over prompt and output
    frequency_penalty: OutputPenalty = 0.0  # over output
    presence_penalty: OutputPenalty = 0.0  # over output
    logit_bias: LogitBias = {}
    stop_token_ids: StopTokenIds = ()
    ignore_eos: bool = False
    min_tokens: Count = 0
    max_tokens: Count = 16
    # None: no logprobs. k: the chosen token's and the k most likely, of the raw logits.
    num_logprobs: NumLogprobs | None = None
    # None: no prompt logprobs. k: of every prompt token from `prompt_logprobs_start` on.
    num_prompt_logprobs: NumLogprobs | None = None
    prompt_logprobs_start: Count = 0
    # Whose logprobs are told too, wherever any are.
    logprob_token_ids: LogprobTokenIds = ()
    hidden_states: HiddenStates = "none"

    @property
    def asked_logprobs(self) -> AskedLogprobs | None:
        """Of each output token."""
        return self._asked(self.num_logprobs)

    @property
    def asked_prompt_logprobs(self) -> AskedLogprobs | None:
        """Of each prompt token from `prompt_logprobs_start` on."""
        return self._asked(self.num_prompt_logprobs)

    def _asked(self, num_top: int | None) -> AskedLogprobs | None:
        return None if num_top is None else AskedLogprobs(num_top, self.logprob_token_ids)

    @property
    def uses_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one chosen (or prompt) token and of others at its position."""

    token_id: TokenId
    logprob: Measured
    top: TopLogprobs = ()  # (token id, logprob) of the most likely ones, best first
    named: NamedLogprobs = ()  # likewise of `logprob_token_ids`, as they were named


Logprobs: TypeAlias = Annotated[tuple[TokenLogprob, ...], Meta(max_length=MAX_TOKENS)]
PromptLogprobs: TypeAlias = Annotated[tuple[TokenLogprob | None, ...], Meta(max_length=MAX_TOKENS)]
HiddenStateRows: TypeAlias = Annotated[tuple[Blob, ...], Meta(max_length=MAX_TOKENS)]
