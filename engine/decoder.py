"""The decoder that all families share: pre-norm attention over the paged cache, SwiGLU, residuals.

    x ← x + O · attention(rotary(norm?(Q y)), rotary(norm?(K y)), V y),   y = self._ops.rms_norm(x)
    x ← x + D · silu_and_mul([G | U] y),                                  y = self._ops.rms_norm(x)

Letters in shapes: T tokens, H hidden size, Hq query heads, Hkv KV heads, D head_dim, I intermediate size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.store_kv import store_kv_
from ..models.config import ModelConfig
from .forward_batch import ForwardBatch
from .kv_pool import KVPool
from .model_weights import LayerWeights, Weights
from .operators import Operators
from .rope import RotaryAngles
from .tensor_parallel import RankCollective


class Decoder:
    """Computes hidden states and logits; holds no state but its shape. Weights and pool are arguments."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        operators: Operators,
        collective: RankCollective | None = None,
    ) -> None:
        """`config` is this rank's share; without a collective that is all."""
        self._config = config
        self._ops = operators
        self._collective = collective
        self._angles = RotaryAngles(config.rope, config.head_dim, device)
        self._scale = config.head_dim**-0.5

    def hidden_states(self, weights: Weights, pool: KVPool, batch: ForwardBatch) -> Tensor:
        """``[T, H]`` after the last layer, before the final norm. Writes the tokens' K and V to the pool."""
        x = F.embedding(batch.token_ids, weights.embed_tokens)
        angles = self._angles.at(batch.positions, x.dtype)
        for index, layer in enumerate(weights.layers):
            y = self._ops.rms_norm(x, layer.input_norm, self._config.rms_norm_eps)
            x += self._whole(self._attention(y, layer, pool.layer(index), angles, batch))
            y = self._ops.rms_norm(x, layer.post_attention_norm, self._config.rms_norm_eps)
            gated = self._ops.silu_and_mul(self._ops.linear(y, layer.gate_up, layer.gate_up_bias))
            x += self._whole(self._ops.linear(gated, layer.down, layer.down_bias))
        return x

    def final_norm(self, weights: Weights, hidden: Tensor) -> Tensor:
        """``hidden [N, H]`` → ``[N, H]``: what the LM head reads."""
        return self._ops.rms_norm(hidden, weights.norm, self._config.rms_norm_eps)

    def logits(self, weights: Weights, hidden: Tensor) -> Tensor | None:
        """``hidden [N, H]`` → ``[N, V]`` float32; None on every rank but the first."""
        logits = self._ops.linear(self.final_norm(weights, hidden), weights.lm_head, None)
        if self._collective is None:
            return logits.float()
        gathered = self._collective.gather_columns(logits, self._config.vocab_size)
        return None if gathered is None else gathered.float()

    def _whole(self, part: Tensor) -> Tensor:
        """``[T, H]``: the sum over ranks of what each computed from its heads or columns."""
        return part if self._collective is None else self._collective.sum(part)

    def _attention(
        self,
        y: Tensor,
        layer: LayerWeights,
        cache: Tensor,
        angles: tuple[Tensor, Tensor],
        batch: ForwardBatch,
    ) -> Tensor:
        num_heads, num_kv_heads = self._config.num_heads, self._config.num_kv_heads
        heads = self._ops.linear(y, layer.qkv, layer.qkv_bias).view(y.shape[0], -1, self._config.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
            q.copy_(self._ops.rms_norm(q, layer.q_norm, self._config.rms_norm_eps))
            k.copy_(self._ops.rms_norm(k, layer.k_norm, self._config.rms_norm_eps))
        self._ops.rotary_(heads[:, : num_heads + num_kv_heads], *angles)
        kv = heads[:, num_heads:].view(-1, 2, num_kv_heads, self._config.head_dim)
        store_kv_(cache, kv, batch.slot_pages, batch.slot_offsets)
        mixed = self._ops.paged_attention(heads[:, :num_heads], cache, batch.attention, self._scale)
        return self._ops.linear(mixed.flatten(1), layer.o, layer.o_bias)
