"""Everything of one engine, from a checkpoint's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..messages.kv_layout import KVLayout
from .engine_thread import EngineThread
from .kv_pool import TORCH_DTYPES, KVPool
from .model_config import ModelConfig, kv_layout, resolve_dtype
from .model_runner import ModelRunner
from .weights import Weights, load_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    config: ModelConfig
    layout: KVLayout
    pool: KVPool
    runner: ModelRunner
    thread: EngineThread


def load_engine(
    model_dir: Path,
    *,
    num_pages: int,
    num_threads: int,
    page_size: int = 16,
    dtype: str = "auto",
    device: str = "cpu",
    page_stride_bytes: int = 0,
    memory: torch.Tensor | memoryview | None = None,
) -> Engine:
    """Read the checkpoint and start the engine thread. `memory` is for the pool: see `KVPool`."""
    config = ModelConfig.from_dir(model_dir)
    resolved = resolve_dtype(dtype, config)
    layout = kv_layout(config, page_size, resolved, page_stride_bytes)
    target = torch.device(device)
    weights: Weights = load_weights(model_dir, config, TORCH_DTYPES[resolved], target)
    pool = KVPool(layout, num_pages, target, memory=memory)
    runner = ModelRunner(config, weights, pool, target)
    return Engine(
        config=config, layout=layout, pool=pool, runner=runner, thread=EngineThread(runner, num_threads)
    )
