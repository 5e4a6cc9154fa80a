"""Writes a checkpoint with seeded random weights in Hugging Face format, with tokenizer and chat template.

    scripts/dev make_checkpoint MODEL DIR [--seed N] [--dtype T] [--shards N] [--config-style 4|5]
                            [--set KEY=JSON]

MODEL is a family in miniature, with odd head counts and head_dims (llama, mistral, qwen2, qwen3), or a shape
for measuring speed: small-llama (153 M parameters), mid-qwen3 (596 M). The same arguments give the same
bytes. Random weights are scaled so that logits spread over several units.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from pdserve.engine.kv_pool import TORCH_DTYPES
from pdserve.engine.model_weights import tensor_shapes
from pdserve.models.config import ModelConfig

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)  # ids 0, 1, 2
TOKENIZER_VOCAB = 384
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the tokenizer's merges are learned from.
TEXT = """
A prefill node computes the keys and values of a prompt and writes them, page after page, into the memory of a
decode node, which generates the answer token by token. The router picks the two nodes, waits for neither, and
tries again on another pair when one of them is lost. def main() -> None: return the answer; print(the_answer)
"""

# Standard deviations of the random weights.
LOGIT_SPREAD = 3.0
BIAS_SPREAD = 0.3
NORM_SPREAD = 0.1

# config.json in the spelling of transformers 5, without what all have in common.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 401,
        "hidden_size": 96,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        "eos_token_id": [0, 2],
    },
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 384,
        "hidden_size": 80,
        "intermediate_size": 144,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "max_position_embeddings": 1024,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "eos_token_id": 2,
    },
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 416,
        "hidden_size": 84,
        "intermediate_size": 152,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 1024,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "eos_token_id": 2,
    },
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 7,
        "num_key_value_heads": 7,
        "head_dim": 20,
        "max_position_embeddings": 1024,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "eos_token_id": 2,
    },
    "small-llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "eos_token_id": 2,
        "dtype": "bfloat16",
    },
    "mid-qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "eos_token_id": 2,
        "dtype": "bfloat16",
    },
}
COMMON: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "dtype": "float32",
    "transformers_version": "5.0.0",
}


def make_checkpoint(
    model: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: str | None = None,
    shards: int = 1,
    config_style: int = 5,
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Write the checkpoint of `model` into `folder`, which is made. `overrides` replace entries of
    config.json in the spelling of transformers 5."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {**COMMON, **MODELS[model], **(overrides or {})}
    if dtype is not None:
        values["dtype"] = dtype
    spelled = values if config_style == 5 else spelled_by_transformers_4(values)
    write_json(folder / "config.json", spelled)
    write_json(
        folder / "generation_config.json",
        {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "eos_token_id": values["eos_token_id"]},
    )
    write_tokenizer(folder)
    write_weights(folder, ModelConfig.from_dir(folder), seed, shards)


def spelled_by_transformers_4(values: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` and ``dtype`` as they were called before."""
    spelled = {name: value for name, value in values.items() if name not in ("rope_parameters", "dtype")}
    rope = dict(values["rope_parameters"])
    spelled["rope_theta"] = rope.pop("rope_theta")
    spelled["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    spelled["torch_dtype"] = values["dtype"]
    spelled["transformers_version"] = "4.51.0"
    return spelled


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 256 bytes, the special tokens, and merges learned from `TEXT`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCAB,
        min_frequency=1,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 20,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_weights(folder: Path, config: ModelConfig, seed: int, shards: int) -> None:
    dtype = TORCH_DTYPES[config.dtype]
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], spread: float, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(spread).add_(mean).to(dtype)

    shapes = tensor_shapes(config)
    tensors = {name: random_tensor(name, shape, config, normal) for name, shape in shapes.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": weight_map},
    )


def random_tensor(
    name: str, shape: tuple[int, ...], config: ModelConfig, normal: Callable[..., torch.Tensor]
) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return normal(shape, NORM_SPREAD, 1.0)
    if name.endswith(".bias"):
        return normal(shape, BIAS_SPREAD)
    if name == "lm_head.weight" or (name == "model.embed_tokens.weight" and config.tie_word_embeddings):
        # The final norm makes hidden states of length sqrt(H).
        return normal(shape, LOGIT_SPREAD / math.sqrt(config.hidden_size))
    if name == "model.embed_tokens.weight":
        return normal(shape, 1.0)
    return normal(shape, 1 / math.sqrt(shape[1]))


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(TORCH_DTYPES), help="default: the model's")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--config-style", type=int, choices=(4, 5), default=5, help="transformers' spelling")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="replace an entry of config.json, spelled as by transformers 5; repeatable",
    )
    args = parser.parse_args()
    pairs = (entry.split("=", 1) for entry in args.set)
    make_checkpoint(
        args.model,
        args.folder,
        seed=args.seed,
        dtype=args.dtype,
        shards=args.shards,
        config_style=args.config_style,
        overrides={key: json.loads(value) for key, value in pairs},
    )


if __name__ == "__main__":
    main()
