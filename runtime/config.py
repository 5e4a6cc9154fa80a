"""Every flag of every command, once: names, aliases, defaults, and which processes take it.

A value is resolved once, at start: default, then the YAML file's top level, then its block for the role
(``router:``, ``prefill:``, ``decode:``), then the command line. After that it is frozen.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from .cluster_secret import given_secret
from .config_file import file_layers
from .errors import StartupError
from .flag import Flag, field_of, near_miss
from .foreign_flags import FOREIGN_FIELD, declare_foreign_flags, foreign_name, foreign_names
from .http_urls import is_host, url_fault
from .logs import LEVELS
from .metric_aliases import METRICS_COMPATS, MetricsCompat
from .process import AccessKeys, usable_cores
from .timing import MAX_TIME_SCALE, MIN_TIME_SCALE, UNSCALED, Timing
from .tls import TlsFiles

VerifyPages: TypeAlias = Literal["off", "sample", "all"]
ProcessRole: TypeAlias = Literal["up", "router", "prefill", "decode"]
SHIPPED_MODEL = Path(__file__).resolve().parent.parent / "assets" / "tiny-python"
HIDDEN_STATES_FLAG = "--enable-return-hidden-states"
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")
_ROOT_PATH = re.compile(r"(/[\w.~-]+)+")
_THREADS_A_CORE = 8  # more wait for one another
_HEADER_SAFE = re.compile(r"[\x21-\x7e]+")
DEFAULT_PORTS: Mapping[str, int] = {"router": 8000, "prefill": 8100, "decode": 8200}


_ALL = frozenset({"router", "prefill", "decode"})
_NODES = frozenset({"prefill", "decode"})
_ROUTER = frozenset({"router"})
_DECODE = frozenset({"decode"})
_PREFILL = frozenset({"prefill"})
_UP = frozenset({"up"})

FLAGS: tuple[Flag, ...] = (
    Flag(names=("--model", "--model-path"), roles=_ALL, positional=True, default=str(SHIPPED_MODEL),
         help="checkpoint folder in Hugging Face format, or a name on the hub, such as Qwen/Qwen3-0.6B "
              "(default: the shipped model)"),
    Flag(names=("--revision",), roles=_ALL, default="",
         help="of a model on the hub: branch, tag or commit (default: its main branch)"),
    Flag(names=("--download-dir",), roles=_ALL, default="", metavar="DIR",
         help="cache of the hub's models (default: huggingface_hub's own)"),
    Flag(names=("--tokenizer", "--tokenizer-path"), roles=_ALL, default="", metavar="FOLDER",
         help="folder of the tokenizer, or a name on the hub (default: the model's)"),
    Flag(names=("--chat-template",), roles=_ROUTER, default="", metavar="FILE",
         help="Jinja file, or the template itself (default: the model's)"),
    Flag(names=("--generation-config",), roles=_ALL, default="auto", metavar="FOLDER",
         help="sampling parameters of requests that name none; auto: the model's generation_config.json, "
              "vllm: none, or the folder of another one"),
    Flag(names=("--load-format",), roles=_NODES, default="auto", choices=("auto", "safetensors", "dummy"),
         help="of the weights; dummy: random ones, to measure speed without a checkpoint's"),
    Flag(names=("--served-model-name",), roles=_ALL, repeatable=True, takes_several=True, default=(),
         metavar="NAME",
         help="names that clients may ask for; answers show the first (default: the path as given)"),
    Flag(names=("--host",), roles=_ALL, default="127.0.0.1", help="address to listen on"),
    Flag(names=("--port",), roles=_ALL, kind=int,
         help="HTTP port (default: router 8000, prefill 8100, decode 8200, or the next free one)"),
    Flag(names=("--advertise-host",), roles=_NODES,
         help="address that peers reach this node by (default: --host, or this host's own)"),
    Flag(names=("--api-key",), roles=_ALL, repeatable=True, default=(), metavar="KEY",
         help="accepted bearer token; repeatable (default: none, everyone may ask)"),
    Flag(names=("--admin-api-key",), roles=_ALL, default="", metavar="KEY",
         help="the only bearer token for the admin routes; without one they are served on loopback alone"),
    Flag(names=("--cluster-secret-file",), roles=_ALL, default="",
         help="file with the secret that all processes of a cluster share (or PDSERVE_CLUSTER_SECRET holds "
              "it); `up` makes one. Without one a cluster is for loopback alone"),
    Flag(names=("--insecure-cluster",), roles=_ALL, kind=bool, default=False,
         help="listen on other addresses without a cluster secret: whoever reaches them can join, read "
              "prompts and weights, and replace them"),
    Flag(names=("--ssl-keyfile",), roles=_ALL, default="",
         help="PEM file with the key of --ssl-certfile, which may hold it too"),
    Flag(names=("--ssl-certfile",), roles=_ALL, default="",
         help="PEM file with this server's certificate, and those that lead to its CA's: HTTP is TLS then"),
    Flag(names=("--ssl-ca-certs",), roles=_ALL, default="",
         help="PEM file with the CAs that https routers and nodes are checked by (default: the system's)"),
    Flag(names=("--dtype",), roles=_NODES, default="auto",
         choices=("auto", "float32", "bfloat16", "float16"),
         spellings=(("half", "float16"), ("float", "float32")),
         help="of weights and KV cache; auto: the checkpoint's, or float32 where the processor lacks it"),
    Flag(names=("--deterministic", "--enable-deterministic-inference"), roles=_NODES, kind=bool,
         default=False, help="answers have the same bits in any batch, chunk or hand-off (in float32)"),
    Flag(names=("--max-model-len", "--context-length"), roles=_ALL, kind=int, takes_suffix=True,
         help="longest prompt plus output, tokens (default: from the model's config)"),
    Flag(names=("--page-size", "--block-size"), roles=_NODES, kind=int, default=16,
         help="tokens in a KV page"),
    Flag(names=("--kv-cache-gb",), roles=_NODES, kind=float,
         help="KV pool, GiB (default: a quarter of free memory, at least 1 x max-model-len where half of it "
              "can hold that beside the weights, at most 32 x)"),
    Flag(names=("--chunked-prefill-size", "--max-num-batched-tokens"), roles=_NODES, kind=int, default=2048,
         takes_suffix=True,
         help="prompt tokens computed in one step"),
    Flag(names=("--max-running-requests", "--max-num-seqs"), roles=_NODES, kind=int, default=64,
         help="sequences in a batch"),
    Flag(names=("--tensor-parallel-size", "--tp-size", "--tp", "-tp"), roles=_NODES, kind=int, default=1,
         help="ranks, each a process, that the model is split over; both sides may differ"),
    Flag(names=("--num-threads",), roles=_NODES, kind=int,
         help="threads of the engine, all ranks together (default: cores / nodes that `up` starts; by hand "
         "half of the cores)"),
    Flag(names=("--disable-prefix-cache", "--no-enable-prefix-caching", "--disable-radix-cache"),
         roles=_NODES, kind=bool, default=False, help="compute every prompt token"),
    Flag(names=(HIDDEN_STATES_FLAG,), roles=_NODES, kind=bool, default=False,
         help="answer requests for hidden states, which may be far larger than their text"),
    Flag(names=("--transfer-backend", "--disaggregation-transfer-backend"), roles=_NODES, default="mooncake",
         choices=("mooncake", "nixl", "shm"), help="how KV pages travel"),
    Flag(names=("--transport",), roles=_NODES, choices=("tcp", "rdma"), default="tcp",
         help="the wire of mooncake and nixl"),
    Flag(names=("--ib-device", "--disaggregation-ib-device"), roles=_NODES, default="",
         help="RDMA devices that may be used, comma separated (default: all)"),
    Flag(names=("--router",), roles=_NODES, repeatable=True, default=(),
         help="URL of a router to register with; repeatable"),
    Flag(names=("--max-queued-prefills",), roles=_PREFILL, kind=int, default=32,
         help="prompts waiting here before new ones are sent back as Busy"),
    Flag(names=("--disable-transfer-overlap",), roles=_PREFILL, kind=bool, default=False,
         help="send a prompt's pages only after its last chunk, to measure what overlap is worth"),
    Flag(names=("--colocated",), roles=_DECODE, kind=bool, default=False,
         help="prefill locally; no prefill node is needed"),
    Flag(names=("--local-prefill-threshold",), roles=_DECODE, kind=int,
         help="prompts of which at most N tokens are missing here are prefilled here; 0: none, unless no "
              "prefill node is alive (default: those of which part is cached here, when it is cheaper)"),
    Flag(names=("--local-prefill-chunk-size",), roles=_DECODE, kind=int,
         help="prompt tokens computed beside running streams in one step (default: as many as lengthen it "
              "by half, measured; with --colocated chunked-prefill-size)"),
    Flag(names=("--schedule-conservativeness",), roles=_DECODE, kind=float, default=1.0,
         help="how much growth admission counts with: less runs more at once and retracts more often, "
              "11 or more retracts never"),
    Flag(names=("--session-cache-fraction",), roles=_DECODE, kind=float, default=0.5,
         help="of the KV pool, that open sessions may keep from being evicted before all else"),
    Flag(names=("--faulty",), roles=_PREFILL, default="",
         help="share of writes that go wrong on purpose, such as fail=0.05,late=0.1,seed=7 (tests)"),
    Flag(names=("--verify-pages",), roles=_DECODE, default="off", choices=("off", "sample", "all"),
         help="compare digests of pages that were handed off with those of what was sent"),
    Flag(names=("--poison-reserved-pages",), roles=_DECODE, kind=bool, default=False,
         help="fill pages with NaN when they are reserved, so that a missing write shows (tests)"),
    Flag(names=("--crash-after-outputs",), roles=_DECODE, kind=int, default=0,
         help="end by SIGKILL once N outputs were sent; 0: never (tests)"),
    Flag(names=("--prefill",), roles=_ROUTER, repeatable=True, default=(),
         help="URL of a prefill node; repeatable (nodes may also register themselves)"),
    Flag(names=("--decode",), roles=_ROUTER, repeatable=True, default=(),
         help="URL of a decode node; repeatable"),
    Flag(names=("--max-attempts",), roles=_ROUTER, kind=int, default=3,
         help="times a request is tried without a token in between, in mid-stream too"),
    Flag(names=("--request-timeout",), roles=_ROUTER, kind=float, default=600.0, help="seconds"),
    Flag(names=("--max-queued-requests",), roles=_ROUTER, kind=int, default=1024,
         help="requests waiting before new ones get 429"),
    Flag(names=("--max-queue-wait",), roles=_ROUTER, kind=float, default=5.0,
         help="seconds that a new request may be expected to wait, by the rate of late, before it gets 429; "
              "0: any time"),
    Flag(names=("--stream-interval",), roles=_ROUTER, kind=int, default=1,
         help="tokens in an event of a stream, behind the first"),
    Flag(names=("--force-stream-interval",), roles=_ROUTER, kind=int, default=16,
         help="tokens that decode nodes send at once of answers that are not streamed"),
    Flag(names=("--seed", "--random-seed"), roles=_ROUTER, kind=int,
         help="seeds of requests that bring none are drawn from it, in the order in which they come "
              "(default: from the system's randomness)"),
    Flag(names=("--max-sessions",), roles=_ROUTER, kind=int, default=1024,
         help="sessions open before new ones get 429"),
    Flag(names=("--session-timeout",), roles=_ROUTER, kind=float, default=600.0,
         help="seconds that a session may be idle, unless it says otherwise, before it is closed"),
    Flag(names=("--drain-timeout", "--shutdown-timeout"), roles=_ROUTER, kind=float, default=60.0,
         help="seconds that running requests get after SIGTERM"),
    Flag(names=("--otlp-traces-endpoint",), roles=_ROUTER, default="",
         help="URL that traces are sent to by OTLP/HTTP, such as http://host:4318/v1/traces"),
    Flag(names=("--allowed-origins",), roles=_ROUTER, repeatable=True, default=(), takes_json_list=True,
         help="origins of web pages that may ask, such as https://app.example, or * for any; repeatable, or "
              "a JSON list"),
    Flag(names=("--allow-pickled-tensors",), roles=_ROUTER, kind=bool, default=False,
         help="take SGLang's JSON of /update_weights_from_tensor where it holds plain CPU tensors; nothing "
              "in it is run"),
    Flag(names=("--root-path",), roles=_ROUTER, default="",
         help="path under which a proxy in front shows this server, such as /llm"),
    Flag(names=("--uds",), roles=_ROUTER, default="",
         help="path of a Unix socket to listen on as well: nodes still come by --host and --port"),
    Flag(names=("--metrics-compat",), roles=_ALL, default="none", choices=METRICS_COMPATS,
         help="another server's names that /metrics has beside its own"),
    Flag(names=("--strict-fields",), roles=_ROUTER, kind=bool, default=False,
         help="refuse requests with unknown fields (default: ignore these and say so once a name)"),
    Flag(names=("--log-requests", "--enable-log-requests"), roles=_ROUTER, kind=bool, default=False,
         help="a line in the log when a request comes and when it ends"),
    Flag(names=("--log-requests-level",), roles=_ROUTER, kind=int, default=2,
         help="0: sizes, 1: sampling too, 2: the first token ids too, 3: all of them"),
    Flag(names=("--num-prefill",), roles=_UP, kind=int, default=1, help="prefill nodes to start"),
    Flag(names=("--num-decode",), roles=_UP, kind=int, default=1, help="decode nodes to start"),
    Flag(names=("--nodes-nice",), roles=_UP, kind=int, default=5,
         help="how far nodes step back behind the router, and all else here, for a core"),
    Flag(names=("--time-scale",), roles=_ALL, kind=float, default=1.0, is_hidden=True,
         help="how long what processes wait for one another takes, to what it should (tests), see Timing"),
    Flag(names=("--log-level",), roles=_ALL, default="info", choices=LEVELS, help="of messages shown"),
    Flag(names=("--log-format",), roles=_ALL, default="text", choices=("text", "json"), help="of the log"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """Resolved settings of a router."""

    model: str
    revision: str
    download_dir: str
    tokenizer: str
    chat_template: str
    generation_config: str
    served_model_name: tuple[str, ...]  # the first is shown in answers
    host: str
    port: int | None  # None: the role's own, or the next free one
    api_key: tuple[str, ...]
    admin_api_key: str
    cluster_secret: str
    insecure_cluster: bool
    ssl_keyfile: str
    ssl_certfile: str
    ssl_ca_certs: str
    max_model_len: int | None
    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    max_attempts: int
    request_timeout: float
    max_queued_requests: int
    max_queue_wait: float
    stream_interval: int
    force_stream_interval: int
    seed: int | None
    max_sessions: int
    session_timeout: float
    drain_timeout: float
    otlp_traces_endpoint: str
    allowed_origins: tuple[str, ...]
    allow_pickled_tensors: bool
    root_path: str
    uds: str
    metrics_compat: MetricsCompat
    strict_fields: bool
    log_requests: bool
    log_requests_level: int
    time_scale: float
    log_level: str
    log_format: str
    foreign_flags: tuple[str, ...] = ()  # given, and without effect here

    @property
    def keys(self) -> AccessKeys:
        return AccessKeys(self.api_key, self.admin_api_key, self.cluster_secret)

    @property
    def timing(self) -> Timing:
        return UNSCALED.scaled(self.time_scale)

    @property
    def tls(self) -> TlsFiles:
        return TlsFiles(certfile=self.ssl_certfile, keyfile=self.ssl_keyfile, ca_certs=self.ssl_ca_certs)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeConfig:
    """Resolved settings of a prefill or decode node."""

    role: Literal["prefill", "decode"]
    model: str
    revision: str
    download_dir: str
    tokenizer: str
    generation_config: str
    load_format: str
    served_model_name: tuple[str, ...]
    host: str
    port: int | None  # None: the role's own, or the next free one
    advertise_host: str
    api_key: tuple[str, ...]
    admin_api_key: str
    cluster_secret: str
    insecure_cluster: bool
    ssl_keyfile: str
    ssl_certfile: str
    ssl_ca_certs: str
    dtype: str
    deterministic: bool
    max_model_len: int | None
    page_size: int
    kv_cache_gb: float | None
    chunked_prefill_size: int
    max_running_requests: int
    tensor_parallel_size: int
    num_threads: int
    disable_prefix_cache: bool
    enable_return_hidden_states: bool
    transfer_backend: str
    transport: str
    ib_device: str
    router: tuple[str, ...]
    metrics_compat: MetricsCompat
    time_scale: float
    log_level: str
    log_format: str
    max_queued_prefills: int = 0  # prefill only
    faulty: str = ""  # prefill only
    disable_transfer_overlap: bool = False  # prefill only
    colocated: bool = False  # decode only
    local_prefill_threshold: int | None = None  # decode only
    local_prefill_chunk_size: int | None = None  # decode only
    schedule_conservativeness: float = 1.0  # decode only
    session_cache_fraction: float = 0.5  # decode only
    verify_pages: VerifyPages = "off"  # decode only
    poison_reserved_pages: bool = False  # decode only
    crash_after_outputs: int = 0  # decode only
    foreign_flags: tuple[str, ...] = ()  # given, and without effect here

    @property
    def keys(self) -> AccessKeys:
        return AccessKeys(self.api_key, self.admin_api_key, self.cluster_secret)

    @property
    def timing(self) -> Timing:
        return UNSCALED.scaled(self.time_scale)

    @property
    def tls(self) -> TlsFiles:
        return TlsFiles(certfile=self.ssl_certfile, keyfile=self.ssl_keyfile, ca_certs=self.ssl_ca_certs)


def add_flags(parser: argparse.ArgumentParser, roles: frozenset[str]) -> None:
    """Declare the flags that any of `roles` takes, and other servers'. What is not given is absent from the
    namespace."""
    parser.add_argument("--config", metavar="FILE", help="YAML file; keys are flag names")
    for flag in FLAGS:
        if flag.roles & roles:
            flag.declare(parser)
    declare_foreign_flags(parser)


def suggestion(name: str) -> str:
    """Which flag may have been meant by an unknown one, for a complaint; empty when none is near."""
    known = [name for flag in FLAGS for name in flag.names]
    return near_miss(name, [*known, *foreign_names()])


def resolve(role: ProcessRole, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one role: defaults, then the YAML file, then what was given on the command line.

    Raises StartupError for a file that cannot be read, an unknown key or a value of the wrong type.
    """
    values: dict[str, Any] = {flag.field: flag.default for flag in FLAGS if role in flag.roles}
    foreign: tuple[str, ...] = ()
    if given.get("config"):
        for layer in file_layers(Path(given["config"]), role, FLAGS):
            foreign += layer.pop(FOREIGN_FIELD, ())
            values.update(layer)
    values.update({name: value for name, value in given.items() if name in values})
    if "model_positional" in given:
        if "model" in given and given["model"] != given["model_positional"]:
            both = f"{given['model_positional']!r} and --model {given['model']!r}"
            raise StartupError(f"two models were given, {both}; give one")
        values["model"] = given["model_positional"]
    elif "model" not in given:
        _check_names(given.get("served_model_name", ()))
    for flag in FLAGS:
        if flag.repeatable and flag.field in values:
            value = values[flag.field]
            items = (value,) if isinstance(value, str) else tuple(value)
            values[flag.field] = _from_json_lists(flag, items) if flag.takes_json_list else items
    _check(values)
    values[FOREIGN_FIELD] = (*foreign, *given.get(FOREIGN_FIELD, ()))
    return values


