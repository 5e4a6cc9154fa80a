"""Builds the router from its parts and serves it."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Sequence

import uvloop
import zmq.asyncio
from prometheus_client import CollectorRegistry, ProcessCollector

from ..api.app import build_router_app
from ..api.generation import ModelCard
from ..api.http.bodies import BodyLimits
from ..api.http.in_flight import InFlightRequests
from ..api.http.server import serve
from ..api.text.request_log import RequestLog
from ..api.text.sampling import GenerationDefaults
from ..api.text.timelines import Timelines
from ..api.text.tokenization import Tokenizer
from ..links.entry_lookup import HttpEntryLookup
from ..messages.link_guard import LinkKeys
from ..messages.timeline import SpanClock
from ..models.config import read_vocabulary_digest
from ..models.paths import ModelPaths
from ..runtime.config import RouterConfig, Routing
from ..runtime.errors import StartupError
from ..runtime.garbage import collect_when_idle, only_young
from ..runtime.listen import bind_unix, http_url, is_loopback
from ..runtime.process import Succession
from ..runtime.returned_memory import return_memory
from ..runtime.tls import Trust
from .assembly import build_router
from .connector import ZmqConnector
from .options import RouterOptions
from .trace_export import TraceExporter

_log = logging.getLogger(__name__)


def run_router(config: RouterConfig, listener: socket.socket, succession: Succession | None = None) -> int:
    """Serve until SIGTERM. Returns the exit code; raises StartupError when it cannot start.

    `succession`: of a supervisor's child, whose `listener` its successors inherit.
    """
    paths = ModelPaths.given(config.model, config.tokenizer, config.generation_config)
    tokenizer = Tokenizer.from_directory(paths.tokenizer_folder, config.chat_template)
    defaults = (
        GenerationDefaults()
        if config.generation_config == "vllm"
        else GenerationDefaults.from_directory(paths.generation_folder)
    )
    card = _model_card(config, paths)
    exporter = None
    if config.otlp_traces_endpoint:
        exporter = TraceExporter(config.otlp_traces_endpoint, card.name, config.timing)
    listeners = [listener, bind_unix(config.uds)] if config.uds else [listener]
    uvloop.run(_serve(config, listeners, card, tokenizer, defaults, exporter, succession))
    if exporter is not None:
        exporter.close()
    return 0


async def _serve(
    config: RouterConfig,
    listeners: Sequence[socket.socket],  # of TCP first
    card: ModelCard,
    tokenizer: Tokenizer,
    defaults: GenerationDefaults,
    exporter: TraceExporter | None,
    succession: Succession | None,
) -> None:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    clock = SpanClock.start()
    context = zmq.asyncio.Context()
    router = build_router(
        RouterOptions(routing=Routing.of(config), metrics_compat=config.metrics_compat, timing=config.timing),
        model=card,
        connect=ZmqConnector(context, LinkKeys.of(config.cluster_secret), config.timing),
        lookup=HttpEntryLookup(config.timing, config.cluster_secret, Trust(config.tls)),
        static_urls=(*config.prefill, *config.decode),
        metrics_registry=registry,
        clock=clock.now,
        unix_minus_monotonic_s=clock.unix_minus_monotonic_s,
    )
    in_flight = InFlightRequests()
    app = build_router_app(
        card=card,
        tokenizer=tokenizer,
        generation_defaults=defaults,
        generator=router.service,
        view=router.view,
        membership=router.administration,
        control=router.administration,
        weights=router.weights,
        sessions=router.sessions,
        operator=router.operator,
        request_log=RequestLog(is_on=config.log_requests, level=config.log_requests_level),
        registry=registry,
        in_flight=in_flight,
        timelines=Timelines(clock, registry, card.name, exporter.export if exporter else None),
        keys=config.keys,
        is_loopback=is_loopback(listeners[0]),
        is_open_cluster=config.insecure_cluster and not config.cluster_secret,
        root_path=config.root_path,
        allowed_origins=config.allowed_origins,
        seed=config.seed,
        allow_pickled_tensors=config.allow_pickled_tensors,
        limits=BodyLimits(strict_fields=config.strict_fields),
        timing=config.timing,
    )
    router.start()
    only_young()  # what lives now lives on, and a look at all that is in flight holds every stream
    _log.info("%s serves %s", http_url(config.host, listeners[0], config.tls.scheme), card.name)
    serving = asyncio.create_task(
        serve(
            app,
            *listeners,
            tls=config.tls,
            in_flight=in_flight,
            drain_timeout_s=config.drain_timeout,
            succession=succession,
        )
    )
    housekeeping = [
        asyncio.create_task(return_memory()),
        asyncio.create_task(collect_when_idle(lambda: len(in_flight) == 0)),
    ]
    crashed = router.service.crashed
    try:
        await asyncio.wait({serving, *housekeeping, crashed}, return_when=asyncio.FIRST_COMPLETED)
        for background in (*housekeeping, crashed):
            if background.done():
                background.result()  # raises what ended it
        await serving
    finally:
        for task in (*housekeeping, serving):
            task.cancel()
        await router.close()
        context.destroy(linger=0)


def _model_card(config: RouterConfig, paths: ModelPaths) -> ModelCard:
    model = paths.read_config()
    max_model_len = config.max_model_len or model.max_model_len
    if max_model_len > model.max_model_len:
        raise StartupError(
            f"--max-model-len {max_model_len}: the model was made for at most {model.max_model_len} tokens"
        )
    return ModelCard(
        name=config.served_model_name[0],
        path=str(paths.model),
        model_type=model.family,
        architectures=(model.architecture,),
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=model.eos_token_ids,
        created=int(time.time()),
        vocabulary_digest=read_vocabulary_digest(paths.tokenizer_folder),
        text_digests=paths.text_digests(),
        aliases=config.served_model_name[1:],
        embedding_size=model.hidden_size,
    )
