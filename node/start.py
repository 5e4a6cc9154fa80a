"""What both binaries do at start: model, KV pool in memory that peers can write, engine, sockets.

A node is two processes: this one, whose loop is the scheduler, and its HTTP front, which it starts and ends.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import zmq

from ..components.metrics_reporter import MetricsReporter
from ..engine.device import create_runtime
from ..engine.engine_thread import EngineThread
from ..engine.forward_batch import ForwardBatch
from ..engine.job_thread import JobThread
from ..engine.kv_pool import TORCH_DTYPES, KVPool
from ..engine.model_runner import ModelRunner
from ..engine.model_weights import tensor_shapes
from ..engine.operators import EAGER, deterministic, survey_with_threads
from ..engine.schedule_batch import ScheduleBatch
from ..engine.step_profiler import StepProfiler
from ..engine.tensor_parallel import Shard, check_divides
from ..messages.kv_layout import KVLayout
from ..messages.link_guard import LinkKeys
from ..messages.node import ModelInfo, NodeEntry, RankInfo
from ..messages.peer import PROTOCOL_VERSION, PeerIdentity
from ..messages.ranks import RankStart
from ..messages.weights import TransferKind
from ..models.config import ModelConfig, kv_layout, read_vocabulary_digest, resolve_dtype
from ..models.paths import ModelPaths
from ..ranks.group import RankGroup
from ..ranks.memory import RankMemory
from ..runtime.config import NodeConfig
from ..runtime.errors import StartupError
from ..runtime.listen import http_url, resolves
from ..runtime.process import (
    available_memory_bytes,
    routable_host,
    spawn,
)
from ..runtime.waiting import Waiter
from ..transfer.backends import create_backend
from ..transfer.backends.base import Mover, TransferBackend
from ..weights.images import ImageReplies
from ..weights.inbox import Inboxes
from ..weights.loaded import LoadedModel, dummy_model, load_model
from ..weights.outbox import WeightOutbox
from ..weights.peer import WeightPuller
from .control import JobEnd
from .front_process import FrontProcess
from .loop_times import LoopTimes
from .profiler import NodeProfiler
from .served_model import ServedModel
from .status import NodeStatus

_log = logging.getLogger(__name__)

INITIAL_WEIGHT_VERSION = "default"  # as SGLang calls it
_SHARE_OF_FREE_MEMORY = 0.25
_MOST_OF_FREE_MEMORY = 0.5  # beside the weights, for a pool of one context; `up` starts two nodes
_DEFAULT_POOL_CONTEXTS = 32  # contexts of max_model_len that a default pool holds at most
_SWITCH_INTERVAL_S = 0.001  # for which a job may keep the interpreter's lock from the loop; Python's is 5 ms


@dataclass(slots=True)
class Node:
    """The parts that a prefill and a decode scheduler have in common."""

    config: NodeConfig
    served: ServedModel
    max_model_len: int
    layout: KVLayout  # of all heads
    num_pages: int
    memory: memoryview  # of the pool
    pool: KVPool
    engine: EngineThread[JobEnd]
    jobs: JobThread[JobEnd]
    image_jobs: JobThread[ImageReplies]  # of weights that others read: `jobs` may wait for another node's
    profiler: NodeProfiler
    backend: TransferBackend
    ranks: RankGroup | None  # the further ones; None: this one is alone
    status: NodeStatus
    metrics: MetricsReporter
    puller: WeightPuller
    outbox: WeightOutbox
    waiter: Waiter
    front: FrontProcess
    unix_minus_monotonic_s: float
    loop_times: LoopTimes = field(default_factory=LoopTimes)
    num_steps: int = 0

    def build(self, batch: ScheduleBatch) -> ForwardBatch:
        self.num_steps += 1
        return ForwardBatch.build(
            batch, step=self.num_steps, config=self.served.model.config, layout=self.layout
        )

    @property
    def movers(self) -> tuple[Mover, ...]:
        """Of each rank."""
        return (self.backend,) if self.ranks is None else (self.backend, *self.ranks.movers)

    def copy_page(self, source: int, dest: int) -> None:
        self.pool.copy_pages([source], [dest])
        if self.ranks is not None:
            self.ranks.copy_pages([source], [dest])

    def poison(self, pages: Sequence[int]) -> None:
        self.pool.poison(pages)
        if self.ranks is not None:
            self.ranks.poison(pages)

    def close(self) -> None:
        self.front.close()
        self.engine.close()
        self.jobs.close()
        self.image_jobs.close()
        if self.ranks is not None:
            self.ranks.close()
        self.outbox.close()
        self.puller.close()
        self.backend.close()


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
    incarnation = incarnation or uuid.uuid4().hex
    paths = ModelPaths.given(config.model, config.tokenizer, config.generation_config)
    model_config = paths.read_config()
    runtime = create_runtime(config.device)
    if not runtime.is_host:
        mend = "leave it out to compute on the CPU"
        raise StartupError(
            f"--device {config.device}: KV pages travel from and to the host's memory only; {mend}"
        )
    dtype = resolve_dtype(config.dtype, model_config, runtime.dtypes)
    layout = kv_layout(model_config, config.page_size, dtype)
    size = config.tensor_parallel_size
    check_divides(model_config, size)
    shard = Shard(0, size)
    max_model_len = _max_model_len(config, model_config)
    host = config.advertise_host or routable_host(config.host)
    if not resolves(host):
        _log.warning(
            "--advertise-host %s does not resolve on this host; peers must know it to reach this node",
            host,
        )

    trace_name = f"{config.role}-{incarnation[:8]}"
    zmq_address = f"tcp://{host}:{server_port}"
    url = http_url(host, listener, config.tls.scheme)
    with contextlib.ExitStack() as undo:
        # Early, so that it imports its modules while the model is read.
        front = FrontProcess(
            partial(_start_front, config, listener, zmq_address, url), pause_s=config.timing.front_restart_s
        )
        undo.callback(front.close)

        num_pages = _num_pages(config, model_config, layout, max_model_len)
        ranks = None
        if size > 1:
            ranks = _start_ranks(config, paths.model, dtype, num_pages, host, trace_name)
            undo.callback(ranks.close)
        make_backend = partial(
            create_backend,
            config.transfer_backend,
            _transport(config),
            host,
            config.ib_device,
            config.faulty,
            config.timing,
        )
        backend = make_backend()
        undo.callback(backend.close)
        memory = backend.allocate(num_pages * layout.of_rank(size).stride_bytes)
        pool = KVPool(layout.of_rank(size), num_pages, runtime.device, memory=memory)
        rank_memory = RankMemory(backend, backend.register())
        load = dummy_model if config.load_format == "dummy" else load_model
        model = load(paths.model, model_config, dtype, runtime, shard)
        collective = None
        if ranks is not None:
            ranks.wait_ready()
            collective = ranks.join()
        rank_config = shard.config(model.config)
        operators, arithmetic = EAGER, ""
        if config.deterministic:
            found = survey_with_threads(rank_config, model.weights, config.rank_threads)
            operators, arithmetic = deterministic(found), found.arithmetic
            heights = ", ".join(map(str, found.heights))
            _log.info("deterministic: arithmetic %s, row tiles of %s", arithmetic, heights)
        runner = ModelRunner(
            rank_config, model.weights, pool, runtime, operators=operators, collective=collective
        )
        own_profiler = StepProfiler(trace_name)
        share = None if ranks is None else ranks.forward
        engine = EngineThread[JobEnd](runner, config.rank_threads, share=share, profiler=own_profiler)
        jobs, image_jobs = JobThread[JobEnd](), JobThread[ImageReplies]("image jobs")
        undo.pop_all()  # nothing below fails

    sys.setswitchinterval(_SWITCH_INTERVAL_S)

    identity = PeerIdentity(
        incarnation=incarnation,
        protocol_version=PROTOCOL_VERSION,
        model_fingerprint=model.fingerprint,
        weight_version=INITIAL_WEIGHT_VERSION,
        layout=layout,
        tp_size=size,
        arithmetic=arithmetic,
        verifies_pages=config.verify_pages != "off",
        backend=backend.name,
        transport=backend.transport,
    )
    entry = NodeEntry(
        url=url,
        role=config.role,
        incarnation=incarnation,
        zmq_address=zmq_address,
        model_name=config.served_model_name[0],
        model_fingerprint=model.fingerprint,
        weight_version=INITIAL_WEIGHT_VERSION,
        colocated=config.colocated,
        vocab_size=model.config.vocab_size,
        max_model_len=max_model_len,
        vocabulary_digest=read_vocabulary_digest(paths.tokenizer_folder),
        text_digests=paths.text_digests(),
    )
    pids = (os.getpid(), *(() if ranks is None else ranks.pids))
    regions = (rank_memory.region, *(() if ranks is None else ranks.regions))
    rank_infos = tuple(
        RankInfo(rank=rank, pid=pid, session=region.session)
        for rank, (pid, region) in enumerate(zip(pids, regions, strict=True))
    )
    model_info = _model_info(config, model, max_model_len, dtype)
    status = NodeStatus(entry, model_info, config, layout, backend.transport, rank_infos)
    metrics = MetricsReporter(config.served_model_name[0], config.role, config.metrics_compat)
    metrics.include_process()
    kind = TransferKind(backend.name, backend.transport)
    puller = WeightPuller(
        kind,
        Inboxes(make_backend),
        available_memory_bytes,
        metrics.count_pull,
        LinkKeys.of(config.cluster_secret),
        config.timing,
    )
    outbox = WeightOutbox(kind, make_backend, config.timing)
    waiter = Waiter()
    waiter.add(server)
    waiter.add(engine.fileno())
    waiter.add(jobs.fileno())
    waiter.add(image_jobs.fileno())
    waiter.add(backend.fileno())
    waiter.add(outbox.fileno())
    if config.dtype == "auto" and dtype != model_config.dtype:
        _log.info("computing in %s: this processor has no %s arithmetic", dtype, model_config.dtype)
    if ranks is not None:
        ranks.wake(waiter)
    _log.info(
        "%s of %s: %s, %d TP ranks, %d pages of %d tokens (%.2f GiB), transfer over %s/%s, %d threads",
        url,
        config.model,
        dtype,
        size,
        num_pages,
        layout.page_size,
        size * pool.nbytes / 2**30,
        backend.name,
        backend.transport,
        config.num_threads,
    )
    return Node(
        config=config,
        served=ServedModel(
            model,
            identity,
            paths=paths,
            dtype=dtype,
            runtime=runtime,
            shard=shard,
            runner=runner,
            rank_memory=rank_memory,
            ranks=ranks,
            status=status,
        ),
        max_model_len=max_model_len,
        layout=layout,
        num_pages=num_pages,
        memory=memory,
        pool=pool,
        engine=engine,
        jobs=jobs,
        image_jobs=image_jobs,
        profiler=NodeProfiler(own_profiler, ranks),
        backend=backend,
        ranks=ranks,
        status=status,
        metrics=metrics,
        puller=puller,
        outbox=outbox,
        waiter=waiter,
        front=front,
        unix_minus_monotonic_s=time.time() - time.monotonic(),
    )


def _transport(config: NodeConfig) -> str:
    return "shm" if config.transfer_backend == "shm" else config.transport


def _start_ranks(
    config: NodeConfig, path: Path, dtype: str, num_pages: int, host: str, trace_name: str
) -> RankGroup:
    def told(rank: int, rendezvous: str) -> RankStart:
        return RankStart(
            rank=rank,
            size=config.tensor_parallel_size,
            model_path=str(path),
            load_format=config.load_format,
            device=config.device,
            dtype=dtype,
            page_size=config.page_size,
            num_pages=num_pages,
            transfer_backend=config.transfer_backend,
            transport=_transport(config),
            host=host,
            ib_device=config.ib_device,
            faults=config.faulty,
            deterministic=config.deterministic,
            num_threads=config.rank_threads,
            rendezvous=rendezvous,
            join_s=config.timing.rank_join_s,
            trace_name=f"{trace_name}-rank{rank}",
        )

    arguments = ["--role", config.role, "--log-level", config.log_level, "--log-format", config.log_format]
    return RankGroup.start(arguments, told, config.tensor_parallel_size, config.timing)


def _start_front(
    config: NodeConfig, listener: socket.socket, zmq_address: str, url: str
) -> subprocess.Popen[bytes]:
    arguments = ["node-front", "--role", config.role, "--zmq-address", zmq_address]
    arguments += ["--listen-fd", str(listener.fileno()), "--url", url]
    arguments += ["--log-level", config.log_level, "--log-format", config.log_format]
    arguments += [f"--time-scale={config.time_scale}"]
    arguments += [f"--router={url}" for url in config.router]
    arguments += [f"--ssl-certfile={config.ssl_certfile}", f"--ssl-keyfile={config.ssl_keyfile}"]
    arguments += [f"--ssl-ca-certs={config.ssl_ca_certs}"]
    return spawn(arguments, pass_fds=(listener.fileno(),), keys=config.keys)


def _max_model_len(config: NodeConfig, model_config: ModelConfig) -> int:
    wanted = config.max_model_len or model_config.max_model_len
    if wanted > model_config.max_model_len:
        raise StartupError(
            f"--max-model-len {wanted}: the model was made for at most {model_config.max_model_len} tokens"
        )
    return wanted


def _num_pages(config: NodeConfig, model_config: ModelConfig, layout: KVLayout, max_model_len: int) -> int:
    """Of the KV pool, before the weights are read. By default at least a context, where half of what they
    leave can hold one."""
    context_pages = layout.pages_for(max_model_len)
    available_bytes = available_memory_bytes()
    # On all ranks, which are on this host: with more ranks than KV heads they hold copies.
    size = config.tensor_parallel_size
    stride_bytes = size * layout.of_rank(size).stride_bytes
    if config.kv_cache_gb is not None:
        num_pages = int(config.kv_cache_gb * 2**30) // stride_bytes
        if num_pages * stride_bytes > available_bytes:
            wanted, left = config.kv_cache_gb, available_bytes / 2**30
            raise StartupError(f"--kv-cache-gb {wanted}: this host has {left:.1f} GiB left")
    else:
        affordable = int(available_bytes * _SHARE_OF_FREE_MEMORY) // stride_bytes
        left_bytes = max(0, available_bytes - _weight_bytes(model_config, layout.dtype))
        most = int(left_bytes * _MOST_OF_FREE_MEMORY) // stride_bytes
        num_pages = max(affordable, min(context_pages, most))
        num_pages = min(num_pages, _DEFAULT_POOL_CONTEXTS * context_pages)
    if num_pages < 1:
        raise StartupError(f"no KV page of {stride_bytes:,} bytes fits; give more with --kv-cache-gb")
    if num_pages < context_pages:
        _log.warning(
            "the KV pool holds %d tokens, fewer than the context of %d: longer requests are refused; give "
            "--kv-cache-gb, or --max-model-len",
            num_pages * layout.page_size,
            max_model_len,
        )
    return num_pages


def _weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Of all ranks."""
    num_values = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    return num_values * TORCH_DTYPES[dtype].itemsize


def _model_info(config: NodeConfig, model: LoadedModel, max_model_len: int, dtype: str) -> ModelInfo:
    return ModelInfo(
        model_name=config.served_model_name[0],
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
