"""POST or PUT /generate: SGLang's own endpoint, which benchmarks and RL trainers speak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from starlette.requests import Request
from starlette.responses import Response

from ...messages.work import Work
from ..generation import GenerateSpec, SessionTurn, TurnParams
from ..http.fields import GENERATING_RULES, chosen_salt
from ..refusals import bad_value, check_range
from ..slices import spaced
from ..text.detokenizer import TextOptions
from ..text.pipeline import TextJob, TextRun
from ..text.prompts import MAX_PROMPTS, batch_of, check_num_outputs, check_prompt, encode_prompt
from ..text.sampling import (
    checked_choices,
    checked_logprobs,
    checked_priority,
    parse_stops,
    resolve_max_tokens,
    sampling_params,
)
from .answering import Answer, receive
from .metrics import RequestMeter
from .native_answer import NativeRenderer
from .native_types import NativeRequest, NativeSampling
from .serving import Serving

DEFAULT_MAX_NEW_TOKENS = 128  # SGLang's


class Native:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def handle(self, http: Request) -> Response:
        serving = self._serving
        body, laps = await receive(http, serving, NativeRequest, GENERATING_RULES)
        meter = RequestMeter(serving.metrics, streamed=body.stream)
        laps.lap("receive")
        prompts, is_batch = await self._prompts(body)
        laps.lap("tokenize")
        salts = _salts(body, len(prompts))
        samplings = await body.samplings(len(prompts), strict=serving.limits.strict_fields)
        check_num_outputs(sum(sampling.n for sampling in samplings))
        async for prompt, sampling in spaced(zip(prompts, samplings, strict=True)):
            check_prompt(
                prompt,
                serving.card,
                "text" if body.input_ids is None else "input_ids",
                generates=sampling.max_new_tokens != 0,
            )
        request_id, rids = self._ids(http, body, len(prompts))
        turns = self._turns(body, rids, prompts, samplings)
        jobs = [
            self._job(body, rid, prompt, sampling, turn, salt)
            async for rid, prompt, sampling, turn, salt in spaced(
                zip(rids, prompts, samplings, turns, salts, strict=True)
            )
        ]
        is_list = is_batch or any(sampling.n > 1 for sampling in samplings)
        run = TextRun(serving.pipeline, jobs, laps)
        renderer = NativeRenderer(serving, body, run, meter, is_list=is_list)
        answer = Answer(run, renderer, meter, is_growing=not body.incremental_streaming_output)
        return await answer.respond(http, serving.in_flight, request_id=request_id, stream=body.stream)

    def _ids(self, http: Request, body: NativeRequest, num_prompts: int) -> tuple[str, list[str]]:
        """The request's id, and one for each prompt."""
        choose_id = self._serving.in_flight.choose_id
        if isinstance(body.rid, list):
            if len(set(body.rid)) != num_prompts:
                raise bad_value("rid", f"`rid` must be {num_prompts} different ids, one per prompt.")
            rids = [choose_id(rid, http.state.request_id) for rid in body.rid]
            return rids[0], rids
        chosen = choose_id(body.rid, http.state.request_id)
        if num_prompts == 1:
            return chosen, [chosen]
        return chosen, [f"{chosen}-{position}" for position in range(num_prompts)]

    async def _prompts(self, body: NativeRequest) -> tuple[list[tuple[int, ...]], bool]:
        """The prompts' ids, and whether they were given as a batch."""
        if (body.text is None) == (body.input_ids is None):
            raise bad_value("text", "Give either `text` or `input_ids`.")
        param = "text" if body.input_ids is None else "input_ids"
        prompts: list[tuple[int, ...]] = []
        if body.input_ids is None:
            given = body.text or ""
            texts = [given] if isinstance(given, str) else given
            self._check_count(len(texts), param)
            async for text, params in spaced(zip(texts, _turn_params(body, len(texts)), strict=True)):
                is_continued = params is not None and params.rid is not None
                ids = await encode_prompt(
                    text,
                    param,
                    card=self._serving.card,
                    tokenizer=self._serving.tokenizer,
                    add_special_tokens=not is_continued,
                )
                prompts.append(tuple(ids))
            is_batch = isinstance(given, list)
        else:
            items = batch_of(body.input_ids, param, card=self._serving.card)
            is_batch = items is body.input_ids
            prompts = [tuple(cast("list[int]", item)) async for item in spaced(items)]
        self._check_count(len(prompts), param)
        return prompts, is_batch

    def _check_count(self, num_prompts: int, param: str) -> None:
        if not 1 <= num_prompts <= MAX_PROMPTS:
            raise bad_value(param, f"`{param}` takes 1 to {MAX_PROMPTS} prompts, got {num_prompts}.")

    def _turns(
        self,
        body: NativeRequest,
        rids: Sequence[str],
        prompts: Sequence[tuple[int, ...]],
        samplings: Sequence[NativeSampling],
    ) -> list[SessionTurn | None]:
        """Of each prompt, where it is a session's."""
        turns: list[SessionTurn | None] = []
        for params, rid, prompt, sampling in zip(
            _turn_params(body, len(prompts)), rids, prompts, samplings, strict=True
        ):
            if params is None:
                turns.append(None)
                continue
            if sampling.n > 1:
                raise bad_value("n", "A turn of a session has one output: `n` must be 1.")
            turn = self._serving.sessions.begin_turn(params, rid, prompt)
            check_prompt(
                turn.prompt_ids,
                self._serving.card,
                "session_params",
                generates=sampling.max_new_tokens != 0,
            )
            turns.append(turn)
        return turns

    def _job(
        self,
        body: NativeRequest,
        rid: str,
        new_ids: tuple[int, ...],
        sampling: NativeSampling,
        turn: SessionTurn | None,
        cache_salt: str,
    ) -> TextJob:
        serving = self._serving
        prompt_ids = new_ids if turn is None else turn.prompt_ids
        checked_choices(sampling.n)
        is_scored = sampling.max_new_tokens == 0
        if is_scored and sampling.n != 1:
            raise bad_value("n", "`n` must be 1 when `max_new_tokens` is 0.")
        checked_logprobs("top_logprobs_num", body.top_logprobs_num)
        check_range("logprob_start_len", body.logprob_start_len, -1, len(prompt_ids) - 1)
        num_logprobs = body.top_logprobs_num if body.return_logprob else None
        scores_prompt = body.return_logprob and body.logprob_start_len >= 0
        options = TextOptions(
            stops=parse_stops(sampling.stop),
            include_stop=sampling.no_stop_trim,
            skip_special_tokens=sampling.skip_special_tokens,
            min_tokens=sampling.min_new_tokens,
        )
        spec = GenerateSpec(
            request_id=rid,
            work=Work(
                prompt_ids=prompt_ids,
                choices=tuple(range(sampling.n)),
                sampling=sampling_params(
                    sampling,
                    serving.defaults,
                    serving.card,
                    draw_seed=serving.draw_seed,
                    max_tokens=(
                        1
                        if is_scored
                        else resolve_max_tokens(
                            sampling.max_new_tokens,
                            DEFAULT_MAX_NEW_TOKENS,
                            len(prompt_ids),
                            serving.card,
                            "max_new_tokens",
                        )
                    ),
                    num_logprobs=num_logprobs,
                    num_prompt_logprobs=num_logprobs if scores_prompt else None,
                    prompt_logprobs_start=max(0, body.logprob_start_len),
                    hidden_states="all" if body.return_hidden_states else "none",
                ),
                cache_salt=cache_salt,
            ),
            has_default_length=sampling.max_new_tokens is None,
            stream=body.stream or bool(options.stops),
            priority=checked_priority(body.priority),
            session=None if turn is None else turn.hold,
        )
        return TextJob(spec=spec, options=options, wanted="scores" if is_scored else "outputs", turn=turn)


def _turn_params(body: NativeRequest, num_prompts: int) -> Sequence[TurnParams | None]:
    """One for each prompt: its own, or the same for all."""
    given = body.session_params
    if not isinstance(given, list):
        return [given] * num_prompts
    if len(given) != num_prompts:
        raise bad_value(
            "session_params", f"`session_params` has {len(given)} entries for {num_prompts} prompts."
        )
    return given


def _salts(body: NativeRequest, num_prompts: int) -> Sequence[str]:
    """One for each prompt: its own, or the same for all."""
    if not isinstance(body.extra_key, list):
        return [chosen_salt(body.cache_salt, body.extra_key)] * num_prompts
    if len(body.extra_key) != num_prompts or body.cache_salt is not None:
        raise bad_value(
            "extra_key", f"`extra_key` must be one text, or {num_prompts}, and no `cache_salt` beside it."
        )
    return body.extra_key
