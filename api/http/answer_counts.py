"""Every answer of an HTTP server, counted by route, method and status: refusals before a handler too.

What uvicorn itself refuses (a line that is not HTTP) never reaches the app and is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

UNKNOWN = "unknown"  # a path that no route has: what clients make up must not become labels
_LABELS = ("model_name", "role", "endpoint", "method", "status_code")


class HttpAnswers(Collector):
    """``pd_http_responses_total``, labelled as SGLang does. `labels`: (model_name, role) at a scrape."""

    def __init__(self, labels: Callable[[], tuple[str, str]]) -> None:
        self._labels = labels
        self._counts: Counter[tuple[str, str, int]] = Counter()

    def count(self, endpoint: str, method: str, status: int) -> None:
        self._counts[endpoint, method, status] += 1

    def describe(self) -> Iterable[Metric]:
        """Nothing to look up while being registered."""
        return ()

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily("pd_http_responses", "HTTP answers, refusals included.", labels=_LABELS)
        for (endpoint, method, status), count in sorted(self._counts.items()):
            family.add_metric([*self._labels(), endpoint, method, str(status)], count)
        yield family


class CountAnswers:
    """Counts an answer when its status is known; a failure that no handler turned into one is a 500."""

    def __init__(self, app: ASGIApp, answers: HttpAnswers, paths: Sequence[str]) -> None:
        self._app = app
        self._answers = answers
        self._exact = frozenset(path for path in paths if "{" not in path)
        self._prefixes = {path.partition("{")[0]: path for path in paths if "{" in path}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint = self._endpoint(str(scope["path"]).removeprefix(scope.get("root_path", "")))
        is_answered = False

        async def send_and_count(message: MutableMapping[str, Any]) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                is_answered = True
                self._answers.count(endpoint, scope["method"], message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_and_count)
        except Exception:
            if not is_answered:
                self._answers.count(endpoint, scope["method"], 500)
            raise

    def _endpoint(self, path: str) -> str:
        if path in self._exact:
            return path
        for prefix, template in self._prefixes.items():
            if path.startswith(prefix):
                return template
        return UNKNOWN
