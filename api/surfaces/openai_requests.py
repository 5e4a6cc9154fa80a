"""What /v1/completions and /v1/chat/completions have in common."""

from __future__ import annotations

from starlette.requests import Request

from ...messages.sampling import SamplingParams
from ..text.detokenizer import TextOptions
from ..text.sampling import SamplingFields, parse_stops, sampling_params
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
        logprob_token_ids=body.logprob_token_ids or (),
    )
    return sampling_params(
        fields,
        serving.defaults,
        serving.card,
        max_tokens=max_tokens,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
    )
