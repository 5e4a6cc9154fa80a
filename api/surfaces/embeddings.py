"""/v1/embeddings and /encode: a prompt's meaning as a vector of length 1.

It is the hidden state of the last token, behind the final norm: what the first output token would be sampled
from. A pair of nodes computes it as the first token of an answer that ends with it, so embeddings are queued,
cached and tried again as every request is.
"""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Generic, Literal, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ...messages.sampling import SamplingParams
from ...messages.work import Work
from ...runtime.errors import RequestError
from ..generation import GenerateSpec
from ..http.fields import EMBEDDING_RULES, GENERATING_RULES, GivenSalt, chosen_salt
from ..refusals import bad_value, check_model
from ..slices import encoded, spaced
from ..text.detokenizer import TextOptions
from ..text.pipeline import TextJob, TextRun
from ..text.prompts import Prompt, read_prompts
from ..text.sampling import checked_priority
from .answering import receive, respond_whole
from .metrics import RequestMeter
from .native_types import NativeFinish
from .openai_types import CachedTokensDetails
from .serving import Serving

P = TypeVar("P")

_LAST_STATE = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, hidden_states="sampled")

# ---- bodies -----------------------------------------------------------------------------------------


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """OpenAI's."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"  # base64: of float32, little-endian
    dimensions: int | None = None  # the model's own: vectors are not shortened
    priority: int = 0
    cache_salt: GivenSalt | None = None
    rid: str | None = None


class EncodeRequest(msgspec.Struct, kw_only=True):
    """SGLang's. Either a text or token ids, or a list of those."""

    model: str | None = None
    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    priority: int = 0
    extra_key: GivenSalt | None = None
    cache_salt: GivenSalt | None = None  # vLLM's name of the same
    rid: str | None = None


