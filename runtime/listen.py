"""Listening sockets for HTTP, bound by the parent and inherited by the process that serves.

So the parent knows the port before the child has imported its modules, and nobody can take it in between.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
from pathlib import Path

from .errors import StartupError

_log = logging.getLogger(__name__)
_PORTS_TRIED = 100


def bind_http(host: str, port: int, *, or_next: bool = False) -> socket.socket:
    """A listening TCP socket on `port`; with `or_next` on the next free one after it, which the log says.

    `port` 0 takes any free one. Raises StartupError when the port, or each of 100, is taken or the host is
    not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    candidates = range(port, min(port + (_PORTS_TRIED if or_next else 1), 65536))
    for candidate in candidates:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(2048)
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE and or_next:
                continue
            raise StartupError(
                f"cannot listen on {host}:{candidate}: {error.strerror}; choose another --host or --port"
            ) from error
        if candidate != port and or_next:
            _log.warning(
                "port %d is taken by another program: listening on port %d; --port fixes it", port, candidate
            )
        return listener
    raise StartupError(f"ports {port} to {candidates[-1]} on {host} are all taken; choose another --port")


def bind_unix(path: str) -> socket.socket:
    """A listening Unix socket at `path`, which a dead server may have left behind.

    Who may connect, the umask says. Raises StartupError when it is taken, or no socket can be made there.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_left_behind(path):
            os.unlink(path)
        listener.bind(path)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = "something listens there" if error.errno == errno.EADDRINUSE else error.strerror or error
        raise StartupError(f"--uds {path}: {reason}; choose another path") from error
    return listener


def _is_left_behind(path: str) -> bool:
    """A socket that nobody listens on."""
    if not Path(path).is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


def inherit_http(fd: int) -> socket.socket:
    """The socket that the parent bound and passed on as file descriptor `fd`."""
    return socket.socket(fileno=fd)


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this host can reach it."""
    return is_loopback_address(listener.getsockname()[0])


def is_loopback_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback  # who came by IPv4 to a socket of both
    return address.is_loopback


def resolves(host: str) -> bool:
    """Whether this host finds an address of that name; it may take as long as the resolver waits."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def http_url(host: str, listener: socket.socket, scheme: str = "http") -> str:
    port = listener.getsockname()[1]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
