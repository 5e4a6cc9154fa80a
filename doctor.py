"""`pdserve doctor`: which transports, kernels and devices work here, what is missing, what listens where."""

from __future__ import annotations

import http.client
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import psutil
import zmq

from .messages.link_guard import NO_CURVE
from .runtime.cluster_secret import SECRET_VARIABLE, given_secret
from .runtime.cpu_features import native_dtypes
from .runtime.direct_http import open_url
from .runtime.errors import StartupError
from .runtime.process import available_memory_bytes, usable_cores
from .runtime.tls import NO_TLS, SYSTEM_TRUST, TlsFiles, Trust

MOONCAKE_TCP_NOTE = (
    "Mooncake's TCP transport listens on 0.0.0.0 on two ports per node, whatever address it is given:"
    " whoever reaches them can write into the KV pool. Use it in trusted networks only."
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``mend`` says what to do where something is missing."""

    name: str
    is_good: bool
    detail: str
    mend: str = ""


def run_doctor(urls: Sequence[str], api_key: str = "", tls: TlsFiles = NO_TLS) -> int:
    """Print the report. Returns 1 when no transfer backend or no torch works here, else 0.

    `api_key` is for the servers at `urls`; empty: they are asked without. Raises StartupError for a URL that
    is none, and for files of `tls` that cannot be used.
    """
    tls.check()
    transports = list(check_transports())
    kernels = list(check_kernels())
    _print("Transports", transports)
    _print("Kernels", kernels)
    _print("Devices", check_devices())
    _print("Links between processes", check_links())
    _print("Listening (pdserve processes on this host)", listening_sockets())
    for url in urls:
        _print(url, [ask_server(url, api_key, Trust(tls))])
    print(f"\nNote: {MOONCAKE_TCP_NOTE}")
    can_serve = any(finding.is_good for finding in transports) and kernels[0].is_good
    return 0 if can_serve else 1


def check_transports() -> Iterator[Finding]:
    yield _shm()
    tcp = _mooncake()
    yield tcp
    yield _rdma(tcp.is_good)
    yield _nixl()


def _shm() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding("shm", False, f"{folder} cannot be written", "mount a tmpfs there")
    free = shutil.disk_usage(folder).free
    return Finding("shm", True, f"{free / 2**30:.1f} GiB free in {folder} (one host only)")


def _mooncake() -> Finding:
    name = "mooncake tcp"
    try:
        importlib.import_module("mooncake.engine")
    except ModuleNotFoundError:
        wheel = "mooncake-transfer-engine-non-cuda (or -cuda13 on a GPU node)"
        return Finding(name, False, "not installed", f"pip install {wheel}")
    except ImportError as error:  # the wheel is there, a shared library of the system is not
        libraries = "libibverbs1 librdmacm1 libnuma1"
        return Finding(name, False, str(error), f"apt-get install {libraries}")
    return Finding(name, True, _version("mooncake-transfer-engine"))


def _rdma(has_mooncake: bool) -> Finding:
    name = "mooncake rdma"
    folder = Path("/sys/class/infiniband")
    devices = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not devices:
        return Finding(name, False, f"no RDMA device in {folder}", "--transport tcp, or a host with a card")
    if not has_mooncake:
        return Finding(name, False, ", ".join(devices), "mooncake is missing, see above")
    return Finding(name, True, ", ".join(devices))


def _nixl() -> Finding:
    for package in ("nixl-cu12", "nixl-cu13"):
        try:
            importlib.import_module(f"{package.replace('-', '_')}._bindings")
        except ModuleNotFoundError:
            continue
        except ImportError as error:
            return Finding("nixl", False, str(error), f"pip install --force-reinstall {package}")
        return Finding("nixl", True, _version(package))
    return Finding("nixl", False, "not installed (optional)", "pip install 'pdserve[nixl]'")


def check_kernels() -> Iterator[Finding]:
    """torch first: nothing computes without it."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        yield Finding("torch", False, str(error), "pip install torch (2.11 or newer)")
        return
    capability = torch.backends.cpu.get_cpu_capability()
    formats = ", ".join(sorted(native_dtypes()))
    yield Finding("torch", True, f"{torch.__version__}, CPU kernels {capability}, in hardware: {formats}")
    for module, package in (("triton", "triton"), ("flashinfer", "flashinfer-python")):
        try:
            importlib.import_module(module)
        except ImportError:
            yield Finding(module, False, "not installed (used on GPUs only)", f"pip install {package}")
        else:
            yield Finding(module, True, _version(package))


def check_devices() -> Iterator[Finding]:
    memory = available_memory_bytes() / 2**30
    yield Finding("cpu", True, f"{platform.machine()}, {usable_cores()} cores, {memory:.1f} GiB free")
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return
    if not torch.cuda.is_available():
        yield Finding("gpu", False, "none that torch sees")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory_gib = properties.total_memory / 2**30
        detail = f"{properties.name}, {memory_gib:.0f} GiB; nodes compute on the CPU (docs/gpu.md)"
        yield Finding(f"gpu {index}", True, detail)


def check_links() -> Iterator[Finding]:
    """What keeps strangers off the zmq links of the processes that are started in this environment."""
    if zmq.has("curve"):
        yield Finding("CURVE", True, f"libzmq {zmq.zmq_version()}")
    else:
        yield Finding("CURVE", False, NO_CURVE)
    try:
        secret = given_secret("")
    except StartupError as error:
        yield Finding("cluster secret", False, str(error))
        return
    if secret:
        yield Finding("cluster secret", True, f"in {SECRET_VARIABLE}")
    else:
        detail = (
            f"none in {SECRET_VARIABLE}: routers and nodes that are not given one listen on loopback only"
        )
        mend = "for other hosts: openssl rand -hex 32 > FILE, and --cluster-secret-file FILE on all of them"
        yield Finding("cluster secret", False, detail, mend)


def listening_sockets() -> Iterator[Finding]:
    """Every TCP port that a pdserve process of this host listens on."""
    for process in psutil.process_iter(["pid", "cmdline"]):
        command = process.info["cmdline"] or []
        role = _role(command)
        if role is None:
            continue
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.NoSuchProcess:  # it has just ended
            continue
        except psutil.Error:
            yield Finding(f"pid {process.pid}", False, f"{role}: its sockets cannot be read", "run as root")
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                address, port = connection.laddr[:2]
                is_open = address in ("0.0.0.0", "::")
                detail = f"{role} listens on {address}:{port}" + (" (every interface)" if is_open else "")
                is_guarded = "--insecure-cluster" not in command or ip_address(address).is_loopback
                mend = "" if is_guarded else "--insecure-cluster lets strangers in: give a cluster secret"
                yield Finding(f"pid {process.pid}", is_guarded, detail, mend)


def _role(command: Sequence[str]) -> str | None:
    """Which part of pdserve a command line runs, if any."""
    roles = ("router", "prefill", "decode", "node-front", "tp-worker", "up")
    for program, argument in itertools.pairwise([*command, ""]):
        name = os.path.basename(program)
        if name == "pdserve" and argument in roles:
            return argument
        if name.startswith("pdserve-") and name.removeprefix("pdserve-") in roles:
            return name.removeprefix("pdserve-")
    return None


def ask_server(url: str, api_key: str = "", trust: Trust = SYSTEM_TRUST) -> Finding:
    """What a running router or node says of itself."""
    if not url.startswith(("http://", "https://")):
        raise StartupError(f"--url {url}: a URL is expected, such as http://127.0.0.1:8000")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{url.rstrip('/')}/server_info", headers=headers)
    try:
        with open_url(request, timeout_s=5.0, trust=trust) as response:
            info = json.loads(response.read())
    except urllib.error.HTTPError as error:
        mend = "give its --api-key" if error.code == 401 else "is the port right?"
        return Finding("server_info", False, f"HTTP {error.code} {error.reason}", mend)
    except (http.client.HTTPException, OSError, ValueError) as error:
        return Finding("server_info", False, str(error), "is it running, and is the port right?")
    entry = info.get("entry", {}) if isinstance(info, dict) else None
    if entry is None:
        return Finding("server_info", False, "it answers, but is no pdserve", "is the port right?")
    if not entry:
        return Finding(
            "router", True, f"{len(info.get('prefill', []))} prefill, {len(info.get('decode', []))} decode"
        )
    detail = f"{entry['role']} node, zmq {entry['zmq_address']}, KV over {info.get('transport', '?')}"
    if len(ranks := info.get("ranks", [])) > 1:
        detail += f", {len(ranks)} TP ranks (pids {', '.join(str(rank['pid']) for rank in ranks)})"
    return Finding("node", True, detail)


def _version(package: str) -> str:
    for name in (package, f"{package}-non-cuda", f"{package}-cuda13"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "version unknown"


def _print(title: str, findings: Sequence[Finding] | Iterator[Finding]) -> None:
    print(f"\n{title}")
    rows = list(findings)
    for finding in rows:
        mark = "ok  " if finding.is_good else "no  "
        mend = f"  -> {finding.mend}" if finding.mend else ""
        print(f"  {mark}{finding.name:<15} {finding.detail}{mend}")
    if not rows:
        print("  none")
