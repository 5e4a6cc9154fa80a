"""Every field of every route, of a router and of a node, with values that nobody should send.

Behind both are the real parts, down to messages over zmq to a scheduler that decodes them as a node does: a
value that no message holds would show as an internal error.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import msgspec
import pytest_asyncio
import zmq.asyncio
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from pdserve.api.app import build_router_app
from pdserve.api.generation import ModelCard
from pdserve.api.http.bodies import BodyLimits
from pdserve.api.http.in_flight import InFlightRequests
from pdserve.api.surfaces.native_types import NativeSampling
from pdserve.api.text.request_log import RequestLog
from pdserve.api.text.sampling import GenerationDefaults
from pdserve.api.text.timelines import Timelines
from pdserve.api.text.tokenization import Tokenizer
from pdserve.front.app import build_node_app
from pdserve.front.control import FrontControl
from pdserve.front.facts import NodeFacts
from pdserve.front.operator import FrontOperator
from pdserve.front.registrar import Registrar
from pdserve.front.scheduler_link import SchedulerLink
from pdserve.front.weights import FrontWeights
from pdserve.links.entry_lookup import NoNodeError
from pdserve.messages.node import (
    ClientToNode,
    Finish,
    GenerateRequest,
    NodeEntry,
    Pong,
    TokenOutput,
    TokenOutputs,
)
from pdserve.messages.report import PromptReport
from pdserve.messages.sampling import TokenLogprob
from pdserve.messages.timeline import SpanClock
from pdserve.router.assembly import build_router
from pdserve.router.connector import ZmqConnector
from pdserve.router.options import RouterOptions
from pdserve.runtime.config import Routing
from pdserve.runtime.process import NO_KEYS
from pdserve.runtime.timing import UNSCALED
from pdserve.tests.deadline import DEADLINE_S
from pdserve.tests.unit.api.conftest import eventually
from pdserve.tests.unit.api.scheduler import LOAD, FakeScheduler

ODD = [
    "-1",
    str(2**70),
    str(-(2**70)),
    "0.1",
    "true",
    '""',
    r'"\u0000"',
    '"²"',
    '"../\\u202e"',
    f'"{"x" * 5000}"',
    f"[{2**70}]",
    r'["\u0000"]',
    f'{{"a": {2**70}}}',
    r'{"\u0000": "²"}',
    "[[[[]]]]",
    "[null]",
]


class Scheduler(FakeScheduler):
    """Answers a request at once, with one token of each choice."""

    def _reply(self, message: ClientToNode) -> msgspec.Struct | None:
        if not isinstance(message, GenerateRequest):
            reply = super()._reply(message)
            if isinstance(reply, Pong):  # it has room
                load = msgspec.structs.replace(LOAD, num_total_pages=10**6, num_free_pages=10**6)
                reply = msgspec.structs.replace(reply, load=load)
            return reply
        sampling = message.work.sampling
        scored = TokenLogprob(5, -1.0, ())
        prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        if sampling.num_prompt_logprobs is not None:
            prompt_logprobs = (None, *([scored] * (len(message.work.prompt_ids) - 1)))
            prompt_logprobs = prompt_logprobs[sampling.prompt_logprobs_start :]
        return TokenOutputs(
            outputs=tuple(
                TokenOutput(
                    request_id=message.request_id,
                    attempt=message.attempt,
                    choice=choice,
                    position=0,
                    token_ids=(5,),
                    logprobs=() if sampling.num_logprobs is None else (scored,),
                    report=PromptReport(
                        logprobs=prompt_logprobs,
                        hidden_states=bytes(16 * len(message.work.prompt_ids))
                        if sampling.hidden_states == "all"
                        else b"",
                    ),
                    hidden_states=() if sampling.hidden_states == "none" else (bytes(16),),
                    finish=Finish(reason="length"),
                )
                for choice in message.work.choices
            )
        )


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """Of a refusal; empty for an outcome (``success``, ``message``)."""
        content = json.loads(self.body)
        return content.get("error", {}) if isinstance(content, dict) else {}


async def ask(app: FastAPI, method: str, path: str, body: bytes = b"", query: str = "") -> Answer:
    """One request, without a socket."""
    is_json = path != "/update_weights_from_tensor"
    body = body if is_json else SAFETENSORS
    status, sent, received = 0, b"", iter([{"type": "http.request", "body": body}])
    never = asyncio.Event()

    async def receive() -> Any:  # noqa: ANN401 (ASGI's)
        if (message := next(received, None)) is None:
            await never.wait()
        return message

    async def send(message: Any) -> None:  # noqa: ANN401 (ASGI's)
        nonlocal status, sent
        status = message.get("status", status)
        sent += message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": quote(path).encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"content-type", b"application/json" if is_json else b"application/octet-stream")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    try:
        async with asyncio.timeout(DEADLINE_S):
            await app(scope, receive, send)
    except TimeoutError:
        return Answer(504, b"{}")
    except Exception:
        if status != 500:  # it was answered: Starlette raises what a handler raised behind its answer
            raise
    return Answer(status, sent)


# What each body that needs something holds where nothing is odd.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 1}},
    "/tokenize": {"prompt": "a"},
    "/v1/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/detokenize": {"tokens": [1]},
    "/v1/embeddings": {"input": "a"},
    "/encode": {"text": "a"},
    "/close_session": {"session_id": "s"},
    "/workers": {"url": "http://127.0.0.1:9"},
    "/abort_request": {"rid": "r"},
    "/assert_peer_death": {"incarnation": "i"},
    "/set_internal_state": {"server_args": {"max_queued_prefills": 3}},
    "/configure_logging": {"log_level": "info"},
    "/update_weights_from_disk": {"model_path": "/m", "force": True},
    "/update_weights_from_distributed": {
        "names": ["t"],
        "dtypes": ["float32"],
        "shapes": [[1]],
        "force": True,
    },
    "/update_weights_from_ipc": {"name": "file", "force": True},
    "/update_weights_from_peer": {"peer": "http://127.0.0.1:9", "force": True},
    "/init_weights_update_group": {
        "master_address": "127.0.0.1",
        "master_port": 5,
        "rank_offset": 1,
        "world_size": 3,
    },
    "/save_sharded_model": {"path": "/m"},
    "/save_remote_model": {"url": "s3://m"},
    "/get_weights_by_name": {"name": "t"},
}
# Objects whose fields the page does not list.
INNER = {
    "sampling_params": NativeSampling.__struct_fields__,
    "server_args": ("max_queued_prefills", "schedule_conservativeness", "odd"),
    "session_params": ("id", "rid", "offset", "replace", "drop_previous_output"),
    "entry": NodeEntry.__struct_fields__,
    "gpu": ("device_uuid", "handle", "offset"),
    "stream_options": ("include_usage", "include_obligation"),
    "logit_bias": ("1", "²", str(2**70)),
}
QUERIES = {
    "/flush_cache": ("timeout",),
    "/reset_prefix_cache": ("timeout",),
    "/get_weights_by_name": ("name", "truncate_size"),
    "/sleep": ("level",),
    "/wake_up": ("tags",),
    "/update_weights_from_tensor": ("mode", "weight_version", "force", "abort_all_requests"),
}
SAFETENSORS = (2).to_bytes(8, "little") + b"{}"  # without tensors
ODD_TEXTS = ["", "\0", "²", "1e400", "-1", str(2**70), "nan", "x" * 5000, "%", "..", "http://[", "\u202e"]


def fields_of(page: dict[str, Any], operation: dict[str, Any]) -> list[str]:
    """Names of its body's fields."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    reference = content.get("schema", {}).get("$ref", "")
    if not reference:
        return []
    return list(page["components"]["schemas"][reference.rsplit("/", 1)[1]].get("properties", {}))


