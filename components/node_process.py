"""What both binaries do at start: model, KV pool in memory that peers can write, engine, sockets.

A node is two processes: this one, whose loop is the scheduler, and its HTTP front, which it starts and ends.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import zmq

from ..engine.engine_thread import EngineThread
from ..engine.forward_batch import ForwardBatch
from ..engine.kv_pool import TORCH_DTYPES, KVPool
from ..engine.model_config import ModelConfig, kv_layout, resolve_dtype
from ..engine.model_runner import ModelRunner
from ..engine.operators import EAGER, Operators, Survey, deterministic, survey
from ..engine.schedule_batch import ScheduleBatch
from ..engine.weights import Weights, load_weights, weights_digest
from ..messages.kv_layout import KVLayout
from ..messages.node import ModelInfo, NodeEntry
from ..messages.peer import PROTOCOL_VERSION, MemoryRegion, PeerIdentity
from ..runtime.config import NodeConfig
from ..runtime.cpu_features import native_dtypes
from ..runtime.errors import StartupError
from ..runtime.listen import http_url
from ..runtime.process import available_memory_bytes, end, routable_host, spawn
from ..runtime.waiting import Waiter
from ..transfer.backends import create_backend
from ..transfer.backends.base import TransferBackend
from ..transfer.backends.faulty import FaultPlan, FaultyBackend
from .metrics_reporter import MetricsReporter
from .node_status import NodeStatus

_log = logging.getLogger(__name__)

INITIAL_WEIGHT_VERSION = "default"  # as SGLang calls it
_SHARE_OF_FREE_MEMORY = 0.25
_DEFAULT_POOL_CONTEXTS = 32  # contexts of max_model_len that a default pool holds at most
_LONGEST_SLEEP_S = 0.5  # a front that has ended is noticed this late at worst
_DRAIN_S = 10.0


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights that could serve, and the config they were checked against."""

    path: Path
    config: ModelConfig
    weights: Weights
    fingerprint: str


@dataclass(slots=True)
class Node:
    """The parts that a prefill and a decode scheduler have in common."""

    config: NodeConfig
    model: LoadedModel
    max_model_len: int
    layout: KVLayout
    num_pages: int
    memory: memoryview  # of the pool
    pool: KVPool
    runner: ModelRunner
    engine: EngineThread
    backend: TransferBackend
    region: MemoryRegion
    identity: PeerIdentity
    status: NodeStatus
    metrics: MetricsReporter
    waiter: Waiter
    front: subprocess.Popen[bytes]
    unix_minus_monotonic_s: float
    num_steps: int = 0

    def build(self, batch: ScheduleBatch) -> ForwardBatch:
        self.num_steps += 1
        return ForwardBatch.build(batch, step=self.num_steps, config=self.model.config, layout=self.layout)

    def load_replacement(self, path: Path) -> LoadedModel:
        """A checkpoint that can serve instead of the current one. StartupError says why it cannot."""
        return load_replacement(path, self.model.config, self.layout.dtype)

    def swap(self, model: LoadedModel, weight_version: str) -> PeerIdentity:
        """Serve with these weights from the next forward on; returns the identity to shake hands with."""
        self.model = model
        self.runner.swap_weights(model.weights)
        self.status.renew(str(model.path), model.fingerprint, weight_version)
        self.identity = _identity(
            model.fingerprint,
            weight_version,
            self.identity.incarnation,
            self.layout,
            self.backend,
            self.identity.arithmetic,
        )
        return self.identity

    def close(self) -> None:
        end(self.front, grace_s=5.0)
        self.engine.close()
        self.backend.close()


class Scheduler(Protocol):
    """What `run` needs of a scheduler."""

    is_draining: bool

    def step(self, now: float) -> None: ...

    def next_deadline(self) -> float: ...

    @property
    def is_idle(self) -> bool: ...


def load_replacement(path: Path, current: ModelConfig, dtype: str) -> LoadedModel:
    """Reads a checkpoint that can be swapped in for a model of this config. Raises StartupError."""
    config = ModelConfig.from_dir(path)
    # Before any tensor is read: another model may be larger than the memory that is left.
    if (difference := _difference(current, config)) is not None:
        raise StartupError(f"{path} cannot replace the model that is served: {difference}")
    return load_model(path, config, dtype)


def load_model(path: Path, config: ModelConfig, dtype: str) -> LoadedModel:
    """Reads a checkpoint of this config; `dtype` is a key of TORCH_DTYPES. Raises StartupError."""
    try:
        weights = load_weights(path, config, TORCH_DTYPES[dtype], torch.device("cpu"))
    except RuntimeError as error:  # how torch reports that memory is out; the old weights can serve on
        raise StartupError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    return LoadedModel(path, config, weights, weights_digest(path, config))


