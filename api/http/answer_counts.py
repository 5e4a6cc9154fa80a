"""Every answer of an HTTP server, counted by route, method and status: refusals before a handler too.

What uvicorn itself refuses (a line that is not HTTP) never reaches the app and is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

UNKNOWN = "unknown"  # a path that no route has: what clients make up must not become labels
_LABELS = ("model_name", "role", "endpoint", "method", "status_code")


class HttpAnswers(Collector):
    """``pd_http_responses_total``, labelled as SGLang does. `labels`: (model_name, role) at a scrape."""

    def __init__(self, labels: Callable[[], tuple[str, str]]) -> None:
        self._labels = labels
        self._exact: frozenset[str] = frozenset()
        self._prefixes: dict[str, str] = {}  # what stands before a path's parameters -> the path
        self._counts: Counter[tuple[str, str, int]] = Counter()

    def know(self, paths: Sequence[str]) -> None:
        """The routes' paths, with parameters in braces."""
        self._exact = frozenset(path for path in paths if "{" not in path)
        self._prefixes = {path.partition("{")[0]: path for path in paths if "{" in path}

    def count(self, path: str, method: str, status: int) -> None:
        self._counts[self._endpoint(path), method, status] += 1

    def describe(self) -> Iterable[Metric]:
        """Nothing to look up while being registered."""
        return ()

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily("pd_http_responses", "HTTP answers, refusals included.", labels=_LABELS)
        for (endpoint, method, status), count in sorted(self._counts.items()):
            family.add_metric([*self._labels(), endpoint, method, str(status)], count)
        yield family

    def _endpoint(self, path: str) -> str:
        if path in self._exact:
            return path
        for prefix, template in self._prefixes.items():
            if path.startswith(prefix):
                return template
        return UNKNOWN
