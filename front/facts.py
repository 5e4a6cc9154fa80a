"""What a node tells of itself by HTTP: what it knows comes from its scheduler."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from ..api.control.facts import (
    METRICS_MEDIA_TYPE,
    load_body,
    model_answer,
    model_info,
    model_list,
    request_not_found,
    wanted_request,
)
from ..api.generation import ModelCard
from ..api.http.answer_counts import HttpAnswers
from ..api.http.answers import json_response
from ..api.refusals import bad_value
from ..links.entry_lookup import proof_info
from ..messages.kv_layout import KVLayout
from ..messages.node import ModelInfo
from ..runtime.cluster_proof import is_nonce
from ..runtime.errors import RequestError
from ..runtime.version import VERSION
from .registrar import Registrar
from .scheduler_link import SchedulerLink

_STARTED_UNIX_S = int(time.time())


class NodeFacts:
    """Handlers of the routes that only ask."""

    def __init__(self, link: SchedulerLink, registrar: Registrar, url: str, cluster_secret: str) -> None:
        self._link = link
        self._registrar = registrar
        self._url = url
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
        pong = await self._link.ask()
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

    async def _load(self) -> dict[str, Any]:
        pong = await self._link.ask()
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


def _kv_layout(layout: KVLayout | None) -> dict[str, Any] | None:
    return None if layout is None else {**msgspec.structs.asdict(layout), "page_bytes": layout.page_bytes}
