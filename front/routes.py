"""A node's own routes: what they answer comes from its scheduler."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from ..api.control.admin import (
    METRICS_MEDIA_TYPE,
    AbortRequest,
    AssertPeerDeathRequest,
    ModelEntry,
    ModelList,
    PauseRequest,
    flush_timeout_s,
    load_body,
    model_answer,
    model_info,
    model_list,
    read_abort,
    read_death,
    read_pause,
    request_not_found,
    wanted_request,
)
from ..api.control.operations import OperationRoutes
from ..api.control.weights import WeightRoutes, weight_operations
from ..api.generation import ModelCard
from ..api.http.answer_counts import HttpAnswers
from ..api.http.answers import json_response, outcome
from ..api.http.bodies import BodyLimits
from ..api.http.mounting import GET, POST, Operation, make_app
from ..api.http.openapi import Bodies, reports
from ..api.refusals import bad_value
from ..api.surfaces.native_types import CloseSessionRequest
from ..api.surfaces.sessions import read_close
from ..links.entry_lookup import proof_info
from ..messages.kv_layout import KVLayout
from ..messages.node import ModelInfo, NodeEntry
from ..messages.operation import CloseSession, ContinueGeneration, PauseGeneration
from ..runtime.cluster_proof import is_nonce
from ..runtime.errors import RequestError
from ..runtime.process import AccessKeys
from ..runtime.version import VERSION
from .operator import NodeOperator
from .registrar import Registrar
from .scheduler_link import SchedulerLink

_STARTED_UNIX_S = int(time.time())


class NodeRoutes:
    """Handlers of a node's own routes. What they answer comes from the scheduler."""

    def __init__(
        self, link: SchedulerLink, registrar: Registrar, url: str, limits: BodyLimits, cluster_secret: str
    ) -> None:
        self._link = link
        self._registrar = registrar
        self._url = url
        self._limits = limits
        self._cluster_secret = cluster_secret
        self.answers = HttpAnswers(self._metric_labels)
        self._registry = CollectorRegistry()
        self._registry.register(self.answers)

    async def health(self, _: Request) -> Response:
        """This process and the scheduler's loop are alive."""
        if not self._link.is_alive:
            raise _unavailable("The scheduler does not answer.", "scheduler_silent")
        return json_response({"status": "ok"})

    async def live(self, _: Request) -> Response:
        """This process is alive."""
        return json_response({"status": "ok"})

    async def ready(self, http: Request) -> Response:
        """The scheduler is alive, takes work, and a router has the node if it was told of any."""
        pong = self._link.pong
        if pong is not None and pong.draining:
            raise _unavailable("The node is draining.", "draining")
        answer = await self.health(http)
        if problem := self._registrar.problem:
            raise _unavailable(f"No router has this node: {problem}", "not_registered")
        return answer

    async def version_info(self, _: Request) -> Response:
        return json_response({"version": VERSION})

    async def node_entry(self, http: Request) -> Response:
        """What a router must know to use this node, with a proof of the cluster secret for its ``nonce``."""
        nonce = http.query_params.get("nonce", "")
        if nonce and not is_nonce(nonce):
            raise bad_value("nonce", "`nonce` must be 16 to 256 letters, digits, `_`, `-` or `=`.")
        pong = await self._link.client.ping()
        content = msgspec.json.encode(msgspec.structs.replace(pong.entry, url=self._url))
        answer = Response(content, media_type="application/json")
        if nonce and self._cluster_secret:
            answer.headers["authentication-info"] = proof_info(self._cluster_secret, nonce, content)
        return answer

    async def server_info(self, _: Request) -> Response:
        """The whole of this node, and the fields that SGLang's clients look for."""
        info = await self._link.client.server_info()
        load = info.load
        return json_response(
            {
                **info.config,
                "version": VERSION,
                "entry": msgspec.structs.replace(info.entry, url=self._url),
                "zmq_address": info.entry.zmq_address,
                "incarnation": info.entry.incarnation,
                "role": info.entry.role,
                "disaggregation_mode": "null" if info.entry.colocated else info.entry.role,
                "model": info.model,
                "model_path": info.model.model_path,
                "served_model_name": info.model.model_name,
                "weight_version": info.model.weight_version,
                "kv_layout": _kv_layout(info.kv_layout),
                "transport": info.transport,
                "tp_size": len(info.ranks),
                "ranks": info.ranks,
                "dp_size": 1,
                "max_total_num_tokens": load.num_total_pages * load.page_size,
                "max_running_requests": load.max_running_requests,
                "load": load,
                "internal_states": [load],
            }
        )

    async def model_info(self, _: Request) -> Response:
        info = await self._link.client.server_info()
        return json_response(model_info(_card(info.model), info.model.weight_version))

    async def models(self, _: Request) -> Response:
        info = await self._link.client.server_info()
        return json_response(model_list(_card(info.model)))

    async def model(self, http: Request) -> Response:
        info = await self._link.client.server_info()
        return model_answer(http, _card(info.model))

    async def load(self, _: Request) -> Response:
        return json_response([await self._load()])

    async def loads(self, _: Request) -> Response:
        return json_response({"timestamp": time.time(), "version": VERSION, "loads": [await self._load()]})

    async def metrics(self, _: Request) -> Response:
        """The scheduler's, and this process's answers."""
        text = await self._link.client.metrics() + generate_latest(self._registry).decode()
        return Response(text, media_type=METRICS_MEDIA_TYPE)

    def _metric_labels(self) -> tuple[str, str]:
        pong = self._link.pong
        return ("", "") if pong is None else (pong.entry.model_name, pong.entry.role)

    async def request_state(self, http: Request) -> Response:
        request_id = wanted_request(http)
        reply = await self._link.client.request_state(request_id)
        if not reply.state:
            raise request_not_found(request_id)
        return json_response(
            {
                "id": request_id,
                "state": reply.state,
                "age_s": reply.age_s,
                "waits_for": reply.waits_for,
                "details": reply.details,
            }
        )

    async def flush_cache(self, http: Request) -> Response:
        reply = await self._link.client.flush_cache(flush_timeout_s(http))
        return outcome(reply.success, reply.message)

    async def abort_request(self, http: Request) -> Response:
        body = await read_abort(http, self._limits)
        reply = await self._link.client.abort(body.rid or "", all_requests=body.abort_all)
        return json_response({"success": reply.success, "message": reply.message})

    async def pause_generation(self, http: Request) -> Response:
        """This node alone: what a router sends meanwhile waits here."""
        mode, drains = await read_pause(http, self._limits)
        if drains:
            return outcome(False, "A node cannot keep requests away: pause with `wait` through the router.")
        reply = await self._link.client.operate(PauseGeneration(mode=mode))
        return outcome(reply.success, reply.message)

    async def continue_generation(self, _: Request) -> Response:
        reply = await self._link.client.operate(ContinueGeneration())
        return outcome(reply.success, reply.message)

    async def assert_peer_death(self, http: Request) -> Response:
        reply = await self._link.client.assert_peer_death(await read_death(http, self._limits))
        return outcome(reply.success, reply.message)

    async def close_session(self, http: Request) -> Response:
        """What this node holds of it; the router that opened it knows nothing of this."""
        session_id = await read_close(http, self._limits)
        reply = await self._link.client.operate(CloseSession(session_id=session_id))
        return outcome(reply.success, reply.message)

    async def _load(self) -> dict[str, Any]:
        pong = await self._link.client.ping()
        return load_body(msgspec.structs.replace(pong.entry, url=self._url), pong.load)


