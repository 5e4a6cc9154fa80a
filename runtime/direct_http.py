"""HTTP to a cluster's own addresses: a proxy that the environment names (`http_proxy`) is not asked."""

from __future__ import annotations

import urllib.request
from http.client import HTTPResponse

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def open_url(request: str | urllib.request.Request, timeout_s: float) -> HTTPResponse:
    """Like `urllib.request.urlopen`: raises HTTPError for a status over 399, URLError when nobody answers."""
    response: HTTPResponse = _opener.open(request, timeout=timeout_s)
    return response
