"""What /v1/completions and /v1/chat/completions have in common."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.requests import Request

from ...messages.sampling import SamplingParams
from ...runtime.version import VERSION
from ..generation import ModelCard
from ..text.detokenizer import TextDelta, TextOptions
from ..text.pipeline import TokenCounts
from ..text.sampling import SamplingFields, parse_stops, sampling_params
from .openai_types import CachedTokensDetails, Extension, OpenAIRequest, PromptTokensDetails, Usage
from .serving import Serving

SYSTEM_FINGERPRINT = f"pdserve-{VERSION}"


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields that every chunk of one answer repeats."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))


def choose_request_id(http: Request, body: OpenAIRequest, serving: Serving) -> str:
    name = "request_id" if body.rid is None else "rid"
    from_body = body.request_id if body.rid is None else body.rid
    return serving.in_flight.choose_id(from_body, http.state.request_id, name)


def text_options(body: OpenAIRequest) -> TextOptions:
    return TextOptions(
        stops=parse_stops(body.stop),
        include_stop=body.include_stop_str_in_output or body.no_stop_trim,
        skip_special_tokens=body.skip_special_tokens,
        min_tokens=body.min_tokens,
    )


def openai_sampling(
    body: OpenAIRequest,
    serving: Serving,
    *,
    max_tokens: int,
    num_logprobs: int | None,
    num_prompt_logprobs: int | None,
) -> SamplingParams:
    fields = SamplingFields(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        seed=serving.draw_seed() if body.seed is None else body.seed,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=body.logit_bias,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens,
    )
    return sampling_params(
        fields,
        serving.defaults,
        serving.card,
        max_tokens=max_tokens,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
    )


def includes_usage(body: OpenAIRequest) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def has_last_chunk(body: OpenAIRequest) -> bool:
    """Whether a chunk without choices ends the stream."""
    return includes_usage(body) or body.timeline or body.return_cached_tokens_details


def usage_in_every_chunk(body: OpenAIRequest) -> bool:
    options = body.stream_options
    return options is not None and options.include_usage and options.continuous_usage_stats


def usage_of(counts: TokenCounts) -> Usage:
    return Usage(
        prompt_tokens=counts.prompt,
        completion_tokens=counts.completion,
        total_tokens=counts.prompt + counts.completion,
        prompt_tokens_details=PromptTokensDetails(counts.cached),
    )


def extension_of(counts: TokenCounts) -> Extension:
    return Extension(cached_tokens_details=CachedTokensDetails(device=counts.cached))


def stop_reason(delta: TextDelta, card: ModelCard) -> str | int | None:
    """As in vLLM: the stop string or stop token; null when the model ended by itself."""
    return None if delta.matched in card.eos_token_ids else delta.matched
