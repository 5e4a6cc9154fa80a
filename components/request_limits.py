"""What the served model sets: which requests it can never compute. Asked where a node accepts one."""

from __future__ import annotations

from ..messages.node import ModelInfo
from ..messages.work import Work


def refusal(work: Work, model: ModelInfo) -> str | None:
    """Why this can never be computed; None when it can.

    A stop or bias of an id that the model does not have is no fault: it cannot be sampled anyway.
    """
    token_ids, sampling = work.token_ids, work.sampling
    if not token_ids or min(token_ids) < 0 or max(token_ids) >= model.vocab_size:
        return f"token ids from 0 to {model.vocab_size - 1} are expected, at least one"
    if len(token_ids) > model.max_model_len:
        return f"there are {len(token_ids)} tokens; the model's context is {model.max_model_len}"
    if max(sampling.logprob_token_ids, default=0) >= model.vocab_size:
        return f"logprobs of token ids from 0 to {model.vocab_size - 1} can be told, and of no others"
    for wanted in (sampling.num_logprobs, sampling.num_prompt_logprobs):
        if wanted is not None and wanted > model.vocab_size:
            return f"{wanted} logprobs of a token are asked for; the vocabulary has {model.vocab_size} tokens"
    return None
