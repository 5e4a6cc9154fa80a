"""A node's own HTTP: a process beside its scheduler, which keeps the scheduler's loop free of HTTP.

It pings the scheduler every second and, while that answers, registers the node with the routers that it was
told of. Such a registration is a lease of 5 s; so a node whose scheduler is gone or stands still leaves the
cluster by itself. The front ends when it is told to, or when the scheduler does not come (back); it takes the
node out of the cluster when the node ends, and leaves it there for the next front otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence

import msgspec
import uvloop
import zmq.asyncio

from ..api.http.bodies import BodyLimits
from ..api.http.server import serve
from ..links.entry_lookup import HttpEntryLookup
from ..messages.link_guard import LinkKeys
from ..runtime.listen import is_loopback
from ..runtime.process import NO_KEYS, AccessKeys, Succession
from ..runtime.timing import UNSCALED, Timing
from ..runtime.tls import NO_TLS, TlsFiles, Trust
from .app import build_node_app
from .control import FrontControl
from .facts import NodeFacts
from .operator import FrontOperator
from .registrar import Registrar
from .scheduler_link import SchedulerLink
from .weights import FrontWeights

log = logging.getLogger(__name__)


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
    lookup = HttpEntryLookup(timing, keys.cluster_secret, trust)
    app = build_node_app(
        NodeFacts(link, registrar, url, keys.cluster_secret),
        FrontControl(link),
        FrontOperator(link, url),
        FrontWeights(link, url, lookup),
        limits=BodyLimits(),
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
