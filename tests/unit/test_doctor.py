"""`pdserve doctor`: what it finds, what it says is missing, and its exit code."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType

import pytest
import zmq

from pdserve import doctor
from pdserve.doctor import Finding
from pdserve.runtime.cluster_secret import SECRET_VARIABLE
from pdserve.runtime.errors import StartupError
from pdserve.runtime.listen import bind_http
from pdserve.tests.http_server import serving

GOOD, BAD = Finding("x", True, "works"), Finding("x", False, "missing", "install it")
Importer = Callable[[str, Exception], None]


@pytest.fixture
def fail_import(monkeypatch: pytest.MonkeyPatch) -> Importer:
    """Make the import of one module raise."""
    failures: dict[str, Exception] = {}

    def import_module(name: str) -> ModuleType:
        if name in failures:
            raise failures[name]
        return importlib.import_module(name)

    monkeypatch.setattr(doctor, "importlib", _Importlib(import_module))
    return failures.__setitem__


class _Importlib:
    """The part of importlib that doctor uses."""

    def __init__(self, import_module: Callable[[str], ModuleType]) -> None:
        self.import_module = import_module
        self.metadata = importlib.metadata


# ---- findings -----------------------------------------------------------------------------------------


def test_mooncake_that_is_not_installed_is_told_with_its_wheel(fail_import: Importer) -> None:
    fail_import("mooncake.engine", ModuleNotFoundError("No module named 'mooncake'"))
    shm, tcp, rdma, _ = doctor.check_transports()
    assert (tcp.is_good, tcp.detail) == (False, "not installed")
    assert tcp.mend.startswith("pip install mooncake-transfer-engine-non-cuda")
    assert (shm.name, rdma.is_good) == ("shm", False)


def test_a_missing_system_library_is_told_with_its_package(fail_import: Importer) -> None:
    fail_import("mooncake.engine", ImportError("libibverbs.so.1: cannot open shared object file"))
    _, tcp, *_ = doctor.check_transports()
    assert not tcp.is_good
    assert "libibverbs.so.1" in tcp.detail
    assert tcp.mend == "apt-get install libibverbs1 librdmacm1 libnuma1"


def test_nixl_is_looked_for_in_both_of_its_wheels(fail_import: Importer) -> None:
    for module in ("nixl_cu12._bindings", "nixl_cu13._bindings"):
        fail_import(module, ModuleNotFoundError("No module named 'nixl'"))
    *_, nixl = doctor.check_transports()
    assert (nixl.is_good, nixl.mend) == (False, "pip install 'pdserve[nixl]'")
    fail_import("nixl_cu13._bindings", ImportError("libcudart.so.13: cannot open shared object file"))
    *_, nixl = doctor.check_transports()
    assert "libcudart.so.13" in nixl.detail


def test_without_torch_nothing_computes(fail_import: Importer) -> None:
    fail_import("torch", ModuleNotFoundError("No module named 'torch'"))
    (torch,) = doctor.check_kernels()
    assert not torch.is_good
    assert torch.mend.startswith("pip install torch")
    assert [finding.name for finding in doctor.check_devices()] == ["cpu"]


def test_kernels_of_gpus_may_be_missing(fail_import: Importer) -> None:
    fail_import("triton", ModuleNotFoundError("No module named 'triton'"))
    fail_import("flashinfer", ImportError("no CUDA"))
    torch, triton, flashinfer = doctor.check_kernels()
    assert torch.is_good
    assert (triton.is_good, flashinfer.is_good) == (False, False)
    assert flashinfer.mend == "pip install flashinfer-python"


def test_rdma_devices_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path

    def path(name: str) -> Path:
        return tmp_path if name == "/sys/class/infiniband" else real(name)

    monkeypatch.setattr(doctor, "Path", path)
    assert not doctor._rdma(True).is_good
    (tmp_path / "mlx5_1").mkdir()
    (tmp_path / "mlx5_0").mkdir()
    assert doctor._rdma(True) == Finding("mooncake rdma", True, "mlx5_0, mlx5_1")
    assert doctor._rdma(False).mend == "mooncake is missing, see above"


def test_shm_needs_a_folder_that_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    finding = doctor._shm()
    assert (finding.is_good, finding.mend) == (False, "mount a tmpfs there")


# ---- links between processes ----------------------------------------------------------------------------


def test_the_secret_of_this_environment_is_told_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "s" * 64)
    curve, secret = doctor.check_links()
    assert (curve.name, curve.is_good) == ("CURVE", True)
    assert secret == Finding("cluster secret", True, f"in {SECRET_VARIABLE}")


def test_without_a_secret_only_this_host_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    _, secret = doctor.check_links()
    assert not secret.is_good
    assert "listen on loopback only" in secret.detail
    assert "--cluster-secret-file FILE" in secret.mend


def test_a_secret_that_could_be_guessed_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "secret")
    _, secret = doctor.check_links()
    assert (secret.is_good, secret.detail.startswith(f"{SECRET_VARIABLE}: 32 to ")) == (False, True)


def test_a_libzmq_without_curve_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda capability: capability != "curve")
    curve, _ = doctor.check_links()
    assert not curve.is_good
    assert "was built without CURVE" in curve.detail


# ---- the report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transports", "torch", "code"),
    [([GOOD, BAD], GOOD, 0), ([BAD, GOOD], GOOD, 0), ([BAD, BAD], GOOD, 1), ([GOOD], BAD, 1)],
)
def test_the_exit_code_says_whether_a_node_can_serve(
    transports: list[Finding],
    torch: Finding,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "check_transports", lambda: iter(transports))
    monkeypatch.setattr(doctor, "check_kernels", lambda: iter([torch, BAD]))
    monkeypatch.setattr(doctor, "check_devices", lambda: iter([GOOD]))
    monkeypatch.setattr(doctor, "listening_sockets", lambda: iter([]))
    assert doctor.run_doctor([]) == code
    shown = capsys.readouterr().out
    assert "Mooncake's TCP transport listens on 0.0.0.0" in shown
    assert "no  x               missing  -> install it" in shown
    assert "Listening (pdserve processes on this host)\n  none" in shown


# ---- what listens where -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("/venv/bin/python -P -m pdserve prefill --port 0", "prefill"),
        ("/venv/bin/python -P -m pdserve node-front --role decode", "node-front"),
        ("/venv/bin/python /venv/bin/pdserve up", "up"),
        ("/venv/bin/python /venv/bin/pdserve-router --port 8000", "router"),
        ("pdserve-decode", "decode"),
        ("pdserve doctor", None),
        ("pdserve bench serve", None),
        ("pdserve", None),
        ("/venv/bin/pytest tests/pdserve", None),
        ("", None),
    ],
)
def test_the_role_is_read_from_the_command_line(command: str, role: str | None) -> None:
    assert doctor._role(command.split()) == role


LISTENER = """
import socket, sys
everywhere, loopback = socket.create_server(("0.0.0.0", 0)), socket.create_server(("127.0.0.1", 0))
print(everywhere.getsockname()[1], loopback.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.mark.process
@pytest.mark.parametrize("flags", [[], ["--insecure-cluster"]])
def test_sockets_of_a_running_node_are_found(flags: list[str]) -> None:
    # Its command line ends like a decode node's: that is all that tells it.
    with subprocess.Popen(
        [sys.executable, "-S", "-c", LISTENER, "-m", "pdserve", "decode", *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        everywhere, loopback = process.stdout.readline().split()
        found = [f for f in doctor.listening_sockets() if f.name == f"pid {process.pid}"]
        process.communicate()
    assert sorted(finding.detail for finding in found) == [
        f"decode listens on 0.0.0.0:{everywhere} (every interface)",
        f"decode listens on 127.0.0.1:{loopback}",
    ]
    open_to_strangers = [finding.detail for finding in found if not finding.is_good]
    assert open_to_strangers == (
        [f"decode listens on 0.0.0.0:{everywhere} (every interface)"] if flags else []
    )


# ---- a server that is asked ---------------------------------------------------------------------------


class _Answers(BaseHTTPRequestHandler):
    """Answers /server_info with what the server holds."""

    def do_GET(self) -> None:
        body: bytes = getattr(self.server, "body", b"")
        is_known = self.headers["Authorization"] == getattr(self.server, "authorization", None)
        self.send_response(404 if self.path != "/server_info" else 200 if is_known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[bytes], str]]:
    with serving(_Answers) as server:

        def answer(body: bytes) -> str:
            vars(server).update(body=body)
            return server.url

        yield answer


NODE = json.dumps({"entry": {"role": "decode", "zmq_address": "tcp://h:5"}, "transport": "tcp"}).encode()


def test_a_node_of_several_ranks_names_their_processes(serve: Callable[[bytes], str]) -> None:
    ranks = [{"rank": 0, "pid": 10}, {"rank": 1, "pid": 11}]
    finding = doctor.ask_server(serve(json.dumps({**json.loads(NODE), "ranks": ranks}).encode()))
    assert finding.detail.endswith("KV over tcp, 2 TP ranks (pids 10, 11)")


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_node_says_what_it_is(serve: Callable[[bytes], str], slash: str) -> None:
    assert doctor.ask_server(serve(NODE) + slash) == Finding(
        "node", True, "decode node, zmq tcp://h:5, KV over tcp"
    )


def test_a_router_says_how_many_nodes_it_has(serve: Callable[[bytes], str]) -> None:
    finding = doctor.ask_server(serve(b'{"prefill": [{}], "decode": [{}, {}]}'))
    assert finding == Finding("router", True, "1 prefill, 2 decode")


def test_a_server_with_keys_is_asked_with_one(serve: Callable[[bytes], str]) -> None:
    url = serve(NODE)
    finding = doctor.ask_server(url, "k1")
    assert (finding.is_good, finding.detail, finding.mend) == (
        False,
        "HTTP 401 Unauthorized",
        "give its --api-key",
    )
    assert doctor.ask_server(url).is_good


@pytest.mark.parametrize("body", [b"<html>", b"[1, 2]", b"3"])
def test_something_else_on_that_port_is_a_finding(serve: Callable[[bytes], str], body: bytes) -> None:
    assert not doctor.ask_server(serve(body)).is_good


def test_nobody_there_is_a_finding() -> None:
    with bind_http("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    finding = doctor.ask_server(f"http://127.0.0.1:{port}")
    assert (finding.is_good, finding.mend) == (False, "is it running, and is the port right?")


def test_a_zmq_port_is_a_finding() -> None:
    with bind_http("127.0.0.1", 0) as listener:

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\r\n")
                connection.recv(1000)

        thread = threading.Thread(target=greet)
        thread.start()
        finding = doctor.ask_server(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert not finding.is_good


def test_an_address_that_is_no_url_is_refused() -> None:
    with pytest.raises(StartupError, match=r"--url 127\.0\.0\.1:8000: a URL is expected"):
        doctor.ask_server("127.0.0.1:8000")
