"""Keeps strangers off the zmq links: CURVE, with both sides' keys derived from the cluster secret.

Who does not know the secret knows neither the server's public key, which is never sent, nor a client key
that the server takes: its handshake fails, and no message of it is ever received.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any, TypeAlias

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from ..runtime.cluster_secret import derived_key
from ..runtime.errors import StartupError
from ..runtime.logs import Throttle

_log = logging.getLogger(__name__)
_Socket: TypeAlias = zmq.Socket[Any]

HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
# Without detail the other side has just closed the connection: a CURVE server does that to a wrong key.
NOT_OF_THE_CLUSTER = (
    "the handshake failed: it has another cluster secret, or only one of the two sides has one"
)
NO_CURVE = (
    f"libzmq {zmq.zmq_version()} was built without CURVE, so no cluster secret can guard a link; "
    "`pip install --force-reinstall pyzmq` installs the wheel, which has it"
)
_ZAP_ADDRESS = "inproc://zeromq.zap.01"  # where libzmq asks, by its specification 27
_TELL_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True, repr=False)
class LinkKeys:
    """CURVE key pairs, as Z85 text. Who makes a link says which; None for one that anybody may open."""

    server_public: bytes
    server_secret: bytes
    client_public: bytes
    client_secret: bytes

    @classmethod
    def of(cls, cluster_secret: str) -> LinkKeys | None:
        """None for an empty secret. Raises StartupError where libzmq cannot do CURVE."""
        if not cluster_secret:
            return None
        if not zmq.has("curve"):
            raise StartupError(NO_CURVE)
        server, client = (
            z85.encode(derived_key(cluster_secret, f"{side} link")) for side in ("server", "client")
        )
        return cls(zmq.curve_public(server), server, zmq.curve_public(client), client)

    def secure_client(self, socket: _Socket) -> None:
        """Before it connects."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.server_public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.client_public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.client_secret)

    def secure_server(self, socket: _Socket) -> None:
        """Before it binds. A LinkGuard must run in the socket's context."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.server_secret)


class LinkGuard:
    """A thread that lets in the clients that have the cluster's key, and tells of those that have not.

    One per context, made before the socket that it guards binds. It sleeps while nobody connects, and ends
    with `close`.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: LinkKeys, guarded: _Socket) -> None:
        self._client_key = z85.decode(keys.client_public)
        self._refusals = Throttle(_TELL_INTERVAL_S)
        self._asked = context.socket(zmq.REP)
        self._asked.setsockopt(zmq.LINGER, 0)
        self._asked.bind(_ZAP_ADDRESS)
        self._guarded = guarded
        self._failures: _Socket = guarded.get_monitor_socket(HANDSHAKE_FAILED | zmq.EVENT_MONITOR_STOPPED)
        self._thread = threading.Thread(target=self._run, name="link guard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Before the guarded socket is closed."""
        self._guarded.disable_monitor()  # which the thread is told
        self._thread.join()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._asked, zmq.POLLIN)
        poller.register(self._failures, zmq.POLLIN)
        is_open = True
        while is_open:
            ready = dict(poller.poll())
            if self._asked in ready:
                self._answer(self._asked.recv_multipart())
            if self._failures in ready:
                event = parse_monitor_message(self._failures.recv_multipart())["event"]
                is_open = event != zmq.EVENT_MONITOR_STOPPED
                if is_open:
                    self._tell(time.monotonic())
        self._failures.close(0)
        self._asked.close(0)

    def _answer(self, question: list[bytes]) -> None:
        """Frames: version, request id, domain, address, identity, mechanism, credentials…"""
        version, request_id, *_ = question
        is_ours = question[5:] == [b"CURVE", self._client_key]
        status, text = (b"200", b"OK") if is_ours else (b"400", b"not of this cluster")
        self._asked.send_multipart([version, request_id, status, text, b"", b""])

    def _tell(self, now: float) -> None:
        if num_refused := self._refusals.add(now):
            _log.warning(
                "%d handshakes failed: these do not have this cluster's secret, or left meanwhile",
                num_refused,
            )
