"""The three binaries, started by hand in any order, form the same cluster."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pdserve.runtime.process import end
from pdserve.tests.trainer import free_port


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def binary(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is not installed beside {sys.executable}"
    return found


def check_that_it_has_no_torch(router_pid: int) -> None:
    maps = Path(f"/proc/{router_pid}/maps").read_text()
    assert "tokenizers" in maps  # the right process
    for library in ("libtorch", "torch/lib", "mooncake", "safetensors"):
        assert library not in maps


# Nodes that register with the router, and a router that is told of nodes, in every order of starting.
ORDERS = list(itertools.permutations(("router", "prefill", "decode")))


def launch(order: int, told: str, *marks: pytest.MarkDecorator) -> Any:  # noqa: ANN401, a set of parameters, whose type pytest keeps to itself
    return pytest.param(ORDERS[order], told, id="-".join((told, *ORDERS[order])), marks=marks)


@pytest.mark.parametrize(
    ("order", "told"),
    [
        launch(3, "nodes"),  # which ask for a router that is not there yet
        launch(0, "nodes", pytest.mark.slow),
        launch(5, "nodes", pytest.mark.slow),
        launch(0, "router", pytest.mark.slow),
        launch(3, "router", pytest.mark.slow),
        launch(5, "router", pytest.mark.slow),
    ],
)
def test_three_binaries_in_any_order(order: tuple[str, ...], told: str, tmp_path: Path) -> None:
    ports = {role: free_port() for role in order}
    urls = {role: f"http://127.0.0.1:{port}" for role, port in ports.items()}
    extra = {
        "router": [] if told == "nodes" else ["--prefill", urls["prefill"], "--decode", urls["decode"]],
        "prefill": ["--router", urls["router"], "--num-threads", "1"] if told == "nodes" else [],
        "decode": ["--router", urls["router"], "--num-threads", "1"] if told == "nodes" else [],
    }
    processes = []
    try:
        for role in order:
            command = [binary(f"pdserve-{role}"), "--port", str(ports[role]), *extra[role]]
            log = (tmp_path / f"{role}.log").open("w")
            processes.append(subprocess.Popen(command, stderr=log, stdout=log, cwd=tmp_path))
        deadline = time.monotonic() + 60
        while not is_ready(urls["router"]):
            assert time.monotonic() < deadline, "\n".join(p.read_text() for p in tmp_path.glob("*.log"))
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        request = urllib.request.Request(
            f"{urls['router']}/v1/completions",
            json.dumps({"prompt": "def add(a, b):", "max_tokens": 8}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            assert json.loads(response.read())["usage"]["completion_tokens"] > 0
        check_that_it_has_no_torch(processes[order.index("router")].pid)
    finally:
        for process in processes:
            end(process, grace_s=20)
    assert [process.returncode for process in processes] == [0, 0, 0]
