"""Puts the HTTP surface of a node's front together."""

from __future__ import annotations

from fastapi import FastAPI

from ..api.control.cluster import control_commands
from ..api.control.commands import routes_of
from ..api.control.facts import ModelEntry, ModelList
from ..api.control.operations import get_internal_state, operator_commands
from ..api.control.sessions import close_session
from ..api.control.weights import WeightCalls, weight_commands, weight_questions
from ..api.http.bodies import BodyLimits
from ..api.http.mounting import GET, Route, make_app
from ..api.http.openapi import Bodies
from ..messages.node import NodeEntry
from ..runtime.process import AccessKeys
from .control import FrontControl
from .facts import NodeFacts
from .operator import FrontOperator
from .weights import FrontWeights


def build_node_app(
    facts: NodeFacts,
    control: FrontControl,
    operator: FrontOperator,
    weights: FrontWeights,
    *,
    limits: BodyLimits,
    keys: AccessKeys,
    is_loopback: bool,
) -> FastAPI:
    calls = WeightCalls(weights, is_node=True)
    routes = [
        Route(GET, ("/health", "/ping"), facts.health),
        Route(GET, ("/live", "/liveness"), facts.live),
        Route(GET, ("/ready", "/readiness"), facts.ready),
        Route(GET, ("/version",), facts.version_info),
        Route(GET, ("/node_entry",), facts.node_entry, Bodies(answer=NodeEntry)),
        Route(GET, ("/server_info", "/get_server_info"), facts.server_info),
        Route(GET, ("/model_info", "/get_model_info"), facts.model_info),
        Route(GET, ("/v1/models", "/v1/models/"), facts.models, Bodies(answer=ModelList)),
        Route(GET, ("/v1/models/{model_id:path}",), facts.model, Bodies(answer=ModelEntry)),
        Route(GET, ("/get_load",), facts.load),
        Route(GET, ("/v1/loads",), facts.loads),
        Route(GET, ("/metrics",), facts.metrics, Bodies(media_type="text/plain")),
        Route(GET, ("/requests/{request_id:path}",), facts.request_state),
        *routes_of(control_commands(control, lambda request_id: (request_id,)), limits),
        *routes_of([close_session(control.close_session)], limits),
        *routes_of(weight_commands(calls), limits),
        *weight_questions(calls, limits),
        get_internal_state(operator),
        *routes_of(operator_commands(operator), limits),
    ]
    return make_app(routes, keys=keys, is_loopback=is_loopback, answers=facts.answers)
