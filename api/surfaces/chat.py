"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from ...messages.work import Work
from ..generation import GenerateSpec
from ..http.fields import OPENAI_RULES, chosen_salt
from ..refusals import bad_value, check_model, unsupported
from ..request_ids import bare_id
from ..text.pipeline import TextJob, TextRun
from ..text.prompts import check_prompt
from ..text.sampling import checked_choices, checked_logprobs, checked_priority, resolve_max_tokens
from .answering import Answer, receive
from .chat_answer import ChatRenderer
from .chat_messages import encode_chat
from .metrics import RequestMeter
from .openai_requests import choose_request_id, openai_sampling, text_options
from .openai_types import ChatRequest
from .serving import Serving


class ChatCompletions:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def handle(self, http: Request) -> Response:
        serving = self._serving
        body, laps = await receive(http, serving, ChatRequest, OPENAI_RULES)
        meter = RequestMeter(serving.metrics, streamed=body.stream)
        check_model(body.model, serving.card)
        if body.tool_choice not in ("none", "auto"):
            raise unsupported("tool_choice", 'only "none" and "auto" are')
        if body.tools and body.tool_choice != "none":
            raise unsupported(
                "tools", 'answers are not parsed for calls; `tool_choice` "none" shows them only'
            )
        laps.lap("receive")
        prompt_ids = await encode_chat(
            serving.tokenizer,
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            add_special_tokens=body.add_special_tokens,
            tools=body.tools,
            template_kwargs=body.chat_template_kwargs,
            card=serving.card,
        )
        check_prompt(prompt_ids, serving.card, "messages")
        laps.lap("tokenize")
        request_id = choose_request_id(http, body, serving)
        answer_id = f"chatcmpl-{bare_id(request_id)}"
        run = TextRun(serving.pipeline, [self._job(body, prompt_ids, answer_id)], laps)
        answer = Answer(run, ChatRenderer(serving, body, run, answer_id), meter)
        return await answer.respond(http, serving.in_flight, request_id=request_id, stream=body.stream)

    def _job(self, body: ChatRequest, prompt_ids: Sequence[int], answer_id: str) -> TextJob:
        serving = self._serving
        top_logprobs = checked_logprobs("top_logprobs", body.top_logprobs)
        if top_logprobs and not body.logprobs:
            raise bad_value("top_logprobs", "`top_logprobs` needs `logprobs` to be true.")
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        options = text_options(body)
        spec = GenerateSpec(
            request_id=answer_id,
            work=Work(
                prompt_ids=tuple(prompt_ids),
                choices=tuple(range(checked_choices(body.n))),
                sampling=openai_sampling(
                    body,
                    serving,
                    max_tokens=resolve_max_tokens(wanted, None, len(prompt_ids), serving.card, name),
                    num_logprobs=(top_logprobs or 0) if body.logprobs else None,
                    num_prompt_logprobs=checked_logprobs("prompt_logprobs", body.prompt_logprobs),
                ),
                cache_salt=chosen_salt(body.cache_salt, body.extra_key),
            ),
            has_default_length=wanted is None,
            stream=body.stream or bool(options.stops),
            priority=checked_priority(body.priority),
        )
        return TextJob(spec=spec, options=options)
