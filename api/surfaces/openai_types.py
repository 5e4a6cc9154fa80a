"""The bodies of /v1/completions and /v1/chat/completions, as OpenAI and vLLM define them.

In requests an absent field and an explicit null both mean the default. In answers a field that is UNSET was
not asked for and is not sent.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from ..generation import WeightSpan
from ..http.fields import GivenSalt
from ..text.sampling import SamplingFields
from ..text.timelines import TimelineBody

# ---- requests ---------------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # with include_usage: usage so far in every chunk


class OpenAIRequest(SamplingFields, kw_only=True):
    """What both endpoints take."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    max_tokens: int | None = None
    stop: str | list[str] = []
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    no_stop_trim: bool = False  # SGLang's name of the same
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False  # in logprobs: "token_id:5", which no two tokens share
    timeline: bool = False
    return_cached_tokens_details: bool = False
    priority: int = 0
    cache_salt: GivenSalt | None = None
    extra_key: GivenSalt | None = None  # SGLang's name of the same
    rid: str | None = None
    request_id: str | None = None  # vLLM's name of the same


class CompletionRequest(OpenAIRequest, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None
    add_special_tokens: bool = True


class ChatRequest(OpenAIRequest, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False  # the chat template writes them
    tools: list[dict[str, Any]] = []  # shown to the template
    tool_choice: str | dict[str, Any] = "auto"  # without tools it means nothing
    chat_template_kwargs: dict[str, Any] = {}


# ---- answers ----------------------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class CachedTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Where the prompt tokens that nobody computed came from. Nodes keep KV pages in their memory only."""

    device: int
    host: int = 0
    storage: int = 0
    storage_backend: str | None = None


class Extension(msgspec.Struct, frozen=True, kw_only=True):
    """What SGLang adds to an answer beside what OpenAI defines."""

    cached_tokens_details: CachedTokensDetails


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class VllmLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate at one prompt position; ``rank`` is null below the most likely ones asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


# One entry per prompt token, the first null: token id -> candidate.
PromptLogprobs = list[dict[str, VllmLogprob] | None]


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length", "abort"] | None = None
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] | UnsetType = UNSET
    weight_versions: list[WeightSpan] | UnsetType = UNSET  # with the finish reason, when they changed
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, or one chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET
    weight_version: str | UnsetType = UNSET
    timeline: TimelineBody | UnsetType = UNSET
    sglext: Extension | UnsetType = UNSET


class ChatTopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "abort"] | None = None
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] | UnsetType = UNSET
    weight_versions: list[WeightSpan] | UnsetType = UNSET  # with the finish reason, when they changed


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    weight_version: str
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    timeline: TimelineBody | UnsetType = UNSET
    sglext: Extension | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "abort"] | None = None
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] | UnsetType = UNSET
    weight_versions: list[WeightSpan] | UnsetType = UNSET  # with the finish reason, when they changed


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType = UNSET
    weight_version: str | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    timeline: TimelineBody | UnsetType = UNSET
    sglext: Extension | UnsetType = UNSET
