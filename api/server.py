"""uvicorn, with a drain that keeps the listeners open."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..runtime.tls import NO_TLS, TlsFiles
from .connections import CLIENT_DEADLINES, ClientDeadlines, watched_protocol
from .in_flight import InFlightRequests

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """The first SIGTERM or SIGINT drains, the second ends at once."""

    def __init__(self, config: uvicorn.Config, stop: asyncio.Event) -> None:
        super().__init__(config)
        self._stop = stop
        self._loop = asyncio.get_running_loop()

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
    app: FastAPI,
    *listeners: socket.socket,
    tls: TlsFiles = NO_TLS,
    in_flight: InFlightRequests | None = None,
    drain_timeout_s: float = 30.0,
    stop: asyncio.Event | None = None,
    deadlines: ClientDeadlines = CLIENT_DEADLINES,
) -> None:
    """Serve until a signal (or `stop`), then drain: new requests get 503, those in flight end first.

    All listeners speak TLS, or none.

    The listeners stay open while draining, so that readiness probes and late clients get an answer.
    """
    stop = stop or asyncio.Event()
    config = uvicorn.Config(
        app,
        http=watched_protocol(deadlines),
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
    server = _Server(config, stop)
    logging.getLogger("uvicorn.error").addFilter(_AbortsAreMeant())
    draining = asyncio.create_task(_drain(server, stop, in_flight, drain_timeout_s))
    try:
        await server.serve(sockets=list(listeners))
    finally:
        draining.cancel()
        await asyncio.wait({draining})


async def _drain(
    server: uvicorn.Server, stop: asyncio.Event, in_flight: InFlightRequests | None, timeout_s: float
) -> None:
    await stop.wait()
    if in_flight is not None:
        in_flight.drain()
        log.info("draining: %d requests in flight", len(in_flight))
        if not await in_flight.wait_empty(timeout_s):
            log.warning("%d requests have not ended within %g s", len(in_flight), timeout_s)
    server.should_exit = True
