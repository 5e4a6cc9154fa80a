"""Builds what answers the control calls of a node from the node's parts."""

from __future__ import annotations

from collections.abc import Callable

from ..components.flush_wrapper import FlushWrapper
from ..engine.gpu_memory import read_gpu_memory
from ..engine.update_group import join_update_group
from ..runtime.process import available_memory_bytes
from ..weights.gpu import GpuWeights
from ..weights.images import WeightImages
from ..weights.loaded import LoadedModel
from ..weights.update_groups import UpdateGroups
from ..weights.updater import WeightUpdater
from .control import NodeControl
from .live_settings import LiveSettings
from .memory_occupation import MemoryOccupation
from .operations import NodeOperations
from .start import Node


def make_control(
    node: Node, settings: LiveSettings, drop_cache: Callable[[], bool]
) -> NodeControl[LoadedModel]:
    """`settings`: what may be changed while the node runs. `drop_cache`: see NodeControl."""
    return NodeControl(
        status=node.status,
        flush=FlushWrapper(),
        weights=WeightUpdater(
            node.served,
            node.jobs.submit,
            lambda: node.status.weight_version,
            available_memory_bytes,
            UpdateGroups(join_update_group, available_memory_bytes),
            GpuWeights(read_gpu_memory, available_memory_bytes).stage,
            node.puller.pull,
        ),
        images=WeightImages(
            node.served.image,
            node.served.served_update,
            node.image_jobs,
            idle_s=node.config.timing.weight_image_idle_s,
        ),
        outbox=node.outbox,
        memory=MemoryOccupation(node.served, node.jobs.submit),
        operations=NodeOperations(
            settings=settings,
            engine=node.engine,
            profiler=node.profiler,
            loop_times=node.loop_times,
            ranks=node.ranks,
        ),
        metrics=node.metrics,
        drop_cache=drop_cache,
    )