def _check_names(names: Sequence[str]) -> None:
    """Raises StartupError where the last of several names is a checkpoint's folder: somebody meant MODEL."""
    if len(names) > 1 and (Path(names[-1]).expanduser() / "config.json").is_file():
        raise StartupError(
            f"--served-model-name takes {names[-1]} for one more name; give MODEL before it, or by --model"
        )


def _from_json_lists(flag: Flag, items: Sequence[str]) -> tuple[str, ...]:
    flat: list[str] = []
    for item in items:
        if not item.lstrip().startswith("["):
            flat.append(item)
            continue
        try:
            flat += msgspec.json.decode(item, type=list[str])
        except msgspec.DecodeError as error:
            raise StartupError(f"{flag.names[0]} {item}: a JSON list of strings is expected") from error
    return tuple(flat)


def _check(values: Mapping[str, Any]) -> None:
    for name in ("page_size", "chunked_prefill_size", "max_running_requests", "max_attempts", "num_threads",
                 "max_model_len", "max_queued_requests", "max_queued_prefills",
                 "local_prefill_chunk_size", "tensor_parallel_size", "stream_interval",
                 "force_stream_interval", "max_sessions"):  # fmt: skip
        value = values.get(name)
        if value is not None and value < 1:
            raise StartupError(f"--{name.replace('_', '-')} {value}: 1 or more is expected")
    for name in ("local_prefill_threshold", "crash_after_outputs"):
        value = values.get(name)
        if value is not None and value < 0:
            raise StartupError(f"--{name.replace('_', '-')} {value}: 0 or more is expected")
    for name in (
        "kv_cache_gb",
        "request_timeout",
        "drain_timeout",
        "session_timeout",
        "schedule_conservativeness",
    ):
        value = values.get(name)
        if value is not None and not 0 < value < math.inf:
            raise StartupError(f"--{name.replace('_', '-')} {value}: a number above 0 is expected")
    if not MIN_TIME_SCALE <= values.get("time_scale", 1.0) <= MAX_TIME_SCALE:
        wanted = f"{MIN_TIME_SCALE:g} to {MAX_TIME_SCALE:g} is expected"
        raise StartupError(f"--time-scale {values['time_scale']}: {wanted}")
    if not 0 <= (values.get("max_queue_wait") or 0.0) < math.inf:
        raise StartupError(f"--max-queue-wait {values['max_queue_wait']}: 0 or more seconds are expected")
    if not 0 <= (values.get("session_cache_fraction") or 0.0) <= 1:
        raise StartupError(f"--session-cache-fraction {values['session_cache_fraction']}: 0 to 1 is expected")
    if not 0 <= (values.get("log_requests_level") or 0) <= 3:
        raise StartupError(f"--log-requests-level {values['log_requests_level']}: 0 to 3 is expected")
    if "" in (values.get("served_model_name") or ()):
        raise StartupError("--served-model-name is empty; give a name, or leave the flag out")
    if values.get("host") == "":
        raise StartupError("--host is empty; give an address, such as 127.0.0.1 or 0.0.0.0")
    for key in values.get("api_key") or ():
        if not key:
            raise StartupError("--api-key is empty; give a token, or leave the flag out to let everyone ask")
        _check_key("--api-key", key)
    if key := values.get("admin_api_key"):
        _check_key("--admin-api-key", key)
    for origin in values.get("allowed_origins") or ():
        if not _ORIGIN.fullmatch(origin):
            raise StartupError(
                f"--allowed-origins {origin}: * or an origin is expected, such as https://app.example"
            )
    root_path = values.get("root_path")
    if root_path and not _ROOT_PATH.fullmatch(root_path):
        raise StartupError(
            f"--root-path {root_path}: a path is expected, such as /llm, without a slash at its end"
        )
    if (port := values.get("port")) is not None and not 0 <= port <= 65535:
        raise StartupError(f"--port {port}: 0 to 65535 is expected")
    if values.get("max_model_len") == 1:
        raise StartupError("--max-model-len 1: 2 or more is expected, a token of prompt and one of output")
    num_threads, num_cores = values.get("num_threads"), os.cpu_count() or 1
    if num_threads is not None and num_threads > _THREADS_A_CORE * num_cores:
        raise StartupError(f"--num-threads {num_threads}: this host has {num_cores} cores")
    for name in ("router", "prefill", "decode"):
        for url in values.get(name) or ():
            if fault := url_fault(str(url)):
                shown = "" if "@" in str(url) else f" {url}"  # it may hold a password
                raise StartupError(f"--{name}{shown}: {fault}")
    if (host := values.get("advertise_host")) and not is_host(host):
        raise StartupError(f"--advertise-host {host}: a name or an address is expected, without a port")
    if values.get("ib_device") and values.get("transport") != "rdma":
        raise StartupError(
            f"--ib-device {values['ib_device']}: --transport {values['transport']} uses no RDMA device; "
            "give --transport rdma, or leave --ib-device out"
        )
    if values.get("transport") == "rdma" and values.get("transfer_backend") == "shm":
        raise StartupError(
            "--transport rdma: --transfer-backend shm has no wire; give mooncake or nixl, or leave it out"
        )


