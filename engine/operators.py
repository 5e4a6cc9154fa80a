"""Which version of each operator a model runs with, and whether this machine keeps what the deterministic
ones need.

Deterministic operators give a row the same bits whatever stands beside it. Operations on single elements are
exactly rounded by IEEE 754; sums within a row have a fixed order (``kernels/row_sum``). Two things are up to
the libraries: the order of additions in a matrix product, which is a property of the call's shape (and of
processor and threads), and whether exp and log depend on where an element stands. Both are tested here on the
model's own shapes, at start-up, with the threads that forwards will use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ..kernels.linear import BASE_HEIGHT, HEIGHTS, linear, row_tiled_linear
from ..kernels.paged_attention import (
    AttentionPlan,
    deterministic_paged_attention,
    paged_attention,
)
from ..kernels.paged_attention.deterministic import BLOCK, ROWS, attend
from ..kernels.rms_norm import deterministic_rms_norm, rms_norm
from ..kernels.rotary import deterministic_rotary_, rotary_
from ..kernels.silu_and_mul import deterministic_silu_and_mul, silu_and_mul
from ..models.config import ModelConfig
from ..runtime.errors import StartupError
from .model_weights import Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Operators:
    """Signatures are those of ``kernels/``."""

    name: str
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotary_: Callable[[Tensor, Tensor, Tensor], None]
    silu_and_mul: Callable[[Tensor], Tensor]
    paged_attention: Callable[[Tensor, Tensor, AttentionPlan, float], Tensor]


EAGER = Operators(
    name="eager",
    linear=linear,
    rms_norm=rms_norm,
    rotary_=rotary_,
    silu_and_mul=silu_and_mul,
    paged_attention=paged_attention,
)


@dataclass(frozen=True, slots=True)
class Survey:
    """What a machine's libraries keep, on the shapes of one model."""

    heights: tuple[int, ...]  # of tiles that give a row the bits that BASE_HEIGHT gives it, ascending
    rows: tuple[int, ...]  # decode rows that attention may take in one call, descending
    arithmetic: str  # digest of what came out: equal on two nodes if their bits are


def deterministic(survey: Survey) -> Operators:
    return Operators(
        name="deterministic",
        linear=partial(row_tiled_linear, heights=survey.heights),
        rms_norm=deterministic_rms_norm,
        rotary_=deterministic_rotary_,
        silu_and_mul=deterministic_silu_and_mul,
        paged_attention=partial(deterministic_paged_attention, heights=survey.heights, rows=survey.rows),
    )


@torch.inference_mode()
def survey(config: ModelConfig, weights: Weights) -> Survey:
    """Computes on numbers of its own in the shapes of `config` and `weights`, with the calling thread's torch
    threads. An order of additions does not depend on the numbers added, so what holds here holds for all.

    Raises StartupError where even one call shape gives a row different bits at different places.
    """
    heights, digest = set(HEIGHTS), hashlib.blake2b(digest_size=8)
    for compute, inputs in (*_products(weights), _attention(config)):
        found, base = _agreeing_heights(compute, inputs)
        heights &= found
        digest.update(base.numpy().tobytes())
    for name, function in (("exp", torch.exp), ("log", torch.log)):
        digest.update(_same_in_every_place(name, function).numpy().tobytes())
    kept = tuple(sorted(heights))
    return Survey(kept, _agreeing_rows(config, kept), digest.hexdigest())


def survey_with_threads(config: ModelConfig, weights: Weights, num_threads: int) -> Survey:
    """`survey` with so many torch threads, as forwards will have."""

    def run() -> Survey:
        torch.set_num_threads(num_threads)
        return survey(config, weights)

    with ThreadPoolExecutor(1) as pool:  # the setting belongs to the calling thread
        return pool.submit(run).result()


_Compute: TypeAlias = Callable[[Tensor, tuple[int, ...]], Tensor]


def _products(weights: Weights) -> Iterator[tuple[_Compute, Tensor]]:
    layer = weights.layers[0]
    for num_out, num_in in sorted(
        {tuple(weight.shape) for weight in (layer.qkv, layer.o, layer.gate_up, layer.down, weights.lm_head)}
    ):
        weight = _numbers(num_out, num_in)
        yield partial(_product, weight), _numbers(max(HEIGHTS), num_in)


def _product(weight: Tensor, x: Tensor, heights: tuple[int, ...]) -> Tensor:
    return row_tiled_linear(x, weight, None, heights)


def _attention(config: ModelConfig) -> tuple[_Compute, Tensor]:
    """Every row looks at the same positions here; rows that do not are what the property tests are about."""
    keys, values = (_numbers(config.num_kv_heads, 2 * BLOCK, config.head_dim) for _ in range(2))

    def compute(rows: Tensor, heights: tuple[int, ...]) -> Tensor:
        q = rows.view(-1, config.num_kv_heads, config.head_dim).transpose(0, 1)
        ends = torch.full((q.shape[0], 1), 2 * BLOCK - 3)
        return attend(q, keys, values, ends, heights).transpose(0, 1).flatten(1)

    return compute, _numbers(max(HEIGHTS), config.num_kv_heads * config.head_dim)


def _agreeing_heights(compute: _Compute, rows: Tensor) -> tuple[set[int], Tensor]:
    """The heights that give rows the same bits as the base height, and the base height's result."""
    base = compute(rows, (BASE_HEIGHT,))
    if not torch.equal(compute(rows.roll(1, 0), (BASE_HEIGHT,)).roll(-1, 0), base):
        raise StartupError(
            f"--deterministic: with {torch.get_num_threads()} threads this machine's matrix products give a "
            f"row different bits at different places of one call of {BASE_HEIGHT} rows; try --num-threads 1"
        )
    agreeing = {
        height
        for height in HEIGHTS
        if torch.equal(
            compute(rows[: (count := max(height, BASE_HEIGHT))], (height,)),
            base[:count],
        )
    }
    return agreeing, base


def _agreeing_rows(config: ModelConfig, heights: tuple[int, ...]) -> tuple[int, ...]:
    """How many decode rows one call may hold: those counts whose rows come out as each alone does."""
    num_matrices = max(ROWS) * config.num_kv_heads
    q = _numbers(num_matrices, config.num_heads // config.num_kv_heads, config.head_dim)
    keys, values = (_numbers(num_matrices, BLOCK, config.head_dim) for _ in range(2))
    ends = torch.full((num_matrices, 1), BLOCK - 3)

    def in_calls_of(count: int) -> Tensor:
        size = count * config.num_kv_heads
        parts = (slice(start, start + size) for start in range(0, num_matrices, size))
        return torch.cat([attend(q[part], keys[part], values[part], ends[part], heights) for part in parts])

    alone = in_calls_of(1)
    return tuple(count for count in ROWS if torch.equal(in_calls_of(count), alone))


def _same_in_every_place(name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
    x = _numbers(4099).abs_().add_(0.01)
    whole = function(x)
    for skipped in range(1, 18):
        if not torch.equal(function(x[skipped:-skipped]), whole[skipped:-skipped]):
            raise StartupError(
                f"--deterministic: {name} of a number depends on its place in a tensor here; install another "
                "build of torch"
            )
    return whole


def _numbers(*shape: int) -> Tensor:
    """The same in every place that runs this: integers of a Mersenne twister, over a power of two."""
    generator = torch.Generator().manual_seed(sum(shape))
    whole = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, dtype=torch.int16)
    return whole.float().div_(1 << 15)
