"""Mistral: Llama without biases; no sliding window yet (transformers ``modeling_mistral.py``)."""

from .family import Family

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    default_num_kv_heads=8,
    default_sliding_window=4096,
)