def start_node(
    config: NodeConfig,
    listener: socket.socket,
    server: zmq.Socket[bytes],
    server_port: int,
    incarnation: str = "",
) -> Node:
    """Everything but the scheduler itself, which reads `server`, the node's bound zmq socket.

    `incarnation` is what the supervisor calls this start of the node; without one it takes a name itself.
    Raises StartupError with one line that says what to mend.
    """
    path = Path(config.model).expanduser()
    if not path.is_dir():
        raise StartupError(f"no model at {config.model}: a folder in Hugging Face format is expected")
    model_config = ModelConfig.from_dir(path)
    dtype = resolve_dtype(config.dtype, model_config, native_dtypes())
    layout = kv_layout(model_config, config.page_size, dtype)
    max_model_len = _max_model_len(config, model_config)
    host = config.advertise_host or routable_host(config.host)

    zmq_address = f"tcp://{host}:{server_port}"
    url = http_url(host, listener)
    with contextlib.ExitStack() as undo:
        # Early, so that it imports its modules while the model is read.
        front = _start_front(config, listener, zmq_address, url)
        undo.callback(end, front, grace_s=5.0)

        backend: TransferBackend = create_backend(
            config.transfer_backend,
            "shm" if config.transfer_backend == "shm" else config.transport,
            host,
            config.ib_device,
        )
        if config.faulty:
            backend = FaultyBackend(backend, FaultPlan.parse(config.faulty))
        undo.callback(backend.close)
        num_pages = _num_pages(config, layout, max_model_len)
        memory = backend.allocate(num_pages * layout.stride_bytes)
        pool = KVPool(layout, num_pages, torch.device("cpu"), memory=memory)
        region = backend.register()
        model = load_model(path, model_config, dtype)
        operators, arithmetic = _operators(config, model)
        runner = ModelRunner(model.config, model.weights, pool, torch.device("cpu"), operators)
        engine = EngineThread(runner, config.num_threads)
        undo.pop_all()  # nothing below fails

    incarnation = incarnation or uuid.uuid4().hex
    identity = _identity(model.fingerprint, INITIAL_WEIGHT_VERSION, incarnation, layout, backend, arithmetic)
    entry = NodeEntry(
        url=url,
        role=config.role,
        incarnation=incarnation,
        zmq_address=zmq_address,
        model_name=config.served_model_name,
        model_fingerprint=model.fingerprint,
        weight_version=INITIAL_WEIGHT_VERSION,
        colocated=config.colocated,
    )
    status = NodeStatus(
        entry, _model_info(config, model, max_model_len, dtype), config, layout, backend.transport
    )
    waiter = Waiter()
    waiter.add(server)
    waiter.add(engine.fileno())
    waiter.add(backend.fileno())
    if config.dtype == "auto" and dtype != model_config.dtype:
        _log.info("computing in %s: this processor has no %s arithmetic", dtype, model_config.dtype)
    _log.info(
        "%s of %s: %s, %d pages of %d tokens (%.2f GiB), transfer over %s/%s, %d threads",
        url,
        config.model,
        dtype,
        num_pages,
        layout.page_size,
        pool.nbytes / 2**30,
        backend.name,
        backend.transport,
        config.num_threads,
    )
    return Node(
        config=config,
        model=model,
        max_model_len=max_model_len,
        layout=layout,
        num_pages=num_pages,
        memory=memory,
        pool=pool,
        runner=runner,
        engine=engine,
        backend=backend,
        region=region,
        identity=identity,
        status=status,
        metrics=MetricsReporter(config.served_model_name, config.role),
        waiter=waiter,
        front=front,
        unix_minus_monotonic_s=time.time() - time.monotonic(),
    )


def run(node: Node, scheduler: Scheduler, fail_open_requests: Callable[[], None]) -> int:
    """The loop, until SIGTERM or SIGINT; then what runs may end, and what is left fails retriably.

    A second signal ends it at once. Returns the process's exit code.
    """
    threading.excepthook = _end_process
    num_signals = 0
    signalled = os.eventfd(0, os.EFD_NONBLOCK)
    node.waiter.add(signalled)

    def on_signal(number: int, frame: object) -> None:
        nonlocal num_signals
        del number, frame
        num_signals += 1
        os.eventfd_write(signalled, 1)  # ends the loop's sleep

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    drain_until = math.inf
    while True:
        now = time.monotonic()
        scheduler.step(now)
        if num_signals and not scheduler.is_draining:
            scheduler.is_draining = True
            drain_until = now + _DRAIN_S
        if num_signals > 1 or now > drain_until or (scheduler.is_draining and scheduler.is_idle):
            fail_open_requests()
            break
        if (code := node.front.poll()) is not None:
            raise RuntimeError(f"the HTTP front ended with exit code {code}")
        node.waiter.wait(min(_LONGEST_SLEEP_S, max(0.0, scheduler.next_deadline() - now)))
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(signalled)
    node.close()
    return 0


