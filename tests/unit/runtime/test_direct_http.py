"""A proxy of the environment does not come between the parts of a cluster."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from pdserve.runtime.direct_http import open_url
from pdserve.runtime.listen import bind_http
from pdserve.tests.http_server import serving


class _Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()
        self.wfile.write(b"ready")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with serving(_Ready) as server:
        yield server.url


def test_a_proxy_of_the_environment_is_not_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with bind_http("127.0.0.1", 0) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setenv("http_proxy", dead)
    monkeypatch.delenv("no_proxy", raising=False)
    with open_url(f"{url}/ready", 10.0) as response:
        assert response.read() == b"ready"


def test_an_error_status_raises(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        open_url(url, 10.0)
