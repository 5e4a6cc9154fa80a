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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import assert_never

import msgspec
import torch
import zmq
from torch import Tensor

from ..components.metrics_reporter import MetricsReporter
from ..engine.engine_thread import EngineThread
from ..engine.forward_batch import ForwardBatch
from ..engine.job_thread import JobThread
from ..engine.kv_pool import TORCH_DTYPES, KVPool
from ..engine.model_runner import ModelRunner
from ..engine.model_weights import tensor_shapes
from ..engine.named_weights import merge_checksums, part_checksums, whole_checksum
from ..engine.operators import EAGER, deterministic, survey_with_threads
from ..engine.schedule_batch import ScheduleBatch
from ..engine.step_profiler import StepProfiler
from ..engine.tensor_parallel import Shard, check_divides
from ..engine.weight_file import require_memory
from ..messages.kv_layout import KVLayout
from ..messages.link_guard import LinkKeys
from ..messages.memory_region import MemoryRegion
from ..messages.node import ModelInfo, NodeEntry, RankInfo
from ..messages.peer import PROTOCOL_VERSION, PeerIdentity
from ..messages.ranks import RankChecked, RankStart
from ..messages.weights import MemoryTag, TransferKind
from ..models.config import ModelConfig, kv_layout, read_vocabulary_digest, resolve_dtype
from ..models.paths import ModelPaths
from ..ranks.group import RankGroup, alongside
from ..ranks.memory import RankMemory, move_together
from ..ranks.whole_tensors import gather_tensors
from ..runtime.config import NodeConfig
from ..runtime.cpu_features import native_dtypes
from ..runtime.errors import StartupError
from ..runtime.listen import http_url, resolves
from ..runtime.process import (
    available_memory_bytes,
    return_free_memory,
    routable_host,
    spawn,
)
from ..runtime.waiting import Waiter
from ..transfer.backends import create_backend
from ..transfer.backends.base import Mover, TransferBackend
from ..weights.images import WeightImage
from ..weights.inbox import Inboxes
from ..weights.loaded import LoadedModel, dummy_model, load_model, load_replacement, updated_model
from ..weights.outbox import WeightOutbox
from ..weights.peer import WeightPuller
from ..weights.saved import save_model, upload_model
from ..weights.updater import LoadFolder, LoadOrder, LoadServed, LoadTensors, Prepared, Sums, TensorHead
from .front_process import FrontProcess
from .loop_times import LoopTimes
from .memory_occupation import Announced
from .profiler import NodeProfiler
from .status import NodeStatus, announce

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
    paths: ModelPaths  # at the start
    model: LoadedModel
    max_model_len: int
    layout: KVLayout  # of all heads
    num_pages: int
    memory: memoryview  # of the pool
    pool: KVPool
    runner: ModelRunner
    engine: EngineThread
    jobs: JobThread
    image_jobs: JobThread  # of weights for others to read: `jobs` may itself wait for another node's
    profiler: NodeProfiler
    backend: TransferBackend
    rank_memory: RankMemory  # this rank's
    ranks: RankGroup | None  # the further ones; None: this one is alone
    identity: PeerIdentity
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
        return ForwardBatch.build(batch, step=self.num_steps, config=self.model.config, layout=self.layout)

    @property
    def shard(self) -> Shard:
        return Shard(0, self.config.tensor_parallel_size)

    @property
    def movers(self) -> tuple[Mover, ...]:
        """Of each rank."""
        return (self.backend,) if self.ranks is None else (self.backend, *self.ranks.movers)

    @property
    def regions(self) -> tuple[MemoryRegion, ...]:
        """The pool of each rank, as it was registered last."""
        return (self.rank_memory.region, *(() if self.ranks is None else self.ranks.regions))

    def copy_page(self, source: int, dest: int) -> None:
        self.pool.copy_pages([source], [dest])
        if self.ranks is not None:
            self.ranks.copy_pages([source], [dest])

    def poison(self, pages: Sequence[int]) -> None:
        self.pool.poison(pages)
        if self.ranks is not None:
            self.ranks.poison(pages)

    # ---- weights: the jobs that weights/updater.py asks for ----

    def load(self, order: LoadOrder) -> Callable[[], LoadedModel]:
        """Weights that can serve instead of the current ones, on every rank."""
        model = self.model
        others = None if self.ranks is None else self.ranks.load_shards(order)

        def own() -> LoadedModel:
            require_memory(model.weights)
            return self._load_share(order, model)

        return lambda: alongside(others, own)[0]

    def drop(self) -> None:
        if self.ranks is not None:
            self.ranks.drop_shards()

    def check(self) -> Callable[[], Sums]:
        model = self.model
        others = None if self.ranks is None else self.ranks.check_shards()

        def own() -> dict[str, int]:
            require_memory(model.weights)
            return part_checksums(model.weights, model.config, self.shard)

        def job() -> Sums:
            sums, answers = alongside(others, own)
            of_others = [answer.sums for answer in answers if isinstance(answer, RankChecked)]
            tensors = merge_checksums(
                [sums, *({name: int(x, 16) for name, x in other.items()} for other in of_others)]
            )
            return Sums(tensors, whole_checksum(tensors))

        return job

    def head(self, name: str, num_rows: int) -> Callable[[], TensorHead]:
        model = self.model
        gather = self._gather(head=(name, num_rows))

        def job() -> TensorHead:
            rows = gather()[name][:num_rows]
            shape = tensor_shapes(model.config)[name]
            return TensorHead(str(rows.dtype).removeprefix("torch."), shape, rows.float().tolist())

        return job

    def save(self, target: str, *, is_remote: bool, max_shard_bytes: int) -> Callable[[], None]:
        model = self.model
        gather = self._gather(spare_bytes=max_shard_bytes)  # a file's tensors are copied on their way out

        def job() -> None:
            if is_remote:
                upload_model(model, gather(), target, max_shard_bytes)
            else:
                save_model(model, gather(), Path(target), max_shard_bytes)

        return job

    def image(self) -> Callable[[], WeightImage]:
        """A job, for others to read the weights that serve now. It raises StartupError."""
        update_id, fingerprint, gather = self.identity.update_id, self.model.fingerprint, self._gather()
        return lambda: WeightImage(gather(), update_id, fingerprint)

    def served_update(self) -> str:
        """Its id, the same as long as the same weights serve."""
        return self.identity.update_id

    def _gather(
        self, *, spare_bytes: int = 0, head: tuple[str, int] | None = None
    ) -> Callable[[], Mapping[str, Tensor]]:
        return gather_tensors(
            self.model.weights,
            self.model.config,
            self.shard,
            self.ranks,
            available_memory_bytes,
            spare_bytes=spare_bytes,
            head=head,
        )

    def _load_share(self, order: LoadOrder, model: LoadedModel) -> LoadedModel:
        match order:
            case LoadFolder(path):
                paths = self.paths.with_model(path)
                return load_replacement(paths, model.config, self.layout.dtype, self.shard)
            case LoadTensors(file, source, fingerprint):
                return updated_model(file, model, source, self.shard, fingerprint)
            case LoadServed():
                return model
            case _:
                assert_never(order)

    def swap(self, prepared: Prepared[LoadedModel]) -> PeerIdentity:
        """Serve with these weights from the next forward on; returns the identity to shake hands with."""
        model, weight_version = prepared.checkpoint, prepared.weight_version
        self.model = model
        self.runner.swap_weights(model.weights)
        if self.ranks is not None:
            self.ranks.swap_shards()
        self.status.renew(str(model.path), model.fingerprint, weight_version, prepared.update_id)
        self.identity = msgspec.structs.replace(
            self.identity,
            model_fingerprint=model.fingerprint,
            weight_version=weight_version,
            update_id=prepared.update_id,
        )
        return self.status.shown(self.identity)

    # ---- memory, see node/memory_occupation.py ----

    def move(self, before: frozenset[MemoryTag], after: frozenset[MemoryTag]) -> Callable[[], None]:
        return move_together(self._move, self.ranks, before, after)

    def announce(self, *, is_released: bool) -> Announced:
        self.identity = announce(self.status, self.identity, is_released=is_released)
        self.status.set_regions(self.regions)
        return Announced(self.status.shown(self.identity), self.regions)

    def _move(self, released: frozenset[MemoryTag]) -> None:
        """Nothing runs, so nobody reads the weights."""
        weights = self.rank_memory.move(released, self.model.weights)
        self.model = replace(self.model, weights=weights)
        self.runner.swap_weights(weights)
        del weights
        return_free_memory()

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
    dtype = resolve_dtype(config.dtype, model_config, native_dtypes())
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
        pool = KVPool(layout.of_rank(size), num_pages, torch.device("cpu"), memory=memory)
        rank_memory = RankMemory(backend, backend.register())
        load = dummy_model if config.load_format == "dummy" else load_model
        model = load(paths.model, model_config, dtype, shard)
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
            rank_config, model.weights, pool, torch.device("cpu"), operators=operators, collective=collective
        )
        own_profiler = StepProfiler(trace_name)
        share = None if ranks is None else ranks.forward
        engine = EngineThread(runner, config.rank_threads, share=share, profiler=own_profiler)
        jobs, image_jobs = JobThread(), JobThread("image jobs")
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
        paths=paths,
        model=model,
        max_model_len=max_model_len,
        layout=layout,
        num_pages=num_pages,
        memory=memory,
        pool=pool,
        runner=runner,
        engine=engine,
        jobs=jobs,
        image_jobs=image_jobs,
        profiler=NodeProfiler(own_profiler, ranks),
        backend=backend,
        rank_memory=rank_memory,
        ranks=ranks,
        identity=identity,
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
