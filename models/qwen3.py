"""Qwen 3, dense: query and key heads are normalized before the rotation.

Source: transformers ``modeling_qwen3.py``.
"""

from .family import Family

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    qk_norm=True,
    default_head_dim=128,
    default_num_kv_heads=32,
    window_switch="use_sliding_window",
)
