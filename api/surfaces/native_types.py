"""The bodies of /generate, as SGLang defines them, and of the token endpoints, as vLLM does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from ..generation import TurnParams, WeightSpan
from ..http.fields import GivenSalt
from .openai_types import CachedTokensDetails

# ---- requests ---------------------------------------------------------------------------------------


class NativeSampling(msgspec.Struct, kw_only=True):
    """``sampling_params`` of /generate."""

    max_new_tokens: int | None = (
        None  # default: 128, as far as the context has room; 0: only the prompt counts
    )
    min_new_tokens: int = 0
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    sampling_seed: int | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] = {}
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False


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
