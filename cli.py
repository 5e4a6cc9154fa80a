"""The commands: `pdserve up | demo | router | prefill | decode | bench | doctor`, and one binary per role.

Each role's modules are imported only in the process of that role: a router never loads torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

from .runtime.cluster_secret import new_secret
from .runtime.command_line import (
    add_flags,
    forwarded_flags,
    node_config,
    resolve,
    router_config,
    suggestion,
    up_config,
)
from .runtime.config import DEFAULT_PORTS, SECRET_FIELDS, NodeConfig, RouterConfig
from .runtime.direct_http import open_url
from .runtime.errors import StartupError
from .runtime.foreign_flags import without_effect
from .runtime.hub import ModelFolders
from .runtime.listen import bind_http, http_url, inherit_http, is_loopback
from .runtime.logs import configure_logging
from .runtime.process import (
    AccessKeys,
    Succession,
    die_with_parent,
    end_now,
    handed_keys,
    ignore_stray_signals,
    leave_last_words,
    usable_cores,
)
from .runtime.supervisor import Child, Supervisor
from .runtime.timing import UNSCALED, Timing
from .runtime.tls import TlsFiles, Trust
from .runtime.version import VERSION

_ANNOUNCEMENTS = 120
_Config = TypeVar("_Config", bound=RouterConfig | NodeConfig)
_log = logging.getLogger(__name__)
_NODE_ROLES: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode")
_ROLES: tuple[Literal["router", "prefill", "decode"], ...] = ("router", *_NODE_ROLES)


def main(argv: Sequence[str] | None = None) -> int:
    """`pdserve COMMAND …`"""
    parser = argparse.ArgumentParser(
        prog="pdserve", description="Serve a large language model with prefill and decode on different nodes."
    )
    parser.add_argument("--version", action="version", version=f"pdserve {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = commands.add_parser(
        "up", aliases=["serve"], help="a router, prefill and decode nodes on this machine"
    )
    add_flags(up, frozenset({"up", *_ROLES}))
    _add_child_argument(up)
    demo = commands.add_parser("demo", help="`up`, shown at work on one completion and one chat")
    add_flags(demo, frozenset({"up", *_ROLES}))
    demo.add_argument("--once", action="store_true", help="end after the two answers")
    for role in _ROLES:
        _add_role_arguments(commands.add_parser(role, help=f"one {role}"), role)
    if argv is None:
        argv = sys.argv[1:]
    if argv[:1] == ["bench"]:  # its modules take a third of a second to import
        from .bench.cli import add_parser

        add_parser(commands)
    else:
        commands.add_parser("bench", help="measure TTFT, ITL and goodput of any OpenAI-compatible server")
    doctor = commands.add_parser("doctor", help="what works on this machine, and what listens where")
    doctor.add_argument("--url", action="append", default=[], help="a running router or node to look at too")
    doctor.add_argument("--api-key", default="", help="sent as a bearer token to each --url")
    doctor.add_argument("--ssl-ca-certs", default="", metavar="FILE", help="CAs of a --url of https")
    # Started by a scheduler: a node's own HTTP, and a further tensor-parallel rank. Without a help of their
    # own they are not listed.
    _add_front_arguments(commands.add_parser("node-front"))
    _add_worker_arguments(commands.add_parser("tp-worker"))

    given = _parsed(parser, argv)
    command = str(given.pop("command"))
    if command == "demo":
        given["arguments"] = [argument for argument in argv[1:] if argument != "--once"]
    return _run("up" if command == "serve" else command, given)


def main_router() -> int:
    """`pdserve-router …`"""
    return _role_main("router")


def main_prefill() -> int:
    """`pdserve-prefill …`"""
    return _role_main("prefill")


def main_decode() -> int:
    """`pdserve-decode …`"""
    return _role_main("decode")


def _role_main(role: str) -> int:
    parser = argparse.ArgumentParser(prog=f"pdserve-{role}", description=f"One {role} of a pdserve cluster.")
    _add_role_arguments(parser, role)
    return _run(role, _parsed(parser, sys.argv[1:]))


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = suggestion(name) if name.startswith("-") else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
    return vars(given)


def _run(command: str, given: dict[str, Any]) -> int:
    runs: dict[str, Callable[[dict[str, Any]], int]] = {
        "up": _up,
        "demo": _demo,
        "router": _router,
        "prefill": lambda given: _node("prefill", given),
        "decode": lambda given: _node("decode", given),
        "bench": _bench,
        "doctor": _doctor,
        "node-front": _node_front,
        "tp-worker": _tp_worker,
    }
    last_words_fd = given.pop("last_words_fd", None)
    if (parent_pid := given.pop("parent_pid", None)) is not None:
        # A rank has nothing to finish without rank 0, and must not outlive it as a frozen process.
        if command == "up":
            given["owner_pid"] = parent_pid  # its supervisor looks after that itself
        else:
            given["is_child"] = True
            die_with_parent(parent_pid, signal.SIGKILL if command == "tp-worker" else signal.SIGTERM)
        keys = handed_keys()
        if keys.api:
            given["api_key"] = keys.api
        if keys.admin:
            given["admin_api_key"] = keys.admin
        if keys.cluster_secret:
            given["cluster_secret"] = keys.cluster_secret
    if command not in ("bench", "demo", "doctor", "up"):
        ignore_stray_signals()
    try:
        return runs[command](given)
    except StartupError as error:
        print(f"pdserve {command}: {error}", file=sys.stderr)
        if last_words_fd is not None:
            leave_last_words(last_words_fd, str(error))
        return 1
    except KeyboardInterrupt:
        return 130


def _add_role_arguments(parser: argparse.ArgumentParser, role: str) -> None:
    add_flags(parser, frozenset({role}))
    # Given by `pdserve up`, which bound the socket: the port is known before this process has started.
    parser.add_argument("--listen-fd", type=int, default=None, help=argparse.SUPPRESS)
    if role != "router":
        parser.add_argument("--incarnation", default="", help=argparse.SUPPRESS)
    _add_child_argument(parser)


def _add_child_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parent-pid", type=int, default=None, help=argparse.SUPPRESS)  # see `spawn`
    parser.add_argument("--last-words-fd", type=int, default=None, help=argparse.SUPPRESS)


def _listener(
    given: Mapping[str, Any], role: Literal["router", "prefill", "decode"], config: RouterConfig | NodeConfig
) -> socket.socket:
    """On the port that was asked for and no other; the role's own may be any that follows it."""
    if given.get("listen_fd") is not None:
        return inherit_http(given["listen_fd"])
    if config.port is not None:
        return bind_http(config.host, config.port)
    return bind_http(config.host, DEFAULT_PORTS[role], or_next=True)


