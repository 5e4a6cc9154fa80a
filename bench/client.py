"""One request over HTTP, from a prepared body to a record. Nothing is encoded while the clock runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import msgspec

from ..runtime.errors import StartupError
from .connections import Connections, Exchange
from .datasets import Sample
from .load import Release
from .records import MeasuredRequest, Outcome
from .stream import Expectation, StreamReader, error_message

INFO_TIMEOUT_S = 10.0


class Endpoint(StrEnum):
    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"

    @property
    def endpoint_type(self) -> str:
        """The name that `vllm bench serve` gives it."""
        return "openai" if self is Endpoint.COMPLETIONS else "openai-chat"


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyOptions:
    """What every request of a run asks for."""

    model: str
    endpoint: Endpoint
    temperature: float | None
    ignore_eos: bool
    continuous_usage: bool
    token_ids: bool
    timeline: bool
    extra_body: Mapping[str, Any]


class _Model(msgspec.Struct, frozen=True):
    id: str


class _ModelList(msgspec.Struct, frozen=True):
    data: list[_Model]


class _ModelInfo(msgspec.Struct, frozen=True):
    vocab_size: Annotated[int, msgspec.Meta(ge=1)] | None = None


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request ready to send."""

    body: bytes
    expected: Expectation


def prepare(sample: Sample, options: BodyOptions) -> PreparedRequest:
    """The JSON body of a sample, and what its right answer looks like."""
    body: dict[str, Any] = {"model": options.model, "stream": True, "stream_options": {"include_usage": True}}
    if options.continuous_usage:
        body["stream_options"]["continuous_usage_stats"] = True
    match options.endpoint:
        case Endpoint.COMPLETIONS:
            body |= {"prompt": sample.prompt, "max_tokens": sample.num_output_tokens}
        case Endpoint.CHAT:
            if not isinstance(sample.prompt, str):
                raise StartupError(f"{Endpoint.CHAT} takes text; give --tokenizer to turn token ids into it")
            body["messages"] = [{"role": "user", "content": sample.prompt}]
            body["max_completion_tokens"] = sample.num_output_tokens
    if options.temperature is not None:
        body["temperature"] = options.temperature
    if options.ignore_eos:
        body["ignore_eos"] = True
    if options.token_ids:
        body["return_token_ids"] = True
    if options.timeline:
        body["timeline"] = True
    return PreparedRequest(
        body=msgspec.json.encode(body | dict(options.extra_body)),
        expected=Expectation(sample.num_prompt_tokens, sample.num_output_tokens, options.ignore_eos),
    )


class Client:
    """Sends requests to one server and times what comes back."""

    def __init__(
        self,
        base_url: str,
        endpoint: Endpoint,
        timeout_s: float,
        api_key: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._connections = Connections(base_url, headers)
        self._base_url = base_url
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._clock = clock

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connections.close()

    async def send(self, request: PreparedRequest, release: Release) -> MeasuredRequest:
        """Never raises for what a server does: every end is an outcome in the record."""
        reader = StreamReader()
        no_stream: list[bytes] = []

        def take(status: int, data: bytes) -> None:
            if status == 200:
                reader.feed(data, self._clock())
            else:
                no_stream.append(data)

        sent_s = self._clock()
        exchange = Exchange(self._connections.request("POST", self._endpoint, request.body), take)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._connections.carry(exchange)
        except TimeoutError:
            reader.fail(Outcome.TIMEOUT, f"no end within {self._timeout_s:g} s")
        except ConnectionError as error:
            outcome = Outcome.CONNECT if exchange.status is None else Outcome.TRUNCATED
            reader.fail(outcome, f"{type(error).__name__}: {error}")
        status = exchange.status
        if status is not None and status != 200:
            reader.fail(_http_outcome(status), f"HTTP {status}: {error_message(b''.join(no_stream))}")
        ended_s = self._clock()
        answer = reader.judge(request.expected)
        return MeasuredRequest(
            index=release.index,
            outcome=answer.outcome,
            status=status,
            error=answer.error,
            num_prompt_tokens=answer.num_prompt_tokens,
            num_output_tokens=answer.num_output_tokens,
            due_s=release.due_s,
            released_s=release.released_s,
            sent_s=sent_s,
            ended_s=ended_s,
            chunks=answer.chunks,
            count_source=answer.count_source,
            finish_reason=answer.finish_reason,
            text=answer.text,
            spans=answer.spans,
        )

    async def first_model(self) -> str:
        """The first model that `/v1/models` lists."""
        status, body = await self._get("/v1/models")
        if status != 200:
            raise StartupError(f"{self._base_url}/v1/models: HTTP {status}: {error_message(body)}")
        try:
            return msgspec.json.decode(body, type=_ModelList).data[0].id
        except (msgspec.DecodeError, IndexError) as error:
            raise StartupError(f"{self._base_url}/v1/models lists no model; give --model") from error

    async def vocab_size(self) -> int | None:
        """`vocab_size` of `/model_info`, or None where the server does not say."""
        status, body = await self._get("/model_info")
        if status != 200:
            return None
        try:
            return msgspec.json.decode(body, type=_ModelInfo).vocab_size
        except msgspec.DecodeError:
            return None

    async def _get(self, path: str) -> tuple[int, bytes]:
        url = self._base_url + path
        body = bytearray()
        exchange = Exchange(self._connections.request("GET", path), lambda _, data: body.extend(data))
        try:
            async with asyncio.timeout(INFO_TIMEOUT_S):
                await self._connections.carry(exchange)
        except TimeoutError as error:
            raise StartupError(f"{url}: no answer within {INFO_TIMEOUT_S:g} s") from error
        except ConnectionError as error:
            raise StartupError(f"{url}: {error}") from error
        assert exchange.status is not None, "it has ended well"
        return exchange.status, bytes(body)


def _http_outcome(status: int) -> Outcome:
    if 400 <= status < 500:
        return Outcome.HTTP_4XX
    return Outcome.HTTP_5XX if 500 <= status < 600 else Outcome.HTTP_OTHER
