"""Llama 1 to 3: the common decoder, with optional biases (transformers ``modeling_llama.py``)."""

from .family import Family

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
)