# ---- one process per role ---------------------------------------------------------------------------


def _router(given: dict[str, Any]) -> int:
    config = router_config(given)
    _begin_log("router", config, given)
    config = _with_folders(config, ModelFolders())
    from .router.main import run_router

    listener = _listener(given, "router", config)
    _check_strangers_stay_out(config, listener)
    is_supervised = given.get("listen_fd") is not None
    return run_router(config, listener, Succession() if is_supervised else None)


def _node(role: Literal["prefill", "decode"], given: dict[str, Any]) -> int:
    config = node_config(role, given)
    _begin_log(role, config, given)
    config = _with_folders(config, ModelFolders())
    listener = _listener(given, role, config)
    _check_strangers_stay_out(config, listener)
    incarnation = str(given.get("incarnation", ""))
    if role == "prefill":
        with _engine_is_installed():
            from .prefill.main import run_prefill
        end_now(run_prefill(config, listener, incarnation))
    with _engine_is_installed():
        from .decode.main import run_decode
    end_now(run_decode(config, listener, incarnation))


@contextlib.contextmanager
def _engine_is_installed() -> Iterator[None]:
    """Around the imports of what computes: an installation without an extra has routers only."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "safetensors", "fsspec"):
            raise
        raise StartupError(
            f"a node computes with {error.name}, which is not installed: pip install 'pdserve[cpu]', or "
            "'pdserve[cuda]'"
        ) from error


def _begin_log(process: str, config: RouterConfig | NodeConfig, given: Mapping[str, Any]) -> None:
    configure_logging(process, config.log_level, config.log_format)
    _tell_time_scale(config.time_scale)
    if config.foreign_flags and "is_child" not in given:  # `up` says it for all
        _log.warning("%s", without_effect(config.foreign_flags))


def _tell_time_scale(scale: float) -> None:
    if scale != 1.0:
        _log.warning(
            "--time-scale %g: leases, silences and all other waits are scaled, for tests only", scale
        )


def _with_folders(config: _Config, folders: ModelFolders) -> _Config:
    """With names on the hub made folders. Raises StartupError."""
    find = partial(folders.find, revision=config.revision, cache_dir=config.download_dir)
    with_weights = isinstance(config, NodeConfig) and config.load_format != "dummy"
    return replace(
        config,
        model=find(config.model, with_weights=with_weights),
        tokenizer=find(config.tokenizer, with_weights=False),
    )


def _check_strangers_stay_out(config: RouterConfig | NodeConfig, listener: socket.socket) -> None:
    """A router takes registrations, and a node any order: from strangers only when told so."""
    if not (config.cluster_secret or config.insecure_cluster or is_loopback(listener)):
        raise StartupError(
            f"--host {config.host} is no loopback address, so strangers could join the cluster and steer it: "
            "give --cluster-secret-file FILE, the same to all its processes (or --insecure-cluster)"
        )


def _add_front_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--role", required=True)
    parser.add_argument("--zmq-address", required=True)
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--router", action="append", default=[])
    for name in ("--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certs"):
        parser.add_argument(name, default="")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="text")
    parser.add_argument("--time-scale", type=float, default=1.0)
    _add_child_argument(parser)


def _node_front(given: dict[str, Any]) -> int:
    configure_logging(f"{given['role']}-front", given["log_level"], given["log_format"])
    _tell_time_scale(given["time_scale"])
    from .front.main import run_node_front

    return run_node_front(
        zmq_address=given["zmq_address"],
        listener=inherit_http(given["listen_fd"]),
        url=given["url"],
        router_urls=tuple(given["router"]),
        keys=_keys(given),
        timing=UNSCALED.scaled(given["time_scale"]),
        tls=TlsFiles(
            certfile=given["ssl_certfile"], keyfile=given["ssl_keyfile"], ca_certs=given["ssl_ca_certs"]
        ),
    )


def _add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--role", required=True)
    parser.add_argument("--pipe-fd", type=int, required=True)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="text")
    _add_child_argument(parser)


def _tp_worker(given: dict[str, Any]) -> int:
    configure_logging(f"{given['role']}-{given['rank']}", given["log_level"], given["log_format"])
    from .ranks.worker import run_rank

    end_now(run_rank(socket.socket(fileno=given["pipe_fd"])))


def _bench(given: dict[str, Any]) -> int:
    from .bench.cli import run

    return run(argparse.Namespace(**given))


def _demo(given: dict[str, Any]) -> int:
    from .demo import run_demo

    config = router_config(given)
    return run_demo(
        given["arguments"],
        once=given["once"],
        api_key=config.api_key[0] if config.api_key else "",
        tls=config.tls,
    )


def _doctor(given: dict[str, Any]) -> int:
    from .doctor import run_doctor

    try:
        code = run_doctor(tuple(given["url"]), given["api_key"], TlsFiles(ca_certs=given["ssl_ca_certs"]))
        sys.stdout.flush()
    except BrokenPipeError:  # of `pdserve doctor | head`
        _stop_saying()
        return 0
    return code


# ---- a whole cluster on this machine ----------------------------------------------------------------


def _up(given: dict[str, Any]) -> int:
    config = router_config(given)
    _begin_log("up", config, given)
    starts, is_colocated = up_config(given), bool(resolve("decode", given)["colocated"])
    num_prefill, num_decode = 0 if is_colocated else starts.num_prefill, starts.num_decode
    if num_prefill < 1 and not is_colocated:
        raise StartupError("--num-prefill 0: 1 or more is expected, or --colocated")

    listener = _listener(given, "router", config)
    admin_key = config.admin_api_key
    if not admin_key and not is_loopback(listener):
        given["admin_api_key"] = admin_key = secrets.token_urlsafe()  # our own, to announce deaths with
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    url = http_url(loopback, listener, config.tls.scheme)
    given["cluster_secret"] = config.cluster_secret or new_secret()
    folders = ModelFolders()
    num_threads = max(1, usable_cores() // (num_prefill + num_decode))
    nodes: list[Child] = []
    for role, count in zip(_NODE_ROLES, (num_prefill, num_decode), strict=True):
        if count:
            of_node = _for_child(node_config(role, given), given, folders)
            nodes += [
                _node_child(role, i, of_node, url, num_threads, starts.nodes_nice, config.timing.node_grace_s)
                for i in range(count)
            ]
    of_router = _for_child(config, given, folders)  # last, as it needs no weights
    router = _router_child(of_router, listener, config.drain_timeout + 5.0)
    children = [router, *nodes]

    keys = AccessKeys(config.api_key, admin_key)
    trust = Trust(config.tls)
    with Supervisor(
        children,
        config.timing,
        lambda incarnation: _announce_death(url, incarnation, keys, trust, config.timing),
        given.get("owner_pid"),
    ) as supervisor:
        if not supervisor.wait_ready(
            lambda: _why_not_ready(url, trust, config.timing), config.timing.cluster_start_s
        ):
            return 0
        _say(f"pdserve is ready at {url}")
        supervisor.run()
        return 0


def _for_child(
    config: RouterConfig | NodeConfig, given: Mapping[str, Any], folders: ModelFolders
) -> dict[str, Any]:
    """What `given` is for a child: a name on the hub was looked up once, for all of them."""
    found = _with_folders(config, folders)
    if (found.model, found.tokenizer) == (config.model, config.tokenizer):
        return dict(given)
    given = {name: value for name, value in given.items() if name != "model_positional"}
    return {
        **given,
        "model": found.model,
        "tokenizer": found.tokenizer,
        "served_model_name": config.served_model_name,
    }


def _say(line: str) -> None:
    """On stdout while somebody reads it: `pdserve up | head` is no reason to end a cluster."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        _stop_saying()


