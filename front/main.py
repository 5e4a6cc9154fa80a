"""A node's own HTTP: a process beside its scheduler, which keeps the scheduler's loop free of HTTP.

It pings the scheduler every second and, while that answers, registers the node with the routers that it was
told of. Such a registration is a lease of 5 s; so a node whose scheduler is gone or stands still leaves the
cluster by itself. The front ends when it is told to, or when the scheduler does not come (back); it takes the
node out of the cluster when the node ends, and leaves it there for the next front otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp
import msgspec
import uvloop
import zmq.asyncio
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
from ..api.control.operations import OperationRoutes, ProfileOutcome
from ..api.control.tensor_bodies import in_parts
from ..api.control.weights import WeightRoutes, weight_operations
from ..api.generation import AdminReply, GroupReply, ModelCard, UpdateMode
from ..api.http.answer_counts import HttpAnswers
from ..api.http.answers import json_response, outcome
from ..api.http.bodies import BodyLimits
from ..api.http.mounting import GET, POST, Operation, make_app
from ..api.http.openapi import Bodies, reports
from ..api.http.server import serve
from ..api.refusals import bad_value
from ..api.surfaces.native_types import CloseSessionRequest
from ..api.surfaces.sessions import read_close
from ..links.entry_lookup import EntryLookup, HttpEntryLookup, NoNodeError, proof_info
from ..links.node_calls import REPLY_MARGIN_S, NodeUnavailableError
from ..links.node_client import NodeClient
from ..messages.kv_layout import KVLayout
from ..messages.link_guard import LinkKeys
from ..messages.node import ModelInfo, NodeEntry, Pong
from ..messages.operation import CloseSession, ClusterOperation, ContinueGeneration, PauseGeneration
from ..messages.weights import (
    STAGE_PART_BYTES,
    FromDisk,
    FromGpuMemory,
    FromGroup,
    FromPeer,
    FromServed,
    FromSharedMemory,
    FromTensors,
    MemoryTag,
    UpdateGroupSpec,
    WeightChecksReply,
    WeightSource,
    WeightsReply,
    of_one_node,
)
from ..runtime.cluster_proof import is_nonce
from ..runtime.errors import RequestError
from ..runtime.listen import is_loopback
from ..runtime.logs import Complaints
from ..runtime.process import NO_KEYS, AccessKeys, Succession
from ..runtime.timing import UNSCALED, Timing
from ..runtime.tls import NO_TLS, SYSTEM_TRUST, TlsFiles, Trust
from ..runtime.version import VERSION
from .member_calls import MemberCalls

log = logging.getLogger(__name__)

WEIGHTS_TIMEOUT_S = 600.0
RELEASE_WAIT_S = 10.0  # for what runs here to end
OPERATION_TIMEOUT_S = 60.0
_STARTED_UNIX_S = int(time.time())


class SchedulerLink:
    """The connection to the scheduler, made again while it is not there, and what it said last."""

    def __init__(
        self, context: zmq.asyncio.Context, address: str, keys: LinkKeys | None, timing: Timing
    ) -> None:
        self._context = context
        self._timing = timing
        self._address = address
        self._keys = keys
        self._client = NodeClient(context, address, keys=keys)
        self._answered_at_s = float("-inf")
        self._lost_at_s: float | None = None
        self.pong: Pong | None = None

    @property
    def client(self) -> NodeClient:
        return self._client

    @property
    def is_alive(self) -> bool:
        timing = self._timing
        silent_s = time.monotonic() - self._answered_at_s
        return silent_s < timing.front_ping_interval_s + timing.front_ping_timeout_s

    @property
    def is_gone(self) -> bool:
        """It was there, and its connection has been closed for long."""
        if self._lost_at_s is None:
            return False
        return time.monotonic() - self._lost_at_s > self._timing.scheduler_gone_s

    async def ping(self) -> Pong | None:
        """None when the scheduler does not answer; then the link is ready to try again."""
        if self._client.is_lost:
            await self._client.close()
            self._client = NodeClient(self._context, self._address, keys=self._keys)
        try:
            self.pong = await self._client.ping(self._timing.front_ping_timeout_s)
        except NodeUnavailableError as error:
            if self._client.is_lost and self.pong is not None and self._lost_at_s is None:
                log.warning("%s", error)
                self._lost_at_s = time.monotonic()
            return None
        self._answered_at_s = time.monotonic()
        self._lost_at_s = None
        return self.pong

    async def close(self) -> None:
        await self._client.close()


class Registrar:
    """Keeps the node's lease with every router."""

    def __init__(
        self,
        url: str,
        router_urls: Sequence[str],
        keys: AccessKeys,
        timing: Timing,
        trust: Trust = SYSTEM_TRUST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._timing = timing
        self._clock = clock
        timeout = aiohttp.ClientTimeout(total=timing.register_timeout_s)
        self._session = aiohttp.ClientSession(timeout=timeout)
        self._routers = {
            router: MemberCalls(self._session, router, keys, trust)
            for router in dict.fromkeys(url.rstrip("/") for url in router_urls)
        }
        self._problems = dict.fromkeys(self._routers, "it was not asked yet")  # of each; empty: registered
        self._registered_at_s = dict.fromkeys(self._routers, float("-inf"))  # the last time
        self._complaints = Complaints()

    @property
    def problem(self) -> str:
        """Why no router has this node; empty when one has it, or when it was told of none."""
        if not all(self._problems.values()):
            return ""
        return "; ".join(f"{router}: {problem}" for router, problem in self._problems.items())

    async def renew(self, entry: NodeEntry) -> None:
        body = msgspec.json.encode({"url": self._url, "entry": entry})
        await asyncio.gather(*(self._renew_at(router, body) for router in self._routers))

    async def leave(self) -> None:
        """The node is on its way out: routers take no more registrations of this incarnation."""
        await asyncio.gather(*(self._leave(router) for router in self._routers.values()))

    async def close(self) -> None:
        await self._session.close()

    async def _renew_at(self, router: str, body: bytes) -> None:
        is_away = False
        try:
            problem = (await self._routers[router].ask("POST", "/workers", body)).problem
        except (aiohttp.ClientError, TimeoutError) as error:
            problem, is_away = f"{type(error).__name__}: {error}", True
        was_registered, self._problems[router] = not self._problems[router], problem
        now = self._clock()
        if not problem:
            self._registered_at_s[router] = now
            if not was_registered:
                self._complaints.forget(router)
                log.info("registered with %s", router)
        elif is_away and now - self._registered_at_s[router] < self._timing.router_away_s:
            log.debug("%s is away: %s", router, problem)
        elif self._complaints.is_due(router, problem, now):
            log.warning("registration with %s failed, it is tried each second: %s", router, problem)

    async def _leave(self, router: MemberCalls) -> None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            await router.ask("DELETE", f"/workers/{self._url}")


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


class NodeWeights:
    """The weights of the one node behind this front, for `WeightRoutes`."""

    def __init__(self, link: SchedulerLink, url: str, lookup: EntryLookup) -> None:
        self._link = link
        self._url = url
        self._lookup = lookup

    async def update_weights_from_disk(
        self, model_path: str, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        return await self._update(_new_update(), FromDisk(model_path=model_path), weight_version, mode)

    async def update_weights_from_tensor(
        self, body: AsyncIterator[bytes], weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        update_id, offset, refusal = _new_update(), 0, ""
        client = self._link.client
        async for part in in_parts(body, STAGE_PART_BYTES):
            if not refusal:  # otherwise read to its end, so that the caller hears the reason
                staged = await client.stage_weights(update_id, offset, part, REPLY_MARGIN_S)
                refusal = "" if staged.success else staged.message
            offset += len(part)
        if refusal:
            await client.discard_weights(update_id)
            return AdminReply(False, refusal)
        return await self._update(update_id, FromTensors(num_bytes=offset), weight_version, mode)

    async def update_weights_from_distributed(
        self, source: FromGroup, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        return await self._update(_new_update(), source, weight_version, mode)

    async def update_weights_from_ipc(
        self, source: FromSharedMemory | FromGpuMemory, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        return await self._update(_new_update(), source, weight_version, mode)

    async def update_weights_from_peer(
        self, peer_url: str, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        try:
            entry = await self._lookup(peer_url)
        except NoNodeError as error:
            return AdminReply(False, str(error))
        version = weight_version or entry.weight_version
        return await self._update(_new_update(), FromPeer(zmq_address=entry.zmq_address), version, mode)

    async def update_weight_version(self, weight_version: str, mode: UpdateMode) -> AdminReply:
        return await self._update(_new_update(), FromServed(), weight_version, mode)

    async def save_model(self, target: str, *, is_remote: bool, max_shard_bytes: int) -> AdminReply:
        reply = await self._link.client.save_weights(
            target, is_remote=is_remote, max_shard_bytes=max_shard_bytes, timeout_s=WEIGHTS_TIMEOUT_S
        )
        return AdminReply(reply.success, reply.message or f"{self._url} has saved {target}")

    async def init_weights_update_group(self, group: UpdateGroupSpec, rank_offset: int) -> GroupReply:
        reply = await self._link.client.join_update_group(group, rank_offset)
        return GroupReply(reply.success, reply.message, {self._url: rank_offset})

    async def destroy_weights_update_group(self, name: str) -> AdminReply:
        reply = await self._link.client.leave_update_group(name, WEIGHTS_TIMEOUT_S)
        return AdminReply(reply.success, reply.message)

    async def release_memory_occupation(self, tags: tuple[MemoryTag, ...]) -> AdminReply:
        reply = await self._link.client.release_memory(tags, RELEASE_WAIT_S, WEIGHTS_TIMEOUT_S)
        return AdminReply(reply.success, reply.message)

    async def resume_memory_occupation(self, tags: tuple[MemoryTag, ...]) -> AdminReply:
        reply = await self._link.client.resume_memory(tags, WEIGHTS_TIMEOUT_S)
        return AdminReply(reply.success, reply.message)

    async def released_memory(self) -> frozenset[MemoryTag]:
        reply = await self._link.client.resume_memory((), WEIGHTS_TIMEOUT_S, if_released=True)
        return frozenset(reply.released)

    async def weights_by_name(self, name: str, truncate_size: int) -> dict[str, WeightsReply]:
        return {self._url: await self._link.client.get_weights(name, truncate_size, WEIGHTS_TIMEOUT_S)}

    async def check_weights(self) -> dict[str, WeightChecksReply]:
        return {self._url: await self._link.client.check_weights(WEIGHTS_TIMEOUT_S)}

    async def _update(
        self, update_id: str, source: WeightSource, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        """Busy, it says no: what runs here belongs to routers, which alone can let it end or go on later."""
        client = self._link.client
        prepared = await client.prepare_weights(
            update_id, source, weight_version or update_id, WEIGHTS_TIMEOUT_S
        )
        if not prepared.success:
            return AdminReply(False, prepared.message)
        if mode == "abort":
            await client.abort(all_requests=True)
        committed = await client.commit_weights(update_id, WEIGHTS_TIMEOUT_S)
        if not committed.success:
            await client.discard_weights(update_id)
        return AdminReply(committed.success, committed.message)


def _new_update() -> str:
    """Nobody but this node has it."""
    return of_one_node(uuid.uuid4().hex)


class NodeOperator:
    """The `Operator` of one node."""

    def __init__(self, link: SchedulerLink, url: str) -> None:
        self._link = link
        self._url = url

    async def operate(self, operation: ClusterOperation) -> AdminReply:
        reply = await self._link.client.operate(operation, OPERATION_TIMEOUT_S)
        return AdminReply(reply.success, reply.message)

    async def internal_state(self) -> dict[str, Any]:
        state: dict[str, Any] = msgspec.to_builtins(await self._link.client.internal_state())
        return state

    async def stop_profile(self) -> ProfileOutcome:
        reply = await self._link.client.stop_profile(WEIGHTS_TIMEOUT_S)
        return ProfileOutcome(
            success=reply.success,
            message=reply.message,
            traces={self._url: reply.all_traces},
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


async def serve_node_front(
    *,
    zmq_address: str,
    listener: socket.socket,
    url: str,
    router_urls: Sequence[str] = (),
    keys: AccessKeys = NO_KEYS,
    tls: TlsFiles = NO_TLS,
    timing: Timing = UNSCALED,
    stop: asyncio.Event | None = None,
    node_ends: Callable[[], bool] = lambda: True,
) -> None:
    """Serve until a signal, `stop`, or the end of the scheduler; then leave the routers if `node_ends`."""
    stop = stop or asyncio.Event()
    context = zmq.asyncio.Context()
    link = SchedulerLink(context, zmq_address, LinkKeys.of(keys.cluster_secret), timing)
    trust = Trust(tls)
    registrar = Registrar(url, router_urls, keys, timing, trust)
    limits = BodyLimits()
    lookup = HttpEntryLookup(keys.cluster_secret, trust)
    weights = WeightRoutes(NodeWeights(link, url, lookup), limits, is_node=True)
    operator = NodeOperator(link, url)
    app = build_node_app(
        NodeRoutes(link, registrar, url, limits, keys.cluster_secret),
        operator,
        weights,
        limits=limits,
        keys=keys,
        is_loopback=is_loopback(listener),
    )
    membership = asyncio.create_task(_keep_membership(link, registrar, url, timing, stop))
    membership.add_done_callback(lambda _: stop.set())  # a bug in it must not leave a front without a lease
    try:
        await serve(app, listener, tls=tls, stop=stop)
    finally:
        membership.cancel()
        await asyncio.wait({membership})
        if node_ends():
            await registrar.leave()
        await registrar.close()
        await link.close()
        context.destroy(linger=0)
    if not membership.cancelled():
        membership.result()


async def _keep_membership(
    link: SchedulerLink, registrar: Registrar, url: str, timing: Timing, stop: asyncio.Event
) -> None:
    while not stop.is_set():
        pong = await link.ping()
        if pong is not None and not pong.draining:
            await registrar.renew(msgspec.structs.replace(pong.entry, url=url))
        elif link.is_gone:
            log.error("the scheduler is gone: ending")
            stop.set()
        is_starting = link.pong is None  # the cluster waits for this node: not a moment more than needed
        is_urgent = is_starting or link.client.is_lost
        await asyncio.sleep(timing.front_reconnect_s if is_urgent else timing.front_ping_interval_s)


def run_node_front(
    *,
    zmq_address: str,
    listener: socket.socket,
    url: str,
    router_urls: Sequence[str] = (),
    keys: AccessKeys = NO_KEYS,
    tls: TlsFiles = NO_TLS,
    timing: Timing = UNSCALED,
) -> int:
    """The process's main; returns its exit code."""
    succession = Succession()
    uvloop.run(
        serve_node_front(
            zmq_address=zmq_address,
            listener=listener,
            url=url,
            router_urls=router_urls,
            keys=keys,
            tls=tls,
            timing=timing,
            node_ends=lambda: not succession.is_expected,
        )
    )
    return 0
