"""What an attempt at a request is to compute: one value from the API to the row of a forward."""

from __future__ import annotations

import msgspec

from .bounds import CacheSalt, Choices, TokenIds
from .sampling import SamplingParams


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """Choices of how one prompt goes on, and what is asked beside their tokens.

    It travels whole: the API makes it, each attempt of the router has its own choices and kept output, both
    nodes' records, jobs and rows hold it as it came. So a feature of a request is a field here or in
    `SamplingParams`, and whoever carries it need not know.
    """

    prompt_ids: TokenIds
    output_ids: TokenIds = ()  # kept from earlier attempts; empty at the first
    choices: Choices
    sampling: SamplingParams
    cache_salt: CacheSalt = ""  # prefixes are shared only with requests of the same one

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and kept output: the tokens whose KV must be there before the choices grow."""
        return (*self.prompt_ids, *self.output_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def prompt_logprobs_from(self) -> int | None:
        """The first position of the prompt whose token's logprob is to be told; None: none is.

        What is told of the prompt belongs to the first attempt: later ones know it already.
        """
        if self.sampling.num_prompt_logprobs is None or self.output_ids:
            return None
        return self.sampling.prompt_logprobs_start

    @property
    def wants_prompt_states(self) -> bool:
        """Whether the hidden states of all prompt tokens are to be told; likewise."""
        return self.sampling.hidden_states == "all" and not self.output_ids

    def told_of_prompt(self) -> Work:
        """The same, without what is asked of the prompt: it was told."""
        sampling = msgspec.structs.replace(
            self.sampling,
            num_prompt_logprobs=None,
            hidden_states="sampled" if self.sampling.hidden_states == "all" else self.sampling.hidden_states,
        )
        return msgspec.structs.replace(self, sampling=sampling)

    @property
    def num_reusable_tokens(self) -> int:
        """How many leading tokens a prefix cache may spare.

        At least one token must be computed, since its logits choose the next token. With hidden states every
        position must be, with prompt logprobs every one from that before the first asked for.
        """
        if self.wants_prompt_states:
            return 0
        if self.prompt_logprobs_from is None:
            return self.num_tokens - 1
        return max(0, min(self.num_tokens, self.prompt_logprobs_from) - 1)
