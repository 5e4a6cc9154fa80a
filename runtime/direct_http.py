"""HTTP to a cluster's own addresses: a proxy that the environment names (`http_proxy`) is not asked."""

from __future__ import annotations

import urllib.request
from http.client import HTTPResponse

from .tls import SYSTEM_TRUST, Trust

_NO_PROXY = urllib.request.ProxyHandler({})


def open_url(
    request: str | urllib.request.Request, timeout_s: float, trust: Trust = SYSTEM_TRUST
) -> HTTPResponse:
    """Like `urllib.request.urlopen`: raises HTTPError for a status over 399, URLError when nobody answers, or
    one that is not trusted."""
    url = request if isinstance(request, str) else request.full_url
    https = urllib.request.HTTPSHandler(context=trust.of(url))
    response: HTTPResponse = urllib.request.build_opener(_NO_PROXY, https).open(request, timeout=timeout_s)
    return response
