"""What is asked of a cluster, or of one node: health, the model, load, where a request is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ...messages.node import NodeEntry, NodeLoad
from ...messages.sampling import SamplingParams
from ...messages.work import Work
from ...runtime.errors import RequestError
from ...runtime.timing import Timing
from ..generation import ClusterView, GenerateSpec, Generator, ModelCard, WorkerStatus
from ..http.answers import json_response
from ..http.in_flight import InFlightRequests
from ..refusals import model_not_found
from ..request_ids import is_safe_id, new_request_id
from ..text.timelines import Timelines, timeline_body

METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "pdserve"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[ModelEntry]


def wanted_request(http: Request) -> str:
    """The id that the path names. Raises RequestError for what is no request's."""
    request_id: str = http.path_params["request_id"]
    if not is_safe_id(request_id):
        raise request_not_found(request_id)
    return request_id


def request_not_found(request_id: str) -> RequestError:
    return RequestError(
        f"No request {request_id!r} is in flight, or ended a short while ago.",
        status=404,
        code="request_not_found",
        error_type="not_found_error",
    )


def model_entry(card: ModelCard, name: str) -> ModelEntry:
    return ModelEntry(id=name, created=card.created, root=card.path, max_model_len=card.max_model_len)


def model_answer(http: Request, card: ModelCard) -> Response:
    """The model that the path names."""
    wanted = http.path_params["model_id"]
    if wanted not in card.names:
        raise model_not_found(wanted, card)
    return json_response(model_entry(card, wanted))


def model_list(card: ModelCard) -> ModelList:
    """An entry a name."""
    return ModelList(data=[model_entry(card, name) for name in card.names])


def model_info(card: ModelCard, weight_version: str) -> dict[str, Any]:
    return {
        "model_path": card.path,
        "tokenizer_path": card.path,
        "served_model_name": card.name,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": weight_version,
        "model_type": card.model_type,
        "architectures": card.architectures,
        "vocab_size": card.vocab_size,
        "max_model_len": card.max_model_len,
    }


def load_body(entry: NodeEntry, load: NodeLoad) -> dict[str, Any]:
    """One node in /v1/loads and /get_load, with SGLang's names beside ours."""
    return {
        "url": entry.url,
        "role": entry.role,
        "dp_rank": 0,
        "num_reqs": load.num_running_reqs + load.num_waiting_reqs,
        "num_tokens": load.num_used_pages * load.page_size + load.num_queued_tokens,
        **msgspec.structs.asdict(load),
    }


def _worker_body(status: WorkerStatus) -> dict[str, Any]:
    return {
        "id": status.entry.incarnation,
        "worker_type": status.entry.role,
        "is_healthy": status.healthy,
        "is_ready": status.ready,
        "lease_s": status.lease_s,
        "ready_peers": status.ready_peers,
        "refused_peers": status.refused_peers,
        "quarantined_pages": status.quarantined_pages,
        "load": msgspec.structs.asdict(status.load),
        **msgspec.structs.asdict(status.entry),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterFacts:
    """Handlers of the routes that ask a router."""

    card: ModelCard
    view: ClusterView
    generator: Generator
    in_flight: InFlightRequests
    timelines: Timelines
    timing: Timing
    version: str

    # ---- health ---------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        """This process is alive."""
        return json_response({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Requests are accepted: not draining, and at least one pair of nodes is ready."""
        is_ready, reason = self.view.readiness()
        if self.in_flight.is_draining:
            is_ready, reason = False, "draining"
        if is_ready:
            return json_response({"status": "ready"})
        raise RequestError(reason, status=503, code="not_ready", error_type="service_unavailable")

    async def health_generate(self, _: Request) -> Response:
        """One real token through a pair of nodes."""
        spec = GenerateSpec(
            request_id=f"health-{new_request_id()}",
            work=Work(
                prompt_ids=(0,),
                choices=(0,),
                sampling=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
            ),
            timeout_s=self.timing.health_probe_s,
        )
        started_s = time.perf_counter()
        try:
            generation = await self.generator.generate(spec)
            async for _token in generation:
                pass
        except RequestError as error:
            raise RequestError(
                f"No token came: {error.message}",
                status=503,
                code=error.code,
                error_type="service_unavailable",
            ) from error
        return json_response({"status": "ok", "latency_s": time.perf_counter() - started_s})

    async def version_info(self, _: Request) -> Response:
        return json_response({"version": self.version})

    # ---- facts ----------------------------------------------------------------------------------

    async def models(self, _: Request) -> Response:
        return json_response(model_list(self.card))

    async def model(self, http: Request) -> Response:
        return model_answer(http, self.card)

    async def server_info(self, _: Request) -> Response:
        return json_response({**await self.view.server_info(), "version": self.version})

    async def model_info(self, _: Request) -> Response:
        return json_response(model_info(self.card, self.view.weight_version()))

    async def weight_version(self, _: Request) -> Response:
        return json_response({"weight_version": self.view.weight_version()})

    async def load(self, _: Request) -> Response:
        return json_response(self._loads())

    async def loads(self, _: Request) -> Response:
        return json_response({"timestamp": time.time(), "version": self.version, "loads": self._loads()})

    async def server_load(self, _: Request) -> Response:
        """vLLM's: the requests that are being answered."""
        return json_response({"server_load": len(self.in_flight)})

    def _loads(self) -> list[dict[str, Any]]:
        return [load_body(status.entry, status.load) for status in self.view.workers()]

    async def metrics(self, _: Request) -> Response:
        return Response(await self.view.metrics_text(), media_type=METRICS_MEDIA_TYPE)

    async def request_state(self, http: Request) -> Response:
        """What each generation of a request does now, for how long, and what it waits for; where its time
        went, also for a while after its end."""
        request_id = wanted_request(http)
        generation_ids = self.in_flight.generations_of(request_id)
        known: list[dict[str, Any]] = []
        for generation_id in generation_ids:
            state = await self.view.request_state(generation_id)
            timeline = self.timelines.find(generation_id)
            if state is None and timeline is not None and timeline.ended_unix_s:
                state = {"state": "ended"}
            if state is not None:
                measured = {} if timeline is None else {"timeline": await timeline_body([timeline])}
                known.append({"id": generation_id, **state, **measured})
        if not known:
            raise request_not_found(request_id)
        return json_response(known[0] if len(generation_ids) == 1 else {"requests": known})

    async def workers(self, _: Request) -> Response:
        workers = [_worker_body(status) for status in self.view.workers()]
        return json_response({"workers": workers, "total": len(workers)})