class EmbeddingData(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["embedding"] = "embedding"
    embedding: list[float] | str
    index: int


class EmbeddingUsage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[EmbeddingData]
    model: str
    usage: EmbeddingUsage


class EncodeMeta(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    finish_reason: NativeFinish
    prompt_tokens: int
    cached_tokens: int
    cached_tokens_details: CachedTokensDetails
    weight_version: str


class EncodeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    embedding: list[float]
    meta_info: EncodeMeta


# ---- routes -----------------------------------------------------------------------------------------


class Embeddings:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def embeddings(self, http: Request) -> Response:
        serving = self._serving
        body, laps = await receive(http, serving, EmbeddingRequest, EMBEDDING_RULES)
        meter = RequestMeter(serving.metrics, streamed=False)
        check_model(body.model, serving.card)
        if body.dimensions not in (None, size := serving.card.embedding_size):
            raise bad_value("dimensions", f"`dimensions` must be {size}, the model's, got {body.dimensions}.")
        laps.lap("receive")
        prompts = await self._prompts(body.input, "input")
        laps.lap("tokenize")
        request_id = serving.in_flight.choose_id(body.rid, http.state.request_id)
        jobs = await _jobs(prompts, request_id, body.priority, body.cache_salt or "")
        run = TextRun(serving.pipeline, jobs, laps)

        def one(prompt: int, vector: array[float]) -> EmbeddingData:
            return EmbeddingData(embedding=_encoded(vector, body.encoding_format), index=prompt)

        def answer(data: list[EmbeddingData]) -> EmbeddingAnswer:
            num_tokens = run.counts().prompt
            usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
            return EmbeddingAnswer(data=data, model=serving.card.name, usage=usage)

        return await self._respond(http, _Vectors(run, jobs, meter, one, answer), jobs, request_id)

    async def encode(self, http: Request) -> Response:
        serving = self._serving
        body, laps = await receive(http, serving, EncodeRequest, GENERATING_RULES)
        meter = RequestMeter(serving.metrics, streamed=False)
        check_model(body.model, serving.card)
        if (body.text is None) == (body.input_ids is None):
            raise bad_value("text", "Give either `text` or `input_ids`.")
        laps.lap("receive")
        given: str | list[str | int | list[int]]
        if body.input_ids is None:
            given = [*body.text] if isinstance(body.text, list) else body.text or ""
            is_batch = isinstance(body.text, list)
        else:
            given = [*body.input_ids]
            is_batch = bool(given) and isinstance(given[0], list)
        prompts = await self._prompts(given, "text" if body.input_ids is None else "input_ids")
        laps.lap("tokenize")
        request_id = serving.in_flight.choose_id(body.rid, http.state.request_id)
        salt = chosen_salt(body.cache_salt, body.extra_key)
        jobs = await _jobs(prompts, request_id, body.priority, salt)
        run = TextRun(serving.pipeline, jobs, laps)

        def one(prompt: int, vector: array[float]) -> EncodeAnswer:
            return _encode_answer(run, prompt, jobs[prompt], vector)

        def answer(answers: list[EncodeAnswer]) -> EncodeAnswer | list[EncodeAnswer]:
            return answers if is_batch else answers[0]

        return await self._respond(http, _Vectors(run, jobs, meter, one, answer), jobs, request_id)

    async def _prompts(self, given: str | list[str | int | list[int]], param: str) -> list[Prompt]:
        serving = self._serving
        return await read_prompts(
            given,
            param,
            card=serving.card,
            tokenizer=serving.tokenizer,
            generates=False,
        )

    async def _respond(
        self, http: Request, answer: _Vectors[P], jobs: Sequence[TextJob], request_id: str
    ) -> Response:
        generation_ids = [job.spec.request_id for job in jobs]
        return await respond_whole(http, self._serving.in_flight, request_id, generation_ids, answer.whole)


async def _jobs(prompts: Sequence[Prompt], request_id: str, priority: int, cache_salt: str) -> list[TextJob]:
    return [
        TextJob(
            spec=GenerateSpec(
                request_id=request_id if len(prompts) == 1 else f"{request_id}-{position}",
                work=Work(
                    prompt_ids=prompt.token_ids, choices=(0,), sampling=_LAST_STATE, cache_salt=cache_salt
                ),
                priority=checked_priority(priority),
            ),
            options=TextOptions(),
        )
        async for position, prompt in spaced(enumerate(prompts))
    ]


class _Vectors(Generic[P]):
    """The prompts' embeddings as a body: what `answer` makes of what `one` makes of each."""

    def __init__(
        self,
        run: TextRun,
        jobs: Sequence[TextJob],
        meter: RequestMeter,
        one: Callable[[int, array[float]], P],
        answer: Callable[[list[P]], object],
    ) -> None:
        self._run = run
        self._jobs = jobs
        self._meter = meter
        self._one = one
        self._answer = answer

    async def whole(self) -> list[bytes]:
        vectors: dict[int, array[float]] = {}
        async with aclosing(self._run.deltas()) as deltas:
            async for delta in deltas:
                if not delta.hidden_states:
                    raise RequestError("aborted", status=500, code="aborted", error_type="server_error")
                vectors[delta.output.prompt] = _normalized(delta.hidden_states[0])
        self._meter.answered(self._run.counts().prompt)
        parts = [
            encoded(self._one(prompt, vectors[prompt])) async for prompt in spaced(range(len(self._jobs)))
        ]
        return [msgspec.json.encode(self._answer(parts))]


def _normalized(state: bytes) -> array[float]:
    """Of Euclidean length 1."""
    values = array("f", state)
    length = math.sqrt(sum(value * value for value in values)) or 1.0
    return array("f", [value / length for value in values])


def _encoded(vector: array[float], encoding: Literal["float", "base64"]) -> list[float] | str:
    return vector.tolist() if encoding == "float" else base64.b64encode(vector.tobytes()).decode()


def _encode_answer(run: TextRun, prompt: int, job: TextJob, vector: array[float]) -> EncodeAnswer:
    info = run.info(prompt)
    return EncodeAnswer(
        embedding=vector.tolist(),
        meta_info=EncodeMeta(
            id=job.spec.request_id,
            finish_reason=NativeFinish(type="length", length=0),
            prompt_tokens=len(job.spec.work.prompt_ids),
            cached_tokens=info.report.num_cached_tokens,
            cached_tokens_details=CachedTokensDetails(device=info.report.num_cached_tokens),
            weight_version=info.weight_version or run.weight_version,
        ),
    )
