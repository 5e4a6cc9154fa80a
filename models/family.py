"""A model family, as data: where it departs from the common decoder. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A bias is always there (True), never (False), or named by a boolean key of config.json."""

    name: str  # config.json's model_type
    architecture: str  # config.json's architectures[0]
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False  # RMS norm of each query and key head before the rotation
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    default_num_kv_heads: int | None = None  # None: num_attention_heads
    # The key that switches `sliding_window` on. None: a `sliding_window` that is not null is always on.
    window_switch: str | None = None
    default_sliding_window: int | None = None  # what transformers takes for an absent key