def odd_bodies(path: str, fields: list[str]) -> Iterator[bytes]:
    """Each field with each odd value, and each field of an object in it."""
    base = BODIES.get(path, {})
    for field in fields:
        rest = {name: value for name, value in base.items() if name != field}
        head = json.dumps(rest)[1:-1]
        for odd in ODD:
            yield f'{{{head}{", " if head else ""}"{field}": {odd}}}'.encode()
        for inner, odd in itertools.product(INNER.get(field, ()), ODD):
            value = f"{{{json.dumps(inner)}: {odd}}}"
            yield f'{{{head}{", " if head else ""}"{field}": {value}}}'.encode()


async def problems_of(app: FastAPI) -> list[str]:
    """Answers that are no answers: internal errors, and refusals that name no field."""
    page = app.openapi()
    problems: list[str] = []
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            if method == "head":
                continue
            cases = [(body, "") for body in odd_bodies(path, fields_of(page, operation))]
            cases += [
                (json.dumps(BODIES.get(path, {})).encode(), f"{name}={quote(text)}")
                for name in QUERIES.get(path, ())
                for text in ODD_TEXTS
            ]
            paths = [path]
            if "{" in path:
                paths = [path[: path.index("{")] + text for text in ODD_TEXTS]
                cases = [(b"", "")]
            for where, (body, query) in itertools.product(paths, cases):
                answer = await ask(app, method.upper(), where, body, query)
                if where == "/pause_generation":
                    await ask(app, "POST", "/continue_generation")
                is_unnamed = answer.status == 400 and answer.error and not answer.error.get("param")
                if answer.status >= 500 or (is_unnamed and not query):
                    asked = f"{method} {where[:60]}?{query[:60]} {body[:200]!r}"
                    problems.append(f"{asked}: {answer.status} {answer.body[:300]!r}")
    return problems


