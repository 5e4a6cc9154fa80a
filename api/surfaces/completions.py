"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from ...messages.work import Work
from ..generation import GenerateSpec
from ..http.fields import OPENAI_RULES, chosen_salt
from ..refusals import bad_value, check_model, unsupported
from ..request_ids import bare_id
from ..slices import spaced
from ..text.pipeline import TextJob, TextRun, Wanted
from ..text.prompts import Prompt, check_num_outputs, read_prompts
from ..text.sampling import checked_choices, checked_logprobs, checked_priority, resolve_max_tokens
from .answering import Answer, receive
from .completion_answer import CompletionRenderer
from .metrics import RequestMeter
from .openai_requests import choose_request_id, openai_sampling, text_options
from .openai_types import CompletionRequest
from .serving import Serving

DEFAULT_MAX_TOKENS = 16


class Completions:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def handle(self, http: Request) -> Response:
        serving = self._serving
        body, laps = await receive(http, serving, CompletionRequest, OPENAI_RULES)
        meter = RequestMeter(serving.metrics, streamed=body.stream)
        check_model(body.model, serving.card)
        laps.lap("receive")
        prompts = await read_prompts(
            body.prompt,
            "prompt",
            card=serving.card,
            tokenizer=serving.tokenizer,
            add_special_tokens=body.add_special_tokens,
            generates=body.max_tokens != 0,
        )
        laps.lap("tokenize")
        request_id = choose_request_id(http, body, serving)
        answer_id = f"cmpl-{bare_id(request_id)}"
        run = TextRun(serving.pipeline, await self._jobs(body, prompts, answer_id), laps)
        answer = Answer(run, CompletionRenderer(serving, body, run, answer_id), meter)
        return await answer.respond(http, serving.in_flight, request_id=request_id, stream=body.stream)

    async def _jobs(
        self, body: CompletionRequest, prompts: Sequence[Prompt], answer_id: str
    ) -> list[TextJob]:
        serving = self._serving
        choices = checked_choices(body.n)
        check_num_outputs(len(prompts) * choices)
        if body.best_of not in (None, choices):
            raise unsupported("best_of", "only the value of `n`")
        num_logprobs = checked_logprobs("logprobs", body.logprobs)
        asked = [checked_logprobs("prompt_logprobs", body.prompt_logprobs)]
        if body.echo:
            asked.append(num_logprobs)
        num_prompt_logprobs = max((number for number in asked if number is not None), default=None)
        if body.max_tokens == 0:
            _check_scoring(body)
        options = text_options(body)
        specs = [
            GenerateSpec(
                request_id=answer_id if len(prompts) == 1 else f"{answer_id}-{position}",
                work=Work(
                    prompt_ids=prompt.token_ids,
                    choices=tuple(range(choices)),
                    sampling=openai_sampling(
                        body,
                        serving,
                        max_tokens=(
                            1
                            if body.max_tokens == 0
                            else resolve_max_tokens(
                                body.max_tokens,
                                DEFAULT_MAX_TOKENS,
                                len(prompt.token_ids),
                                serving.card,
                                "max_tokens",
                            )
                        ),
                        num_logprobs=num_logprobs,
                        num_prompt_logprobs=num_prompt_logprobs,
                    ),
                    cache_salt=chosen_salt(body.cache_salt, body.extra_key),
                ),
                has_default_length=body.max_tokens is None,
                stream=body.stream or bool(options.stops),
                priority=checked_priority(body.priority),
            )
            async for position, prompt in spaced(enumerate(prompts))
        ]
        wanted: Wanted = "outputs"
        if body.max_tokens == 0:
            wanted = "echo" if num_prompt_logprobs is None else "scores"
        return [
            TextJob(spec=spec, options=options, wanted=wanted, echo=prompt if body.echo else None)
            for spec, prompt in zip(specs, prompts, strict=True)
        ]


def _check_scoring(body: CompletionRequest) -> None:
    """``max_tokens`` 0 asks for nothing but the prompt itself."""
    if not body.echo and body.prompt_logprobs is None:
        raise bad_value("max_tokens", "`max_tokens` may be 0 only with `echo` or `prompt_logprobs`.")
    if body.n != 1:
        raise bad_value("n", "`n` must be 1 when `max_tokens` is 0.")
