"""Qwen 2 and 2.5: a bias on query, key and value, none elsewhere (transformers ``modeling_qwen2.py``)."""

from .family import Family

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    default_num_kv_heads=32,
    window_switch="use_sliding_window",
)
