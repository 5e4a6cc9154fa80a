"""What /v1/completions and /v1/chat/completions have in common."""

from __future__ import annotations

from starlette.requests import Request

from ...messages.sampling import SamplingParams
from ..text.detokenizer import TextOptions
from ..text.sampling import parse_stops, sampling_params
from .openai_types import OpenAIRequest
from .serving import Serving


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
    return sampling_params(
        body,
        serving.defaults,
        serving.card,
        draw_seed=serving.draw_seed,
        max_tokens=max_tokens,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
    )
