"""What a URL must be so that somebody can be asked there."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_WHOLE = re.compile(r"[^\s?#]+")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%\w+)?")  # a name, or IPv6


def is_host(text: str) -> bool:
    """A name or an address, without a port."""
    return _HOST.fullmatch(text) is not None


def url_fault(url: str, *, of_node: bool = False) -> str:
    """Why nobody can be asked at `url`; empty when somebody can. Whether somebody answers is not known here.

    `of_node`: as nodes name themselves, without a path.
    """
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and parts.port != 0 and parts.hostname is not None
    except ValueError:  # a bracket that is not closed, a port over 65535
        is_whole = False
    if not is_whole or not _WHOLE.fullmatch(url):
        return "a URL is expected, such as http://127.0.0.1:8000"
    if parts.username is not None:
        return "a URL without user and password is expected"
    if not is_host(parts.hostname or ""):
        return f"{parts.hostname!r} is no name and no address of a host"
    if of_node and parts.path:
        return "the URL of a node, without a path, is expected, such as http://127.0.0.1:8100"
    return ""
