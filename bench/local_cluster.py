"""A whole cluster on this machine, for benchmarks, scripts and end-to-end tests.

with LocalCluster([str(model_dir), "--dtype", "float32"]) as cluster:
    cluster.post("/v1/completions", {"prompt": [1, 2, 3]})
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from ..runtime.cluster_process import ClusterProcess
from ..runtime.direct_http import open_url
from ..runtime.errors import StartupError

_BUSY_STATES = ("num_locked_pages", "num_reserved_pages", "num_exposed_pages", "num_quarantined_pages")


class LocalCluster:
    """`pdserve up` with these arguments on a free port. Its log goes to `log_path`, or to stderr."""

    def __init__(self, arguments: Sequence[str], log_path: Path | None = None) -> None:
        self._process = ClusterProcess(arguments, log_path)
        self._log_path = log_path
        self.url = ""

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when requests are accepted. Raises StartupError when the cluster ended instead."""
        try:
            self.url = self._process.start()
        except StartupError as error:
            log = f":\n{self._log_path.read_text()}" if self._log_path else ""
            raise StartupError(f"{error}{log}") from None

    @property
    def pid(self) -> int:
        """Of `pdserve up`, whose children are the router and the nodes."""
        return self._process.pid

    def process(self, command: str) -> psutil.Process:
        """The first one of `router`, `prefill` or `decode` that runs. Raises StopIteration when none does."""
        children = psutil.Process(self.pid).children()
        return next(child for child in children if child.is_running() and command in child.cmdline())

    def stop(self) -> int:
        """Ends the cluster and returns its exit code."""
        return self._process.stop()

    # ---- HTTP ---------------------------------------------------------------------------------------

    def get(self, path: str, base: str | None = None) -> Any:  # noqa: ANN401  JSON is what it is
        with open_url(f"{base or self.url}{path}", timeout_s=60.0) as response:
            text = response.read().decode()
            is_json = "json" in response.headers.get("Content-Type", "")
            return json.loads(text) if is_json else text

    def post(self, path: str, body: object, base: str | None = None, timeout_s: float = 300.0) -> Any:  # noqa: ANN401
        """The JSON answer. Raises HTTPError (with the answer's body in its message) for a status over 399."""
        request = urllib.request.Request(
            f"{base or self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with open_url(request, timeout_s) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            error.msg = f"{error.msg}: {error.read().decode(errors='replace')}"
            raise

    def workers(self, role: str | None = None) -> list[dict[str, Any]]:
        """Rows of /workers, of one role if given."""
        rows: list[dict[str, Any]] = self.get("/workers")["workers"]
        return [row for row in rows if role is None or row["role"] == role]

    def wait_idle(self, timeout_s: float) -> None:
        """Until no page of any node is locked, reserved, exposed or quarantined and nothing runs or waits.

        Raises TimeoutError, naming what is left.
        """
        deadline = time.monotonic() + timeout_s
        while left := self._what_is_left():
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {timeout_s} s: {'; '.join(left)}")
            time.sleep(0.05)

    def _what_is_left(self) -> list[str]:
        return [
            f"{worker['role']} {worker['url']}: {name} = {worker['load'][name]}"
            for worker in self.workers()
            for name in (*_BUSY_STATES, "num_running_reqs", "num_waiting_reqs")
            if worker["load"][name]
        ]

    def flush(self) -> None:
        """Flushes every prefix cache and checks that every page of every node is free then."""
        self.get("/flush_cache?timeout=30")
        deadline = time.monotonic() + 5.0  # loads are reported once a second
        while rows := [
            worker
            for worker in self.workers()
            if worker["load"]["num_used_pages"]
            or worker["load"]["num_free_pages"] != worker["load"]["num_total_pages"]
        ]:
            if time.monotonic() > deadline:
                raise AssertionError(f"pages are not free after a flush: {rows}")
            time.sleep(0.05)