def _check_key(flag: str, key: str) -> None:
    if not _HEADER_SAFE.fullmatch(key):  # it is a secret: not shown
        raise StartupError(f"{flag}: visible ASCII characters without spaces are expected")


def router_config(given: Mapping[str, Any]) -> RouterConfig:
    values = resolve("router", given)
    return RouterConfig(**_filled(values, given, "router", RouterConfig))


def node_config(role: Literal["prefill", "decode"], given: Mapping[str, Any]) -> NodeConfig:
    values = resolve(role, given)
    values["role"] = role
    values["advertise_host"] = values["advertise_host"] or ""
    for name in ("host", "advertise_host"):
        if ":" in values[name]:
            flag = f"--{name.replace('_', '-')}"
            raise StartupError(f"{flag} {values[name]}: nodes take IPv4 addresses or names")
    if values["deterministic"] and values["dtype"] != "float32":
        if values["dtype"] != "auto":
            mend = "leave --dtype out, or give float32"
            raise StartupError(f"--deterministic computes in float32, not in {values['dtype']}; {mend}")
        values["dtype"] = "float32"
    if values["num_threads"] is None:
        # A node started by hand does not know its neighbours; one prefill and one decode is the usual pair.
        values["num_threads"] = max(1, usable_cores() // 2)
    return NodeConfig(**_filled(values, given, role, NodeConfig))


def _filled(
    values: Mapping[str, Any], given: Mapping[str, Any], role: str, config_type: type
) -> dict[str, Any]:
    """`given` may hold a `cluster_secret` that the parent process handed over."""
    filled = dict(values)
    filled["cluster_secret"] = given.get("cluster_secret") or given_secret(values["cluster_secret_file"])
    TlsFiles(
        certfile=values["ssl_certfile"], keyfile=values["ssl_keyfile"], ca_certs=values["ssl_ca_certs"]
    ).check()
    is_shipped = values["model"] == str(SHIPPED_MODEL)
    path_as_given = SHIPPED_MODEL.name if is_shipped else values["model"]
    filled["served_model_name"] = tuple(dict.fromkeys(values["served_model_name"])) or (path_as_given,)
    names = {field.name for field in fields(config_type)}
    return {name: value for name, value in filled.items() if name in names}


def arguments_of(options: Mapping[str, Any], roles: frozenset[str]) -> list[str]:
    """Command-line arguments from names and values: `{"num_decode": 2}` is `["--num-decode=2"]`.

    Aliases count. Raises StartupError for a name that is no flag of `roles`, and for a value of another type
    than the flag's.
    """
    by_name = {field_of(name): flag for flag in FLAGS for name in flag.names if flag.roles & roles}
    arguments: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        flag = by_name.get(field_of(name))
        if flag is None:
            if (foreign := foreign_name(name, value)) is not None:
                if value is not False:
                    arguments += [foreign] if value is True else [f"{foreign}={value}"]
                continue
            raise StartupError(
                f"there is no option {name!r}{suggestion(name)}; options are the flags of `pdserve up`"
            )
        for item in value if flag.repeatable and isinstance(value, list | tuple) else (value,):
            try:
                plain = flag.plain(item)
            except ValueError as error:
                raise StartupError(f"{name}={item!r}: {error}") from error
            if not flag.takes(plain):
                raise StartupError(f"{name}={item!r}: {flag.wanted} is expected")
            arguments += flag.arguments(plain)
    return arguments


def forwarded_flags(given: Mapping[str, Any], role: ProcessRole, dropped: Sequence[str] = ()) -> list[str]:
    """The given flags that `role` takes, as arguments for a child process."""
    arguments: list[str] = []
    if given.get("config"):
        arguments.append(f"--config={given['config']}")
    if "model_positional" in given:
        arguments.append(f"--model={given['model_positional']}")
    for flag in FLAGS:
        if flag.field not in given or role not in flag.roles or flag.field in dropped:
            continue
        value = given[flag.field]
        for item in value if flag.repeatable else (value,):
            arguments += flag.arguments(item)
    return arguments
