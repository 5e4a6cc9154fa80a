"""The bodies of /generate, as SGLang defines them, and of the token endpoints, as vLLM does; and which of the
values in a batch is whose."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from ..generation import TurnParams, WeightSpan
from ..http.bodies import parse_request
from ..http.fields import GENERATING_RULES, GivenSalt
from ..refusals import bad_value
from ..slices import spaced
from ..text.sampling import SamplingFields
from .openai_types import CachedTokensDetails

# ---- requests ---------------------------------------------------------------------------------------


class NativeSampling(SamplingFields, kw_only=True):
    """``sampling_params`` of /generate, and what of the body is about one prompt's sampling, too."""

    client_names: ClassVar[Mapping[str, str]] = {
        "min_tokens": "min_new_tokens",
        "logprob_token_ids": "token_ids_logprob",
    }

    # Default: 128, as far as the context has room; 0: only the prompt counts.
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    n: int = 1
    sampling_seed: int | None = None
    stop: str | list[str] = []
    skip_special_tokens: bool = True
    no_stop_trim: bool = False


_SAMPLING_RULES = dataclasses.replace(GENERATING_RULES, hidden=frozenset(NativeSampling.client_names))


def _completed(given: NativeSampling, named_ids: list[int]) -> NativeSampling:
    """With what is sampled by, from SGLang's names of it."""
    return msgspec.structs.replace(
        given,
        seed=given.seed if given.sampling_seed is None else given.sampling_seed,
        min_tokens=given.min_new_tokens,
        logprob_token_ids=named_ids,
    )


class NativeRequest(msgspec.Struct, kw_only=True):
    """One prompt or a batch; in a batch the lists are as long as the batch."""

    model: str | None = None  # gateways write what they like here (smg: "unknown"); it chooses nothing
    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] = {}
    stream: bool = False
    incremental_streaming_output: bool = False  # chunks carry what is new, not all so far
    rid: str | list[str] | None = None
    return_logprob: bool = False
    logprob_start_len: int = -1  # -1: no logprobs of the prompt
    top_logprobs_num: int = 0
    token_ids_logprob: list[int | list[int]] | None = None
    return_text_in_logprobs: bool = False
    return_hidden_states: bool = False
    priority: int = 0
    extra_key: GivenSalt | list[GivenSalt] | None = None
    cache_salt: GivenSalt | None = None  # vLLM's name of the same
    session_params: TurnParams | list[TurnParams] | None = None

    async def samplings(self, num_prompts: int, *, strict: bool) -> list[NativeSampling]:
        """One for each prompt: its own, or the same for all."""
        given: Sequence[Mapping[str, Any]] = (
            self.sampling_params
            if isinstance(self.sampling_params, list)
            else [self.sampling_params] * num_prompts
        )
        if len(given) != num_prompts:
            raise bad_value(
                "sampling_params", f"`sampling_params` has {len(given)} entries for {num_prompts} prompts."
            )
        return [
            _completed(parse_request(one, NativeSampling, _SAMPLING_RULES, strict=strict), named_ids)
            async for one, named_ids in spaced(zip(given, self._named_ids(num_prompts), strict=True))
        ]

    def _named_ids(self, num_prompts: int) -> list[list[int]]:
        """Whose logprobs each prompt asks for: its own, or the same for all."""
        given = self.token_ids_logprob or []
        lists = [each for each in given if isinstance(each, list)]
        if not lists:
            return [[each for each in given if isinstance(each, int)]] * num_prompts
        if len(given) != num_prompts or len(lists) != num_prompts:
            raise bad_value(
                "token_ids_logprob",
                f"`token_ids_logprob` must be one list of token ids, or {num_prompts} such lists in a list.",
            )
        return lists


class TokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None  # default: true for a prompt, false for messages
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[dict[str, Any]] = []


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool = False


# ---- answers ----------------------------------------------------------------------------------------


# (logprob, token id, text where asked for)
NativeLogprob = tuple[float | None, int, str | None]


class NativeFinish(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    matched: str | int | UnsetType = UNSET
    length: int | UnsetType = UNSET
    message: str | UnsetType = UNSET
    status_code: int | UnsetType | None = UNSET
    err_type: str | UnsetType | None = UNSET


# Of the prompt one row for each token; of an output token the one that it was sampled from.
NativeHiddenStates = list[Sequence[Sequence[float] | float]]


class MetaInfo(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    finish_reason: NativeFinish | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cached_tokens_details: CachedTokensDetails
    weight_version: str
    weight_versions: list[WeightSpan] | UnsetType = UNSET  # when they changed in mid-answer
    e2e_latency: float | UnsetType = UNSET  # once finished
    input_token_logprobs: list[NativeLogprob] | UnsetType = UNSET
    output_token_logprobs: list[NativeLogprob] | UnsetType = UNSET
    input_top_logprobs: list[list[NativeLogprob] | None] | UnsetType = UNSET
    output_top_logprobs: list[list[NativeLogprob] | None] | UnsetType = UNSET
    input_token_ids_logprobs: list[list[NativeLogprob] | None] | UnsetType = UNSET
    output_token_ids_logprobs: list[list[NativeLogprob] | None] | UnsetType = UNSET
    hidden_states: NativeHiddenStates | UnsetType = UNSET


class NativeOutput(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    output_ids: tuple[int, ...]
    meta_info: MetaInfo
    index: int | UnsetType = UNSET  # which output of several, in streams


class TokenizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str