def _end_process(failure: threading.ExceptHookArgs) -> None:
    """A helper thread died of a bug: what it held would stay pending for ever, so everything ends, loudly."""
    name = failure.thread.name if failure.thread else "?"
    _log.critical(
        "thread %s failed",
        name,
        exc_info=(failure.exc_type, failure.exc_value or failure.exc_type(), failure.exc_traceback),
    )
    logging.shutdown()
    os._exit(1)


def _start_front(
    config: NodeConfig, listener: socket.socket, zmq_address: str, url: str
) -> subprocess.Popen[bytes]:
    arguments = ["node-front", "--role", config.role, "--zmq-address", zmq_address]
    arguments += ["--listen-fd", str(listener.fileno()), "--url", url]
    arguments += ["--log-level", config.log_level, "--log-format", config.log_format]
    arguments += [f"--router={url}" for url in config.router]
    return spawn(arguments, pass_fds=(listener.fileno(),), api_keys=config.api_key)


def _max_model_len(config: NodeConfig, model_config: ModelConfig) -> int:
    wanted = config.max_model_len or model_config.max_model_len
    if wanted > model_config.max_model_len:
        raise StartupError(
            f"--max-model-len {wanted}: the model was made for at most {model_config.max_model_len} tokens"
        )
    return wanted


def _num_pages(config: NodeConfig, layout: KVLayout, max_model_len: int) -> int:
    context_pages = layout.pages_for(max_model_len)
    available_bytes = available_memory_bytes()
    if config.kv_cache_gb is not None:
        num_pages = int(config.kv_cache_gb * 2**30) // layout.stride_bytes
        if num_pages * layout.stride_bytes > available_bytes:
            wanted, left = config.kv_cache_gb, available_bytes / 2**30
            raise StartupError(f"--kv-cache-gb {wanted}: this host has {left:.1f} GiB left")
    else:
        affordable = int(available_bytes * _SHARE_OF_FREE_MEMORY) // layout.stride_bytes
        num_pages = min(affordable, _DEFAULT_POOL_CONTEXTS * context_pages)
    if num_pages < 1:
        raise StartupError(f"no KV page of {layout.stride_bytes:,} bytes fits; give more with --kv-cache-gb")
    return num_pages


def _operators(config: NodeConfig, model: LoadedModel) -> tuple[Operators, str]:
    """The operators of forwards, and the arithmetic to shake hands with. Raises StartupError."""
    if not config.deterministic:
        return EAGER, ""

    def survey_with_the_engines_threads() -> Survey:
        torch.set_num_threads(config.num_threads)
        return survey(model.config, model.weights)

    with ThreadPoolExecutor(1) as pool:  # the setting belongs to the calling thread
        found = pool.submit(survey_with_the_engines_threads).result()
    heights = ", ".join(map(str, found.heights))
    _log.info("deterministic: arithmetic %s, row tiles of %s", found.arithmetic, heights)
    return deterministic(found), found.arithmetic


def _identity(
    fingerprint: str,
    weight_version: str,
    incarnation: str,
    layout: KVLayout,
    backend: TransferBackend,
    arithmetic: str,
) -> PeerIdentity:
    return PeerIdentity(
        incarnation=incarnation,
        protocol_version=PROTOCOL_VERSION,
        model_fingerprint=fingerprint,
        weight_version=weight_version,
        layout=layout,
        tp_size=1,
        arithmetic=arithmetic,
        backend=backend.name,
        transport=backend.transport,
    )


def _model_info(config: NodeConfig, model: LoadedModel, max_model_len: int, dtype: str) -> ModelInfo:
    return ModelInfo(
        model_name=config.served_model_name,
        model_path=str(model.path),
        model_type=model.config.family,
        architectures=(model.config.architecture,),
        vocab_size=model.config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=model.config.eos_token_ids,
        dtype=dtype,
        weight_version=INITIAL_WEIGHT_VERSION,
        model_fingerprint=model.fingerprint,
    )


def _difference(ours: ModelConfig, theirs: ModelConfig) -> str | None:
    """The first field in which two models differ that one engine cannot swap."""
    for name in ModelConfig.__slots__:
        if name != "dtype" and getattr(ours, name) != getattr(theirs, name):
            return f"its {name} is {getattr(theirs, name)}, not {getattr(ours, name)}"
    return None
