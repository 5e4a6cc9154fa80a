"""A fake OpenAI-compatible server that can break the stream contract in every known way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from enum import StrEnum
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from pdserve.bench.records import CountSource, MeasuredRequest, Outcome, TokenChunk


class Fault(StrEnum):
    NONE = "none"
    EARLY_END = "early_end"
    NO_FINISH_REASON = "no_finish_reason"
    ERROR_THEN_ABORT = "error_then_abort"
    ERROR_THEN_DONE = "error_then_done"
    ABORT = "abort"
    ABORT_AFTER_DONE = "abort_after_done"
    PINGS = "pings"
    UNREQUESTED_USAGE = "unrequested_usage"
    NO_USAGE = "no_usage"
    STATUS_503 = "status_503"
    STATUS_400 = "status_400"
    STATUS_204 = "status_204"
    ONE_TOKEN_SHORT = "one_token_short"
    WRONG_USAGE = "wrong_usage"
    WRONG_PROMPT_COUNT = "wrong_prompt_count"
    NO_TOKENS = "no_tokens"
    BAD_JSON = "bad_json"
    SILENCE = "silence"
    DROP_BEFORE_STATUS = "drop_before_status"


class FakeServer:
    """Answers completions with `t0`, `t1`, … in the way that `fault` and the fields say."""

    def __init__(self) -> None:
        self.fault = Fault.NONE
        self.tokens_per_chunk = 1
        self.continuous_usage = True
        self.vocab_size: int | None = 1000
        self.model = "fake/model"
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.journal: list[str] | None = None
        self.name = ""
        self.num_running = 0
        self.peak_running = 0
        self.url = ""

    def inject(self, fault: str) -> None:
        """From now on, answer with the fault of that name."""
        self.fault = Fault(fault)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/completions", self.generate)
        app.router.add_post("/v1/chat/completions", self.generate)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/model_info", self.model_info)
        return app

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model}]})

    async def model_info(self, _: web.Request) -> web.Response:
        info = {} if self.vocab_size is None else {"vocab_size": self.vocab_size}
        return web.json_response({"model_path": "x"} | info)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.journal is not None:
            self.journal.append(self.name)
        self.num_running += 1
        self.peak_running = max(self.peak_running, self.num_running)
        try:
            return await self.answer(request, body)
        finally:
            self.num_running -= 1

    async def answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        match self.fault:
            case Fault.STATUS_503:
                return web.json_response({"error": {"message": "no decode node"}}, status=503)
            case Fault.STATUS_400:
                return web.json_response({"error": {"message": "bad prompt"}}, status=400)
            case Fault.STATUS_204:
                return web.Response(status=204)
            case Fault.DROP_BEFORE_STATUS:
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if self.fault is Fault.SILENCE:
            await asyncio.sleep(30)
        for event in self.events(body):
            await response.write(event)
            await asyncio.sleep(0)
        if self.fault in (Fault.ABORT, Fault.ERROR_THEN_ABORT, Fault.ABORT_AFTER_DONE):
            await asyncio.sleep(0.02)
            assert request.transport is not None
            request.transport.abort()
        return response

    def events(self, body: dict[str, Any]) -> list[bytes]:
        chat = "messages" in body
        asked = body["max_completion_tokens"] if chat else body["max_tokens"]
        num_tokens = asked - 1 if self.fault is Fault.ONE_TOKEN_SHORT else asked
        prompt = body["messages"][0]["content"].split() if chat else body["prompt"]
        num_prompt = len(prompt) + (self.fault is Fault.WRONG_PROMPT_COUNT)
        continuous = self.continuous_usage and body["stream_options"].get("continuous_usage_stats", False)

        def usage(num_completion: int) -> dict[str, int]:
            return {"prompt_tokens": num_prompt, "completion_tokens": num_completion}

        def chunk(ids: list[int], num_so_far: int, finish_reason: str | None) -> bytes:
            text = "".join(f"t{token_id} " for token_id in ids)
            choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            if body.get("return_token_ids"):
                choice["token_ids"] = ids
            return sse({"choices": [choice]} | ({"usage": usage(num_so_far)} if continuous else {}))

        if self.fault is Fault.NO_TOKENS:
            return [chunk([], 0, "stop"), sse({"choices": [], "usage": usage(0)}), DONE]
        events = []
        if chat:
            role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
            events.append(sse(role | ({"usage": usage(0)} if continuous else {})))
        for start in range(0, num_tokens, self.tokens_per_chunk):
            ids = list(range(start, min(start + self.tokens_per_chunk, num_tokens)))
            num_so_far = start + len(ids)
            last = num_so_far == num_tokens and self.fault is not Fault.NO_FINISH_REASON
            events.append(chunk(ids, num_so_far, "length" if last else None))
        match self.fault:
            case Fault.PINGS:
                events = [part for event in events for part in (b": ping\n\n", event)]
            case Fault.UNREQUESTED_USAGE:
                events.insert(1, sse({"choices": [], "usage": usage(1)}))
            case Fault.EARLY_END | Fault.ABORT:
                return events[: len(events) // 2]
            case Fault.BAD_JSON:
                return [events[0], b"data: {'error': 1}\n\n", DONE]
            case Fault.ERROR_THEN_ABORT:
                return [events[0], sse({"error": {"message": "decode died"}})]
            case Fault.ERROR_THEN_DONE:
                return [events[0], sse({"error": {"message": "decode died"}}), DONE]
        if self.fault is not Fault.NO_USAGE:
            timeline = [
                {"name": "prefill", "start_s": 0.0, "duration_s": 0.02},
                {"name": "wire", "start_s": 0.02, "duration_s": 0.001},
                {"name": "wire", "start_s": 0.03, "duration_s": 0.002},
            ]
            last_event: dict[str, Any] = {
                "choices": [],
                "usage": usage(num_tokens + (self.fault is Fault.WRONG_USAGE)),
            }
            events.append(
                sse(last_event | ({"timeline": {"spans": timeline}} if body.get("timeline") else {}))
            )
        return [*events, DONE]


DONE = b"data: [DONE]\n\n"


def sse(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


@pytest.fixture
async def fake_server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    async with TestServer(fake.app()) as server:
        fake.url = str(server.make_url("")).rstrip("/")
        yield fake


@pytest.fixture
async def second_server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    async with TestServer(fake.app()) as server:
        fake.url = str(server.make_url("")).rstrip("/")
        yield fake


@pytest.fixture
def make_record() -> Callable[..., MeasuredRequest]:
    """A good record; `arrivals` are (seconds after sending, tokens) of each chunk."""

    def make(
        arrivals: list[tuple[float, int]],
        *,
        due_s: float = 0.0,
        released_s: float | None = None,
        sent_s: float | None = None,
        **changes: Any,  # noqa: ANN401
    ) -> MeasuredRequest:
        released_s = due_s if released_s is None else released_s
        sent_s = released_s if sent_s is None else sent_s
        chunks = tuple(TokenChunk(sent_s + after_s, num) for after_s, num in arrivals)
        fields: dict[str, Any] = {
            "index": 0,
            "outcome": Outcome.OK,
            "status": 200,
            "error": "",
            "num_prompt_tokens": 10,
            "num_output_tokens": sum(num for _, num in arrivals),
            "due_s": due_s,
            "released_s": released_s,
            "sent_s": sent_s,
            "ended_s": chunks[-1].at_s if chunks else sent_s,
            "chunks": chunks,
            "count_source": CountSource.CONTINUOUS_USAGE,
            "finish_reason": "length",
            "text": "",
            "spans": (),
        }
        return MeasuredRequest(**fields | changes)

    return make
