"""How long a connection may wait for its client: to send a request, and to take an answer."""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from .protocol import HttpProtocol

log = logging.getLogger(__name__)

_Awaited: TypeAlias = Literal["headers", "body", "reader"]
# A reader that takes less than this in `reader_s` is behind for good; what one call of send(2) moves.
_MIN_TAKEN_BYTES = 16 << 10
# What the kernel may hold of an answer that the client's window has no room for. Otherwise it takes
# megabytes, a long stream's worth, and nobody notices a client that reads nothing.
_MAX_UNSENT_BYTES = 128 << 10


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientDeadlines:
    """In seconds. Idle connections between requests have uvicorn's keep-alive deadline instead."""

    # For all of a request's headers, from the connection's or the request's begin. A TLS handshake, which is
    # before the connection's begin here, has as long.
    headers_s: float = 30.0
    body_s: float = 30.0  # between two pieces of a body
    # For a reader with a full buffer to take something: its requests hold places in batches meanwhile.
    reader_s: float = 30.0


CLIENT_DEADLINES = ClientDeadlines()


def watched_protocol(deadlines: ClientDeadlines) -> type[HttpProtocol]:
    """HTTP/1, cutting off clients that do not keep the deadlines; the log says why."""

    class WatchedProtocol(HttpProtocol):
        _timers: dict[_Awaited, asyncio.TimerHandle]

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self._timers = {}
            super().connection_made(transport)
            connection = transport.get_extra_info("socket")
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT_BYTES)
            self._expect("headers", deadlines.headers_s)

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if "headers" not in self._timers:
                self._expect("headers", deadlines.headers_s)

        def on_headers_complete(self) -> None:
            self._came("headers")
            self._expect("body", deadlines.body_s)
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._expect("body", deadlines.body_s)
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._came("body")
            super().on_message_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_reader(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            self._came("reader")
            super().resume_writing()

        def _watch_reader(self, unsent: int) -> None:
            """Cut it off unless it has taken some of the `unsent` bytes when the deadline comes."""

            def check() -> None:
                left = self.transport.get_write_buffer_size()
                if left > unsent - _MIN_TAKEN_BYTES:
                    self._cut_off("it reads nothing, %d bytes wait for it", left)
                else:
                    self._watch_reader(left)

            self._timers["reader"] = self.loop.call_later(deadlines.reader_s, check)

        def _expect(self, awaited: _Awaited, within_s: float) -> None:
            self._came(awaited)
            self._timers[awaited] = self.loop.call_later(within_s, self._missed, awaited, within_s)

        def _came(self, awaited: _Awaited) -> None:
            if timer := self._timers.pop(awaited, None):
                timer.cancel()

        def _missed(self, awaited: _Awaited, within_s: float) -> None:
            if awaited == "body" and not self.transport.is_reading():  # we have not taken what came
                self._expect(awaited, within_s)
                return
            self._cut_off("no %s for %g s", awaited, within_s)

        def _cut_off(self, reason: str, *values: Any) -> None:  # noqa: ANN401 (as logging takes them)
            log.warning("connection of %s cut off: " + reason, self.client, *values)
            self.transport.abort()

    return WatchedProtocol
