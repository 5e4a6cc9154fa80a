"""What nodes tell of a request: of each token as it is sampled, and of the prompt once it is computed."""

from __future__ import annotations

import msgspec

from .bounds import Blob, Choice, Count, TokenId
from .sampling import PromptLogprobs, TokenLogprob


class SampledToken(msgspec.Struct, frozen=True, array_like=True):
    """One more token of one choice, as the engine makes it."""

    choice: Choice
    token_id: TokenId
    logprob: TokenLogprob | None = None  # None: not asked for
    hidden_state: Blob = b""  # float32: the one that it was sampled from, when asked for


class PromptReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Told of a prompt, once a request: with the first token of the attempt that is first to have one.

    It travels whole: a forward reports on a row's part of the prompt, whoever computes the prompt on all of
    it, and on the way to the client nobody looks into it. So what is to be told of prompts is a field here.
    """

    logprobs: PromptLogprobs = ()  # of positions from `Work.prompt_logprobs_from` on; None: of the first
    hidden_states: Blob = b""  # float32, [prompt tokens, hidden size], when asked for
    num_cached_tokens: Count = 0  # that a prefix cache held


NOTHING_TOLD = PromptReport()
