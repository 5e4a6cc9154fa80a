"""POST or PUT /generate: SGLang's own endpoint, which benchmarks and RL trainers speak."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, assert_never, cast

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from ..generation import GenerateSpec, SessionTurn, TurnParams
from ..http.bodies import parse_request
from ..http.fields import GENERATING_RULES, chosen_salt
from ..http.sse import event
from ..refusals import bad_value, check_range
from ..slices import HOLE, filled, spaced
from ..text.detokenizer import TextDelta, TextOptions, joined
from ..text.pipeline import TextJob, TextRun
from ..text.prompts import MAX_PROMPTS, batch_of, check_num_outputs, check_prompt, encode_prompt
from ..text.sampling import (
    SamplingFields,
    checked_choices,
    checked_logprobs,
    checked_priority,
    parse_stops,
    resolve_max_tokens,
    sampling_params,
)
from ..text.timelines import Laps
from .answering import receive, respond
from .hidden_states import hidden_states
from .logprobs import native_logprobs, native_top_logprobs
from .metrics import RequestMeter
from .native_types import (
    MetaInfo,
    NativeFinish,
    NativeOutput,
    NativeRequest,
    NativeSampling,
)
from .openai_types import CachedTokensDetails
from .serving import Serving

DEFAULT_MAX_NEW_TOKENS = 128  # SGLang's
# Of a stream whose events each hold all so far: up to so many tokens, every delta is shown, and after that
# when the answer has grown by a part in `_GROWTH`, as with SGLang's `--stream-interval`.
_ALWAYS_SHOWN_TOKENS = 512
_GROWTH = 128


class Native:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def handle(self, http: Request) -> Response:
        serving = self._serving
        body, laps = await receive(http, serving, NativeRequest, GENERATING_RULES)
        meter = serving.metrics.meter(streamed=body.stream)
        laps.lap("receive")
        prompts, is_batch = await self._prompts(body)
        laps.lap("tokenize")
        salts = _salts(body, len(prompts))
        samplings = await _samplings(body, len(prompts), strict=serving.limits.strict_fields)
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
        answer = _NativeAnswer(serving, body, jobs, turns, is_list=is_list, meter=meter, laps=laps)
        return await respond(
            http,
            answer,
            jobs,
            request_id=request_id,
            stream=body.stream,
            in_flight=serving.in_flight,
        )

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
        seed = sampling.seed if sampling.sampling_seed is None else sampling.sampling_seed
        fields = SamplingFields(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=serving.draw_seed() if seed is None else seed,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logit_bias=sampling.logit_bias,
            stop_token_ids=sampling.stop_token_ids,
            ignore_eos=sampling.ignore_eos,
            min_tokens=sampling.min_new_tokens,
            min_tokens_name="min_new_tokens",
        )
        spec = GenerateSpec(
            request_id=rid,
            prompt_ids=prompt_ids,
            sampling=sampling_params(
                fields,
                serving.defaults,
                serving.card,
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
            has_default_length=sampling.max_new_tokens is None,
            num_choices=sampling.n,
            stream=body.stream or bool(options.stops),
            priority=checked_priority(body.priority),
            cache_salt=cache_salt,
            session=None if turn is None else turn.hold,
        )
        return TextJob(spec, options, is_scored)


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


async def _samplings(body: NativeRequest, num_prompts: int, *, strict: bool) -> list[NativeSampling]:
    """One for each prompt: its own, or the same for all."""
    given: Sequence[Mapping[str, Any]] = (
        body.sampling_params
        if isinstance(body.sampling_params, list)
        else [body.sampling_params] * num_prompts
    )
    if len(given) != num_prompts:
        raise bad_value(
            "sampling_params", f"`sampling_params` has {len(given)} entries for {num_prompts} prompts."
        )
    return [
        parse_request(one, NativeSampling, GENERATING_RULES, strict=strict) async for one in spaced(given)
    ]


class _NativeAnswer:
    def __init__(
        self,
        serving: Serving,
        body: NativeRequest,
        jobs: Sequence[TextJob],
        turns: Sequence[SessionTurn | None],
        *,
        is_list: bool,
        meter: RequestMeter,
        laps: Laps,
    ) -> None:
        self._tokenizer = serving.tokenizer
        self._body = body
        self._jobs = jobs
        self._sessions = serving.sessions
        self._turns = turns
        self._turn_ids: defaultdict[int, list[int]] = defaultdict(list)  # by prompt
        self._is_list = is_list
        self._meter = meter
        self._run = TextRun(serving.pipeline, jobs, laps)
        keys = [(prompt, choice) for prompt, job in enumerate(jobs) for choice in range(job.spec.num_choices)]
        self._index = {key: index for index, key in enumerate(keys)}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Every event holds all so far, or, if wanted, only what is new.

        Once an answer is long, events that hold all of it come when it has grown by a part: what is sent of
        an answer is then bounded by a multiple of its length, not by its square.
        """
        so_far: defaultdict[tuple[int, int], list[TextDelta]] = defaultdict(list)
        num_shown: Counter[tuple[int, int]] = Counter()  # tokens in the latest event
        num_tokens: Counter[tuple[int, int]] = Counter()
        async with aclosing(self._run.deltas()) as deltas:
            async for prompt, delta in deltas:
                key = (prompt, delta.choice)
                self._meter.add_chunk(key, len(delta.token_ids), delta.finish_reason)
                is_first = key not in num_tokens
                num_tokens[key] += len(delta.token_ids)
                self._note_turn(prompt, delta)
                if self._body.incremental_streaming_output:
                    shown = delta
                else:
                    so_far[key].append(delta)
                    if delta.finish_reason is None and not _is_due(num_tokens[key], num_shown[key]):
                        continue
                    shown = joined(so_far[key])
                    so_far[key] = [shown]
                    num_shown[key] = num_tokens[key]
                    is_first = True
                output = await self._output(prompt, shown, num_tokens[key], with_input=is_first)
                if self._is_list:
                    output = msgspec.structs.replace(output, index=self._index[key])
                yield event(msgspec.json.encode(output))
        self._meter.answered(self._run.counts().prompt)

    async def whole(self) -> list[bytes]:
        parts: dict[tuple[int, int], list[TextDelta]] = defaultdict(list)
        async with aclosing(self._run.deltas()) as deltas:
            async for prompt, delta in deltas:
                parts[prompt, delta.choice].append(delta)
                self._note_turn(prompt, delta)
        outputs: list[bytes] = []
        async for key in spaced(self._index):
            delta = joined(parts[key])
            num_tokens = len(delta.token_ids)
            self._meter.add_chunk(key, num_tokens, delta.finish_reason)
            output = await self._output(key[0], delta, num_tokens, with_input=True)
            outputs.append(msgspec.json.encode(output))
        self._meter.answered(self._run.counts().prompt)
        return filled(msgspec.json.encode([HOLE]), outputs) if self._is_list else outputs

    def _note_turn(self, prompt: int, delta: TextDelta) -> None:
        """What the client is about to see; with its end another turn may continue it."""
        if (turn := self._turns[prompt]) is not None:
            self._turn_ids[prompt] += delta.token_ids
            if delta.finish_reason in ("stop", "length"):
                self._sessions.finish_turn(turn, tuple(self._turn_ids[prompt]))

    async def _output(
        self, prompt: int, delta: TextDelta, num_tokens: int, *, with_input: bool
    ) -> NativeOutput:
        spec = self._jobs[prompt].spec
        info = self._run.info(prompt)
        with_text = self._body.return_text_in_logprobs
        num_top = self._body.top_logprobs_num
        logprobs: dict[str, Any] = {}
        if self._body.return_logprob:
            logprobs["output_token_logprobs"] = await native_logprobs(
                self._tokenizer, delta.token_ids, delta.logprobs, with_text=with_text
            )
            logprobs["input_token_logprobs"] = []
            if num_top:
                logprobs["output_top_logprobs"] = await native_top_logprobs(
                    self._tokenizer, delta.logprobs, num_top, with_text=with_text
                )
                logprobs["input_top_logprobs"] = []
        if with_input and spec.sampling.num_prompt_logprobs is not None:
            scored_ids = spec.prompt_ids[spec.sampling.prompt_logprobs_start :]
            logprobs["input_token_logprobs"] = await native_logprobs(
                self._tokenizer, scored_ids, info.prompt_logprobs, with_text=with_text
            )
            if num_top:
                logprobs["input_top_logprobs"] = await native_top_logprobs(
                    self._tokenizer, info.prompt_logprobs, num_top, with_text=with_text
                )
        return NativeOutput(
            text=delta.text,
            output_ids=delta.token_ids,
            meta_info=MetaInfo(
                id=spec.request_id,
                finish_reason=_finish(delta, num_tokens),
                prompt_tokens=len(spec.prompt_ids),
                completion_tokens=num_tokens,
                cached_tokens=info.num_cached_tokens,
                cached_tokens_details=CachedTokensDetails(device=info.num_cached_tokens),
                weight_version=info.weight_version or self._run.weight_version,
                weight_versions=self._run.weight_versions(prompt, delta.choice),
                e2e_latency=UNSET if delta.finish_reason is None else self._meter.elapsed_s(),
                hidden_states=(
                    hidden_states(info, len(spec.prompt_ids), delta, with_input=with_input)
                    if self._body.return_hidden_states
                    else UNSET
                ),
                **logprobs,
            ),
        )


def _is_due(num_tokens: int, num_shown: int) -> bool:
    """Whether an event is to show all `num_tokens` of an answer, of which the latest showed `num_shown`."""
    return num_tokens <= _ALWAYS_SHOWN_TOKENS or num_tokens >= num_shown + num_tokens // _GROWTH


def _finish(delta: TextDelta, num_tokens: int) -> NativeFinish | None:
    match delta.finish_reason:
        case None:
            return None
        case "stop":
            return NativeFinish(type="stop", matched=UNSET if delta.matched is None else delta.matched)
        case "length":
            return NativeFinish(type="length", length=num_tokens)
        case "abort":
            return NativeFinish(type="abort", message="Aborted.", status_code=None, err_type=None)
        case _:
            assert_never(delta.finish_reason)