def _unavailable(message: str, code: str) -> RequestError:
    return RequestError(message, status=503, code=code, error_type="service_unavailable")


def _card(model: ModelInfo) -> ModelCard:
    return ModelCard(
        name=model.model_name,
        path=model.model_path,
        model_type=model.model_type,
        architectures=model.architectures,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        eos_token_ids=model.eos_token_ids,
        created=_STARTED_UNIX_S,
    )


def build_node_app(
    routes: NodeRoutes,
    operator: NodeOperator,
    weights: WeightRoutes,
    *,
    limits: BodyLimits,
    keys: AccessKeys,
    is_loopback: bool,
) -> FastAPI:
    operations = [
        Operation(GET, ("/health", "/ping"), routes.health),
        Operation(GET, ("/live", "/liveness"), routes.live),
        Operation(GET, ("/ready", "/readiness"), routes.ready),
        Operation(GET, ("/version",), routes.version_info),
        Operation(GET, ("/node_entry",), routes.node_entry, Bodies(answer=NodeEntry)),
        Operation(GET, ("/server_info", "/get_server_info"), routes.server_info),
        Operation(GET, ("/model_info", "/get_model_info"), routes.model_info),
        Operation(GET, ("/v1/models", "/v1/models/"), routes.models, Bodies(answer=ModelList)),
        Operation(GET, ("/v1/models/{model_id:path}",), routes.model, Bodies(answer=ModelEntry)),
        Operation(GET, ("/get_load",), routes.load),
        Operation(GET, ("/v1/loads",), routes.loads),
        Operation(GET, ("/metrics",), routes.metrics, Bodies(media_type="text/plain")),
        Operation(GET, ("/requests/{request_id:path}",), routes.request_state),
        Operation(("GET", "POST"), ("/flush_cache",), routes.flush_cache, reports(), is_admin=True),
        Operation(POST, ("/reset_prefix_cache",), routes.flush_cache, reports(), is_admin=True),
        Operation(
            POST, ("/pause_generation",), routes.pause_generation, reports(PauseRequest), is_admin=True
        ),
        Operation(POST, ("/continue_generation",), routes.continue_generation, reports(), is_admin=True),
        Operation(POST, ("/abort_request",), routes.abort_request, reports(AbortRequest), is_admin=True),
        Operation(
            POST,
            ("/assert_peer_death",),
            routes.assert_peer_death,
            reports(AssertPeerDeathRequest),
            is_admin=True,
        ),
        Operation(POST, ("/close_session",), routes.close_session, reports(CloseSessionRequest)),
        *weight_operations(weights),
    ]
    operations += OperationRoutes(operator, limits).operations()
    return make_app(operations, keys=keys, is_loopback=is_loopback, answers=routes.answers)


def _kv_layout(layout: KVLayout | None) -> dict[str, Any] | None:
    return None if layout is None else {**msgspec.structs.asdict(layout), "page_bytes": layout.page_bytes}
