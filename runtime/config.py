"""What can be set, once: each owner's settings are a dataclass, and a field is a flag.

From a field come its flag with type, default, choices, aliases and help, its key in a `--config` file, its
option of `Engine`, what is wrong with a value, which processes take it, and whether it may be changed while
they run. `runtime/command_line.py` reads them. To add a setting is to add a field here, and to use it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

from .errors import StartupError
from .flag import Flag, Settings, above_0, flag, flag_found_at_start, flags_of, within
from .http_urls import is_host, url_fault
from .logs import LogFormat, LogLevel
from .metric_aliases import MetricsCompat
from .process import AccessKeys, usable_cores
from .timing import MAX_TIME_SCALE, MIN_TIME_SCALE, UNSCALED, Timing
from .tls import TlsFiles

NodeRole: TypeAlias = Literal["prefill", "decode"]
ProcessRole: TypeAlias = Literal["up", "router", "prefill", "decode"]
VerifyPages: TypeAlias = Literal["off", "sample", "all"]

SHIPPED_MODEL = Path(__file__).resolve().parent.parent / "assets" / "tiny-python"
HIDDEN_STATES_FLAG = "--enable-return-hidden-states"
DEFAULT_PORTS: Mapping[str, int] = {"router": 8000, "prefill": 8100, "decode": 8200}
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")
_ROOT_PATH = re.compile(r"(/[\w.~-]+)+")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_HEADER_SAFE = re.compile(r"[\x21-\x7e]+")
_THREADS_A_CORE = 8  # more wait for one another
_MAX_NICE = 19  # of Linux

_ALL = frozenset({"router", "prefill", "decode"})
_NODES = frozenset({"prefill", "decode"})
_ROUTER, _PREFILL, _DECODE = frozenset({"router"}), frozenset({"prefill"}), frozenset({"decode"})


# ---- what is wrong with a value ---------------------------------------------------------------------


def _name_fault(name: str) -> str:
    return "" if name else " is empty; give a name, or leave the flag out"


def _host_fault(host: str) -> str:
    return "" if host else " is empty; give an address, such as 127.0.0.1 or 0.0.0.0"


def _peer_host_fault(host: str) -> str:
    return "" if not host or is_host(host) else f" {host}: a name or an address is expected, without a port"


def _key_fault(key: str) -> str:
    """A secret is not shown."""
    if not key:
        return " is empty; give a token, or leave the flag out to let everyone ask"
    return "" if _HEADER_SAFE.fullmatch(key) else ": visible ASCII characters without spaces are expected"


def _admin_key_fault(key: str) -> str:
    return _key_fault(key) if key else ""


def _device_fault(device: str) -> str:
    return "" if _DEVICE.fullmatch(device) else f" {device}: auto, cpu, cuda or cuda:N is expected"


def _threads_fault(num_threads: int) -> str:
    num_cores = os.cpu_count() or 1
    if num_threads > _THREADS_A_CORE * num_cores:
        return f" {num_threads}: this host has {num_cores} cores"
    return within(1)(num_threads)


def _url_fault(url: str) -> str:
    fault = url_fault(url)
    shown = "" if "@" in url else f" {url}"  # it may hold a password
    return f"{shown}: {fault}" if fault else ""


def _origin_fault(origin: str) -> str:
    if _ORIGIN.fullmatch(origin):
        return ""
    return f" {origin}: * or an origin is expected, such as https://app.example"


def _root_path_fault(path: str) -> str:
    if not path or _ROOT_PATH.fullmatch(path):
        return ""
    return f" {path}: a path is expected, such as /llm, without a slash at its end"


# ---- settings, an owner each ------------------------------------------------------------------------
# fmt: off


@dataclass(frozen=True, kw_only=True)
class Model(Settings):
    """the model"""

    roles: ClassVar = _ALL

    model: str = flag(str(SHIPPED_MODEL),
        "checkpoint folder in Hugging Face format, or a name on the hub, such as Qwen/Qwen3-0.6B (default: "
        "the shipped model)", "--model-path", is_positional=True)
    revision: str = flag("", "of a model on the hub: branch, tag or commit (default: its main branch)")
    download_dir: str = flag("", "cache of the hub's models (default: huggingface_hub's own)", metavar="DIR")
    tokenizer: str = flag("",
        "folder of the tokenizer, or a name on the hub (default: the model's)", "--tokenizer-path",
        metavar="FOLDER")
    generation_config: str = flag("auto",
        "sampling parameters of requests that name none; auto: the model's generation_config.json, vllm: "
        "none, or the folder of another one", metavar="FOLDER")
    served_model_name: tuple[str, ...] = flag((),
        "names that clients may ask for; answers show the first (default: the path as given)",
        fault=_name_fault, takes_several=True, metavar="NAME")
    max_model_len: int | None = flag(None,
        "longest prompt plus output, tokens (default: from the model's config)", "--context-length",
        fault=within(2, why=", a token of prompt and one of output"), takes_suffix=True)


@dataclass(frozen=True, kw_only=True)
class Http(Settings):
    """HTTP"""

    roles: ClassVar = _ALL

    host: str = flag("127.0.0.1", "address to listen on", fault=_host_fault)
    port: int | None = flag(None,
        "HTTP port (default: router 8000, prefill 8100, decode 8200, or the next free one)",
        fault=within(0, 65535))


@dataclass(frozen=True, kw_only=True)
class Access(Settings):
    """who may ask, and who may join"""

    roles: ClassVar = _ALL

    api_key: tuple[str, ...] = flag((),
        "accepted bearer token; repeatable (default: none, everyone may ask)", fault=_key_fault,
        metavar="KEY", is_secret=True)
    admin_api_key: str = flag("",
        "the only bearer token for the admin routes; without one they are served on loopback alone",
        fault=_admin_key_fault, metavar="KEY", is_secret=True)
    cluster_secret_file: str = flag("",
        "file with the secret that all processes of a cluster share (or PDSERVE_CLUSTER_SECRET holds it); "
        "`up` makes one. Without one a cluster is for loopback alone", is_secret=True)
    insecure_cluster: bool = flag(False,
        "listen on other addresses without a cluster secret: whoever reaches them can join, read prompts "
        "and weights, and replace them")
    ssl_keyfile: str = flag("", "PEM file with the key of --ssl-certfile, which may hold it too")
    ssl_certfile: str = flag("",
        "PEM file with this server's certificate, and those that lead to its CA's: HTTP is TLS then")
    ssl_ca_certs: str = flag("",
        "PEM file with the CAs that https routers and nodes are checked by (default: the system's)")
    cluster_secret: str = ""  # what is in the file, or was handed over

    @property
    def keys(self) -> AccessKeys:
        return AccessKeys(self.api_key, self.admin_api_key, self.cluster_secret)

    @property
    def tls(self) -> TlsFiles:
        return TlsFiles(certfile=self.ssl_certfile, keyfile=self.ssl_keyfile, ca_certs=self.ssl_ca_certs)

    def check(self) -> None:
        self.tls.check()


@dataclass(frozen=True, kw_only=True)
class Compute(Settings):
    """the engine"""

    roles: ClassVar = _NODES

    load_format: Literal["auto", "safetensors", "dummy"] = flag("auto",
        "of the weights; dummy: random ones, to measure speed without a checkpoint's")
    device: str = flag("auto",
        "where the model is computed: cpu, cuda or cuda:N; auto: the CPU", fault=_device_fault)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto",
        "of weights and KV cache; auto: the checkpoint's, or float32 where the processor lacks it",
        spellings=(("half", "float16"), ("float", "float32")))
    deterministic: bool = flag(False,
        "answers have the same bits in any batch, chunk or hand-off (in float32)",
        "--enable-deterministic-inference")
    chunked_prefill_size: int = flag(2048,
        "prompt tokens computed in one step", "--max-num-batched-tokens", fault=within(1), takes_suffix=True,
        live_on=_PREFILL)
    max_running_requests: int = flag(64, "sequences in a batch", "--max-num-seqs", fault=within(1))
    tensor_parallel_size: int = flag(1,
        "ranks, each a process, that the model is split over; both sides may differ", "--tp-size", "--tp",
        "-tp", fault=within(1))
    # A node started by hand does not know its neighbours; one prefill and one decode is the usual pair.
    num_threads: int = flag_found_at_start(lambda: max(1, usable_cores() // 2),
        "threads of the engine, all ranks together (default: cores / nodes that `up` starts; by hand half "
        "of the cores)", fault=_threads_fault)
    enable_return_hidden_states: bool = flag(False,
        "answer requests for hidden states, which may be far larger than their text")

    @property
    def rank_threads(self) -> int:
        """Of each rank's engine."""
        return max(1, self.num_threads // self.tensor_parallel_size)

    def check(self) -> None:
        if self.deterministic and self.dtype != "float32":
            mend = "leave --dtype out, or give float32"
            raise StartupError(f"--deterministic computes in float32, not in {self.dtype}; {mend}")


@dataclass(frozen=True, kw_only=True)
class KVCache(Settings):
    """the KV cache"""

    roles: ClassVar = _NODES

    page_size: int = flag(16, "tokens in a KV page", "--block-size", fault=within(1))
    kv_cache_gb: float | None = flag(None,
        "KV pool, GiB (default: a quarter of free memory, at least 1 x max-model-len where half of it can "
        "hold that beside the weights, at most 32 x)", fault=above_0)
    disable_prefix_cache: bool = flag(False,
        "compute every prompt token", "--no-enable-prefix-caching", "--disable-radix-cache")


@dataclass(frozen=True, kw_only=True)
class Transfer(Settings):
    """how KV pages travel"""

    roles: ClassVar = _NODES

    transfer_backend: Literal["mooncake", "nixl", "shm"] = flag("mooncake",
        "how KV pages travel", "--disaggregation-transfer-backend")
    transport: Literal["tcp", "rdma"] = flag("tcp", "the wire of mooncake and nixl")
    ib_device: str = flag("",
        "RDMA devices that may be used, comma separated (default: all)", "--disaggregation-ib-device")

    def check(self) -> None:
        if self.ib_device and self.transport != "rdma":
            raise StartupError(
                f"--ib-device {self.ib_device}: --transport {self.transport} uses no RDMA device; "
                "give --transport rdma, or leave --ib-device out"
            )
        if self.transport == "rdma" and self.transfer_backend == "shm":
            raise StartupError(
                "--transport rdma: --transfer-backend shm has no wire; give mooncake or nixl, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class Membership(Settings):
    """a node's place in the cluster"""

    roles: ClassVar = _NODES

    router: tuple[str, ...] = flag((), "URL of a router to register with; repeatable", fault=_url_fault)
    advertise_host: str = flag("",
        "address that peers reach this node by (default: --host, or this host's own)", fault=_peer_host_fault)


@dataclass(frozen=True, kw_only=True)
class Prefill(Settings):
    """prefill nodes"""

    roles: ClassVar = _PREFILL

    max_queued_prefills: int = flag(32,
        "prompts waiting here before new ones are sent back as Busy", fault=within(1), live_on=_PREFILL)
    disable_transfer_overlap: bool = flag(False,
        "send a prompt's pages only after its last chunk, to measure what overlap is worth")
    faulty: str = flag("",
        "share of writes that go wrong on purpose, such as fail=0.05,late=0.1,seed=7 (tests)")


@dataclass(frozen=True, kw_only=True)
class Decode(Settings):
    """decode nodes"""

    roles: ClassVar = _DECODE

    colocated: bool = flag(False, "prefill locally; no prefill node is needed")
    local_prefill_threshold: int | None = flag(None,
        "prompts of which at most N tokens are missing here are prefilled here; 0: none, unless no prefill "
        "node is alive (default: those of which part is cached here, when it is cheaper)", fault=within(0),
        live_on=_DECODE)
    local_prefill_chunk_size: int | None = flag(None,
        "prompt tokens computed beside running streams in one step (default: as many as lengthen it by "
        "half, measured; with --colocated chunked-prefill-size)", fault=within(1))
    schedule_conservativeness: float = flag(1.0,
        "how much growth admission counts with: less runs more at once and retracts more often, 11 or more "
        "retracts never", fault=above_0, live_on=_DECODE)
    session_cache_fraction: float = flag(0.5,
        "of the KV pool, that open sessions may keep from being evicted before all else", fault=within(0, 1))
    verify_pages: VerifyPages = flag("off",
        "compare digests of pages that were handed off with those of what was sent")
    poison_reserved_pages: bool = flag(False,
        "fill pages with NaN when they are reserved, so that a missing write shows (tests)")
    crash_after_outputs: int = flag(0,
        "end by SIGKILL once N outputs were sent; 0: never (tests)", fault=within(0))


@dataclass(frozen=True, kw_only=True)
class Routing(Settings):
    """the router"""

    roles: ClassVar = _ROUTER

    chat_template: str = flag("", "Jinja file, or the template itself (default: the model's)", metavar="FILE")
    prefill: tuple[str, ...] = flag((),
        "URL of a prefill node; repeatable (nodes may also register themselves)", fault=_url_fault)
    decode: tuple[str, ...] = flag((), "URL of a decode node; repeatable", fault=_url_fault)
    max_attempts: int = flag(3,
        "times a request is tried without a token in between, in mid-stream too", fault=within(1))
    request_timeout: float = flag(600.0, "seconds", fault=above_0)
    max_queued_requests: int = flag(1024, "requests waiting before new ones get 429", fault=within(1))
    max_queue_wait: float = flag(5.0,
        "seconds that a new request may be expected to wait, by the rate of late, before it gets 429; 0: "
        "any time", fault=within(0))
    stream_interval: int = flag(1, "tokens in an event of a stream, behind the first", fault=within(1))
    force_stream_interval: int = flag(16,
        "tokens that decode nodes send at once of answers that are not streamed", fault=within(1))
    seed: int | None = flag(None,
        "seeds of requests that bring none are drawn from it, in the order in which they come (default: "
        "from the system's randomness)", "--random-seed")
    max_sessions: int = flag(1024, "sessions open before new ones get 429", fault=within(1))
    session_timeout: float = flag(600.0,
        "seconds that a session may be idle, unless it says otherwise, before it is closed", fault=above_0)


@dataclass(frozen=True, kw_only=True)
class PublicHttp(Settings):
    """the router's HTTP"""

    roles: ClassVar = _ROUTER

    uds: str = flag("", "path of a Unix socket to listen on as well: nodes still come by --host and --port")
    root_path: str = flag("",
        "path under which a proxy in front shows this server, such as /llm", fault=_root_path_fault)
    allowed_origins: tuple[str, ...] = flag((),
        "origins of web pages that may ask, such as https://app.example, or * for any; repeatable, or a "
        "JSON list", fault=_origin_fault, takes_json_list=True)
    drain_timeout: float = flag(60.0,
        "seconds that running requests get after SIGTERM", "--shutdown-timeout", fault=above_0)
    strict_fields: bool = flag(False,
        "refuse requests with unknown fields (default: ignore these and say so once a name)")
    allow_pickled_tensors: bool = flag(False,
        "take SGLang's JSON of /update_weights_from_tensor where it holds plain CPU tensors; nothing in it "
        "is run")
    otlp_traces_endpoint: str = flag("",
        "URL that traces are sent to by OTLP/HTTP, such as http://host:4318/v1/traces")
    log_requests: bool = flag(False,
        "a line in the log when a request comes and when it ends", "--enable-log-requests")
    log_requests_level: int = flag(2,
        "0: sizes, 1: sampling too, 2: the first token ids too, 3: all of them", fault=within(0, 3))


@dataclass(frozen=True, kw_only=True)
class Up(Settings):
    """what `up` starts"""

    roles: ClassVar = frozenset({"up"})

    num_prefill: int = flag(1, "prefill nodes to start", fault=within(0))
    num_decode: int = flag(1, "decode nodes to start", fault=within(1))
    nodes_nice: int = flag(5,
        "how far nodes step back behind the router, and all else here, for a core",
        fault=within(0, _MAX_NICE))


@dataclass(frozen=True, kw_only=True)
class Process(Settings):
    """logs and metrics"""

    roles: ClassVar = _ALL

    metrics_compat: MetricsCompat = flag("none", "another server's names that /metrics has beside its own")
    time_scale: float = flag(1.0,
        "how long what processes wait for one another takes, to what it should (tests), see Timing",
        fault=within(MIN_TIME_SCALE, MAX_TIME_SCALE), is_hidden=True)
    log_level: LogLevel = flag("info", "of messages shown")
    log_format: LogFormat = flag("text", "of the log")
    foreign_flags: tuple[str, ...] = ()  # given, and without effect here

    @property
    def timing(self) -> Timing:
        return UNSCALED.scaled(self.time_scale)


# fmt: on
# ---- what a process is told -------------------------------------------------------------------------

_OWNERS: tuple[type[Settings], ...] = (  # in the order of a help
    Model, Http, Access, Compute, KVCache, Transfer, Membership, Prefill, Decode,
    Routing, PublicHttp, Up, Process,
)  # fmt: skip
FLAGS: tuple[Flag, ...] = tuple(each for owner in _OWNERS for each in flags_of(owner))
# That may be changed while a node runs, by their fields' names.
LIVE_FLAGS: Mapping[str, Flag] = {each.field: each for each in FLAGS if each.live_on}
# Neither shown to clients nor handed to children by command lines, which `ps` shows.
SECRET_FIELDS = frozenset(each.field for each in FLAGS if each.is_secret) | {"cluster_secret"}


class _Checked:
    def __post_init__(self) -> None:
        """Raises StartupError where settings of an owner contradict one another."""
        for owner in _OWNERS:
            if isinstance(self, owner):
                owner.check(self)


@dataclass(frozen=True, kw_only=True)
class RouterConfig(_Checked, Model, Http, Access, Routing, PublicHttp, Process):
    """Of a router."""


@dataclass(frozen=True, kw_only=True)
class NodeConfig(
    _Checked, Model, Http, Access, Compute, KVCache, Transfer, Membership, Prefill, Decode, Process
):
    """Of a prefill or decode node. What the other role alone takes has its default."""

    role: NodeRole

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, host in (("--host", self.host), ("--advertise-host", self.advertise_host)):
            if ":" in host:
                raise StartupError(f"{name} {host}: nodes take IPv4 addresses or names")


@dataclass(frozen=True, kw_only=True)
class UpConfig(Up):
    """Of `up` itself; what it starts has its own."""