def _stop_saying() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # what is buffered is flushed once more at the end
    os.close(nowhere)


def _router_child(given: Mapping[str, Any], listener: socket.socket, grace_s: float) -> Child:
    flags = forwarded_flags(given, "router", dropped=("host", "port", *SECRET_FIELDS))
    arguments = ["router", *flags, "--listen-fd", str(listener.fileno())]
    return Child("router", arguments, grace_s, listener=listener, keys=_keys(given))


def _node_child(
    role: Literal["prefill", "decode"],
    index: int,
    given: Mapping[str, Any],
    router_url: str,
    num_threads: int,
    nice: int,
    grace_s: float,
) -> Child:
    flags = forwarded_flags(given, role, dropped=("port", *SECRET_FIELDS))
    if resolve(role, given)["num_threads"] is None:
        flags += ["--num-threads", str(num_threads)]
    arguments = [role, *flags, "--port", "0", "--router", router_url]
    return Child(
        f"{role} {index}",
        arguments,
        grace_s,
        nice=nice,
        keys=_keys(given),
        has_incarnation=True,
    )


def _keys(given: Mapping[str, Any]) -> AccessKeys:
    return AccessKeys(
        tuple(given.get("api_key", ())), given.get("admin_api_key", ""), given.get("cluster_secret", "")
    )