@pytest_asyncio.fixture
async def scheduler() -> AsyncIterator[Scheduler]:
    context = zmq.asyncio.Context()
    scheduler = Scheduler(context)
    scheduler.outcome = lambda _: (False, "not now")
    scheduler.entry = msgspec.structs.replace(scheduler.entry, url="http://node", colocated=True)
    yield scheduler
    await scheduler.close()
    context.destroy(linger=0)


async def test_a_router_answers_whatever_a_field_holds(
    scheduler: Scheduler, tokenizer: Tokenizer, card: ModelCard
) -> None:
    context = zmq.asyncio.Context()
    registry = CollectorRegistry()

    async def lookup(url: str) -> NodeEntry:
        raise NoNodeError(f"{url} does not answer as a node")

    router = build_router(
        RouterOptions(routing=Routing(request_timeout=5.0, max_queue_wait=0)),
        model=card,
        connect=ZmqConnector(context, None, UNSCALED),
        lookup=lookup,
        metrics_registry=registry,
    )
    app = build_router_app(
        card=card,
        tokenizer=tokenizer,
        generation_defaults=GenerationDefaults(),
        generator=router.service,
        view=router.view,
        membership=router.administration,
        control=router.administration,
        weights=router.weights,
        sessions=router.sessions,
        operator=router.operator,
        request_log=RequestLog(),
        registry=registry,
        in_flight=InFlightRequests(),
        timelines=Timelines(SpanClock.start(), registry, card.name),
        limits=BodyLimits(max_bytes=100_000),
    )
    router.start()
    await router.administration.register_worker(scheduler.entry.url, scheduler.entry)
    await eventually(lambda: router.view.readiness()[0])
    assert await problems_of(app) == []
    await router.close()
    context.destroy(linger=0)


async def test_a_node_answers_whatever_a_field_holds(scheduler: Scheduler) -> None:
    context = zmq.asyncio.Context()
    url = scheduler.entry.url

    async def lookup(url: str) -> NodeEntry:
        raise NoNodeError(f"{url} does not answer as a node")

    link = SchedulerLink(context, scheduler.address, None, UNSCALED)
    registrar = Registrar(url, [], NO_KEYS, UNSCALED)
    app = build_node_app(
        NodeFacts(link, registrar, url, ""),
        FrontControl(link),
        FrontOperator(link, url),
        FrontWeights(link, url, lookup),
        limits=BodyLimits(),
        keys=NO_KEYS,
        is_loopback=True,
    )
    await link.ping()
    assert await problems_of(app) == []
    await registrar.leave()
    await link.close()
    context.destroy(linger=0)
