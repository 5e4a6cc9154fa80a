"""A whole cluster on this machine, for benchmarks, scripts and end-to-end tests.

with LocalCluster([str(model_dir), "--dtype", "float32"]) as cluster:
    cluster.post("/v1/completions", {"prompt": [1, 2, 3]})
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.direct_http import open_url
from ..runtime.errors import StartupError
from ..runtime.process import end

_BUSY_STATES = ("num_locked_pages", "num_reserved_pages", "num_exposed_pages", "num_quarantined_pages")


class LocalCluster:
    """`pdserve up` with these arguments on a free port. Its log goes to `log_path`, or to stderr."""

    def __init__(self, arguments: Sequence[str], log_path: Path | None = None) -> None:
        self._arguments = ["up", "--port", "0", *arguments]
        self._log_path = log_path
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when requests are accepted. Raises StartupError when the cluster ended instead."""
        log = self._log_path.open("w") if self._log_path else None
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pdserve", *self._arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            process_group=0,
        )
        if log is not None:
            log.close()
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("pdserve is ready at "):
                self.url = line.split()[-1]
                return
        code = self._process.wait()
        text = f":\n{self._log_path.read_text()}" if self._log_path else ""
        raise StartupError(f"pdserve {' '.join(self._arguments)} ended with exit code {code}{text}")

    @property
    def pid(self) -> int:
        """Of `pdserve up`, whose children are the router and the nodes."""
        assert self._process is not None, "the cluster was not started"
        return self._process.pid

    def stop(self) -> int:
        """Ends the cluster and returns its exit code."""
        if self._process is None:
            return 0
        end(self._process, grace_s=90.0)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return int(self._process.returncode)

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
