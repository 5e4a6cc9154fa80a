"""Puts a router's HTTP surface together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from ..runtime.process import NO_KEYS, AccessKeys
from ..runtime.timing import UNSCALED, Timing
from ..runtime.version import VERSION
from .control.cluster import control_commands, membership_commands
from .control.commands import routes_of
from .control.facts import ClusterFacts, ModelEntry, ModelList
from .control.operations import Operator, get_internal_state, operator_commands
from .control.sessions import close_session, open_session
from .control.weights import WeightAdmin, WeightCalls, weight_commands, weight_questions
from .generation import ClusterView, Control, Generator, Membership, ModelCard, Sessions
from .http.answer_counts import HttpAnswers
from .http.bodies import BodyLimits
from .http.in_flight import InFlightRequests
from .http.membership_guard import MembershipGuard
from .http.mounting import GET, POST, Route, make_app
from .http.openapi import Bodies
from .surfaces.chat import ChatCompletions
from .surfaces.completions import Completions
from .surfaces.embeddings import (
    EmbeddingAnswer,
    EmbeddingRequest,
    Embeddings,
    EncodeAnswer,
    EncodeRequest,
)
from .surfaces.metrics import HttpMetrics
from .surfaces.native import Native
from .surfaces.native_types import (
    DetokenizeAnswer,
    DetokenizeRequest,
    NativeOutput,
    NativeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from .surfaces.openai_types import ChatCompletion, ChatRequest, Completion, CompletionRequest
from .surfaces.serving import Serving
from .surfaces.tokens import TokenCalls
from .text.pipeline import Pipeline
from .text.request_log import RequestLog
from .text.sampling import GenerationDefaults
from .text.timelines import Timelines
from .text.tokenization import Tokenizer


def build_router_app(
    *,
    card: ModelCard,
    tokenizer: Tokenizer,
    generation_defaults: GenerationDefaults,
    generator: Generator,
    view: ClusterView,
    membership: Membership,
    control: Control,
    weights: WeightAdmin,
    sessions: Sessions,
    operator: Operator,
    request_log: RequestLog,
    registry: CollectorRegistry,
    in_flight: InFlightRequests,
    timelines: Timelines,
    keys: AccessKeys = NO_KEYS,
    is_loopback: bool = True,
    is_open_cluster: bool = False,
    root_path: str = "",
    allowed_origins: Sequence[str] = (),
    seed: int | None = None,
    allow_pickled_tensors: bool = False,
    limits: BodyLimits | None = None,
    timing: Timing = UNSCALED,
) -> FastAPI:
    """The whole surface of a router.

    `is_open_cluster`: whoever may ask may also register and remove nodes.

    The HTTP metrics are registered with `registry`; ``/metrics`` is what `view.metrics_text` returns, which
    must include them. Seeds of requests that bring none are drawn from `seed`.
    `in_flight.drain()` closes the door for new requests (`server.serve` does it).
    """
    limits = limits or BodyLimits()
    serving = Serving(
        card=card,
        tokenizer=tokenizer,
        pipeline=Pipeline(
            tokenizer=tokenizer,
            generator=generator,
            timelines=timelines,
            weight_version=view.weight_version,
            request_log=request_log,
            sessions=sessions,
        ),
        defaults=generation_defaults,
        draw_seed=partial((random.SystemRandom() if seed is None else random.Random(seed)).getrandbits, 64),
        limits=limits,
        metrics=HttpMetrics(registry, card.name),
        in_flight=in_flight,
        sessions=sessions,
    )
    completions = Completions(serving)
    chat = ChatCompletions(serving)
    native = Native(serving)
    embeddings = Embeddings(serving)
    tokens = TokenCalls(card=card, tokenizer=tokenizer, limits=limits)
    cluster = ClusterFacts(
        card=card,
        view=view,
        generator=generator,
        in_flight=in_flight,
        timelines=timelines,
        timing=timing,
        version=VERSION,
    )

    weight_calls = WeightCalls(weights, is_node=False)
    routes = [
        Route(
            POST,
            ("/v1/completions",),
            completions.handle,
            Bodies(CompletionRequest, Completion, streams=True),
            generates=True,
        ),
        Route(
            POST,
            ("/v1/chat/completions",),
            chat.handle,
            Bodies(ChatRequest, ChatCompletion, streams=True),
            generates=True,
        ),
        Route(
            ("POST", "PUT"),
            ("/generate",),
            native.handle,
            Bodies(NativeRequest, NativeOutput, streams=True, batches=True),
            generates=True,
        ),
        Route(POST, ("/tokenize", "/v1/tokenize"), tokens.tokenize, Bodies(TokenizeRequest, TokenizeAnswer)),
        Route(
            POST,
            ("/detokenize", "/v1/detokenize"),
            tokens.detokenize,
            Bodies(DetokenizeRequest, DetokenizeAnswer),
        ),
        Route(GET, ("/tokenizer_info",), tokens.tokenizer_info),
        Route(
            POST,
            ("/v1/embeddings",),
            embeddings.embeddings,
            Bodies(EmbeddingRequest, EmbeddingAnswer),
            generates=True,
        ),
        Route(POST, ("/encode",), embeddings.encode, Bodies(EncodeRequest, EncodeAnswer), generates=True),
        open_session(sessions, limits),
        *routes_of([close_session(sessions.close_session)], limits),
        Route(GET, ("/v1/models", "/v1/models/"), cluster.models, Bodies(answer=ModelList)),
        Route(GET, ("/v1/models/{model_id:path}",), cluster.model, Bodies(answer=ModelEntry)),
        Route(GET, ("/health", "/ping", "/live", "/liveness"), cluster.health),
        Route(GET, ("/ready", "/readiness"), cluster.ready),
        Route(GET, ("/health_generate",), cluster.health_generate),
        Route(GET, ("/version",), cluster.version_info),
        Route(GET, ("/server_info", "/get_server_info"), cluster.server_info),
        Route(GET, ("/model_info", "/get_model_info"), cluster.model_info),
        Route(GET, ("/get_weight_version",), cluster.weight_version),
        Route(GET, ("/get_load",), cluster.load),
        Route(GET, ("/v1/loads",), cluster.loads),
        Route(GET, ("/load",), cluster.server_load),
        Route(GET, ("/metrics",), cluster.metrics, Bodies(media_type="text/plain")),
        Route(GET, ("/requests/{request_id:path}",), cluster.request_state),
        Route(GET, ("/workers",), cluster.workers),
        *routes_of(membership_commands(membership, view), limits),
        *routes_of(control_commands(control, in_flight.generations_matching), limits),
        *routes_of(weight_commands(weight_calls, allows_pickles=allow_pickled_tensors), limits),
        *weight_questions(weight_calls, limits),
        get_internal_state(operator),
        *routes_of(operator_commands(operator, request_log), limits),
    ]
    answers = HttpAnswers(lambda: (card.name, "router"))
    registry.register(answers)

    def admit(client: str) -> None:
        in_flight.check_open()
        generator.check_wait(client)

    return make_app(
        routes,
        keys=keys,
        answers=answers,
        admit=admit,
        is_loopback=is_loopback,
        root_path=root_path,
        allowed_origins=allowed_origins,
        membership=None if is_open_cluster else MembershipGuard(keys, timing),
        is_draining=lambda: in_flight.is_draining,
    )
