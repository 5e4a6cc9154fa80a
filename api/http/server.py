"""uvicorn, with a drain that keeps the listeners open."""

from __future__ import annotations

import asyncio
import logging
import socket
from functools import partial
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ...runtime.process import Succession
from ...runtime.tls import NO_TLS, TlsFiles
from .connections import CLIENT_DEADLINES, ClientDeadlines, watched_protocol
from .in_flight import InFlightRequests

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """The first SIGTERM or SIGINT drains, the second ends at once."""

    def __init__(self, config: uvicorn.Config, stop: asyncio.Event, deadlines: ClientDeadlines) -> None:
        super().__init__(config)
        self._stop = stop
        self._protocol = watched_protocol(deadlines)
        self._handshake_s = deadlines.headers_s
        self._loop = asyncio.get_running_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's of given sockets, which leaves a TLS handshake the loop's 60 s."""
        assert sockets is not None
        protocol = partial(
            self._protocol,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        self.servers = [
            await self._loop.create_server(
                protocol,
                sock=each,
                ssl=self.config.ssl,
                backlog=self.config.backlog,
                ssl_handshake_timeout=None if self.config.ssl is None else self._handshake_s,
            )
            for each in sockets
        ]
        self.started = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._stop.is_set():
            self.should_exit = True
            self.force_exit = True
        self._loop.call_soon_threadsafe(self._stop.set)


class _AbortsAreMeant(logging.Filter):
    """EventStream ends a failed stream by leaving it incomplete; uvicorn reports that as a bug of the app."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "returned without completing response" not in record.getMessage()


async def serve(
    app: ASGIApp,
    *listeners: socket.socket,
    tls: TlsFiles = NO_TLS,
    in_flight: InFlightRequests | None = None,
    drain_timeout_s: float = 30.0,
    succession: Succession | None = None,
    stop: asyncio.Event | None = None,
    deadlines: ClientDeadlines = CLIENT_DEADLINES,
) -> None:
    """Serve until a signal (or `stop`), then drain: new requests get 503, those in flight end first, or are
    cut off with an error when `drain_timeout_s` is over.

    All listeners speak TLS, or none.

    The listeners stay open while draining, so that readiness probes and late clients get an answer. Where
    another process takes this one's place (`succession`), they are left to it at once: whoever connects waits
    for it, connections that exist have their last request answered, and nobody is refused.
    """
    stop = stop or asyncio.Event()
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        access_log=False,
        server_header=False,
        log_config=None,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
        ssl_certfile=tls.certfile or None,
        ssl_keyfile=tls.keyfile or None,
    )
    server = _Server(config, stop, deadlines)
    logging.getLogger("uvicorn.error").addFilter(_AbortsAreMeant())
    draining = asyncio.create_task(_drain(server, stop, in_flight, drain_timeout_s, succession))
    try:
        await server.serve(sockets=list(listeners))
    finally:
        draining.cancel()
        await asyncio.wait({draining})


async def _drain(
    server: uvicorn.Server,
    stop: asyncio.Event,
    in_flight: InFlightRequests | None,
    timeout_s: float,
    succession: Succession | None,
) -> None:
    await stop.wait()
    has_successor = succession is not None and succession.is_expected
    if succession is not None and has_successor:
        for listening in server.servers:
            listening.close()
        succession.begin()
    if in_flight is not None:
        in_flight.drain(refuses=not has_successor)
        log.info("draining: %d requests in flight", len(in_flight))
        if not await in_flight.wait_empty(timeout_s):
            log.warning("%d requests have not ended within %g s; they are cut off", len(in_flight), timeout_s)
            in_flight.cut_off()  # and have the second of `timeout_graceful_shutdown` to say so
    server.should_exit = True