def _announce_death(
    router_url: str, incarnation: str, keys: AccessKeys, trust: Trust, timing: Timing
) -> None:
    """Tells the decode nodes, through the router, that no process of a node lives any more.

    Tried for a while: a decode node may not have noticed yet, and the router may itself be starting again.
    """
    headers = {"Content-Type": "application/json"}
    if key := keys.admin or keys.first:
        headers["Authorization"] = f"Bearer {key}"
    body = json.dumps({"incarnation": incarnation}).encode()
    request = urllib.request.Request(f"{router_url}/assert_peer_death", body, headers)

    def announce() -> None:
        for _ in range(_ANNOUNCEMENTS):
            try:
                open_url(request, timeout_s=timing.router_call_s, trust=trust).close()
                return
            except OSError:  # URLError and HTTPError are OSErrors
                time.sleep(timing.obituary_retry_s)

    threading.Thread(target=announce, name="obituary", daemon=True).start()


def _why_not_ready(router_url: str, trust: Trust, timing: Timing) -> str:
    """In the router's words; empty when it is."""
    try:
        open_url(f"{router_url}/ready", timeout_s=timing.router_call_s, trust=trust).close()
    except urllib.error.HTTPError as error:
        with error:
            return str(json.load(error)["error"]["message"])
    except OSError as error:
        return f"the router does not answer: {error}"
    return ""
