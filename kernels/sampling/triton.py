"""`gumbel_argmax` in two launches: the best of each block of the vocabulary, then the best of those.

The noise is of Triton's own Philox, whose words are ours (``kernels/philox``), and float64. Nothing is read
on the host, and a block without a token in play computes no noise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .eager import GUMBEL_RANGE

_BLOCK = 1024  # tokens; a multiple of four


def gumbel_argmax(
    scaled: Tensor, threshold: Tensor, seeds: Tensor, choices: Tensor, positions: Tensor
) -> Tensor:
    """Raises ValueError for a last axis that is strided."""
    if scaled.stride(-1) != 1:
        raise ValueError(f"gumbel_argmax: the last axis of scaled has a stride of {scaled.stride(-1)}")
    num_rows, vocab_size = scaled.shape
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    floor = torch.maximum(threshold, scaled.amax(dim=-1) - GUMBEL_RANGE)
    scores = torch.empty((num_rows, num_blocks), dtype=torch.float64, device=scaled.device)
    tokens = torch.empty((num_rows, num_blocks), dtype=torch.int64, device=scaled.device)
    drawn = torch.empty((num_rows,), dtype=torch.int64, device=scaled.device)
    launch(
        _best_of_block,
        (num_rows, num_blocks),
        scaled,
        floor,
        seeds,
        choices,
        positions,
        scores,
        tokens,
        scaled.stride(0),
        VOCAB_SIZE=vocab_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    launch(
        _best_of_row,
        (num_rows,),
        scores,
        tokens,
        drawn,
        NUM_BLOCKS=num_blocks,
        LANES=triton.next_power_of_2(num_blocks),
        num_warps=1,
    )
    return drawn


@triton.jit
def _best_of_block(
    scaled,
    floor,
    seeds,
    choices,
    positions,
    scores,
    tokens,
    scaled_row,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    of_block = row * tl.num_programs(1) + tl.program_id(1)
    ids = first + tl.arange(0, BLOCK)
    logits = tl.load(scaled + row * scaled_row + ids, mask=ids < VOCAB_SIZE, other=float("-inf"))
    in_play = logits >= tl.load(floor + row)
    if tl.max(in_play.to(tl.int32), 0) == 0:
        tl.store(scores + of_block, tl.full([], float("-inf"), tl.float64))
        tl.store(tokens + of_block, first.to(tl.int64))
        return
    # A counter's four words are the noise of four neighbours.
    groups = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zeros = tl.zeros([BLOCK // 4], tl.uint32)
    position = zeros + tl.load(positions + row).to(tl.uint32)
    choice = zeros + tl.load(choices + row).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(tl.load(seeds + row), groups, position, choice, zeros)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    noise = -tl.log(-tl.log((words.to(tl.float64) + 0.5) * (1.0 / (1 << 32))))
    noisy = tl.where(in_play, logits.to(tl.float64) + noise, float("-inf"))
    best, index = tl.max(noisy, 0, return_indices=True)
    tl.store(scores + of_block, best)
    tl.store(tokens + of_block, first.to(tl.int64) + index)


@triton.jit
def _best_of_row(scores, tokens, drawn, NUM_BLOCKS: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, LANES)
    best = tl.load(scores + row * NUM_BLOCKS + blocks, mask=blocks < NUM_BLOCKS, other=float("-inf"))
    tl.store(drawn + row, tl.load(tokens + row * NUM_BLOCKS + tl.argmax(best, 0)))
