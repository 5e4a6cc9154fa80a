from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pdserve.engine.rope import attention_scale, inverse_frequencies
from pdserve.models.config import (
    ModelConfig,
    RopeConfig,
    kv_layout,
    read_generation_defaults,
    read_vocabulary_digest,
    resolve_dtype,
)
from pdserve.runtime.errors import StartupError

BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., ModelConfig]:
    """``read(field=value)``: the base config with changes; a value of ``...`` removes the field."""

    def from_changes(**changes: object) -> ModelConfig:
        values = {name: value for name, value in {**BASE, **changes}.items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return ModelConfig.from_dir(tmp_path)

    return from_changes


def test_defaults_of_absent_fields(read: Callable[..., ModelConfig]) -> None:
    config = read()
    assert (config.num_kv_heads, config.head_dim) == (6, 8)
    assert (config.rms_norm_eps, config.rope, config.dtype) == (
        1e-6,
        RopeConfig(original_max_position_embeddings=256),
        "float32",
    )
    flags = (config.tie_word_embeddings, config.attention_bias, config.o_bias, config.mlp_bias)
    assert flags == (False,) * 4
    assert config.eos_token_ids == ()


def test_families_set_biases_and_norms(read: Callable[..., ModelConfig]) -> None:
    qwen2 = read(model_type="qwen2", architectures=["Qwen2ForCausalLM"], num_key_value_heads=2)
    assert (qwen2.attention_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = read(**QWEN3, num_key_value_heads=2, head_dim=10)
    assert (qwen3.attention_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, True, 10)
    llama = read(attention_bias=True, mlp_bias=True)
    assert (llama.attention_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)


@pytest.mark.parametrize(
    "spelled",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2}, "dtype": "bfloat16"},
        {
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "torch_dtype": "bfloat16",
        },
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "dtype": "torch.bfloat16"},
    ],
    ids=["transformers-5", "transformers-4", "older"],
)
def test_spellings(read: Callable[..., ModelConfig], spelled: dict[str, Any]) -> None:
    config = read(**spelled)
    assert (config.rope.rope_type, config.rope.theta, config.rope.factor) == ("linear", 5e5, 2.0)
    assert config.dtype == "bfloat16"


def test_yarn_extends_the_length(read: Callable[..., ModelConfig]) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert read(rope_scaling=scaling).max_model_len == 1024
    assert read(rope_scaling=scaling, max_position_embeddings=1024).max_model_len == 1024


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "yarn-top-level": {
        "rope_scaling": {"type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 64,
    },
    "yarn-both": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        "original_max_position_embeddings": 64,
    },
    "yarn-finetuned": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "finetuned": True, "attn_factor": 1.0}
    },
    "yarn-mscale": {"rope_scaling": {"type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0}},
    "yarn-attention-factor": {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 0.9}},
}


@pytest.mark.parametrize("changes", ROPES.values(), ids=ROPES.keys())
def test_m_rope_is_that_of_transformers(
    read: Callable[..., ModelConfig], changes: dict[str, Any], tmp_path: Path
) -> None:
    rope = read(**changes, rope_theta=500000.0).rope
    theirs = LlamaConfig.from_pretrained(tmp_path)
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope.rope_type](theirs)
    torch.testing.assert_close(inverse_frequencies(rope, 8), frequencies)
    assert attention_scale(rope) == pytest.approx(scale)


def test_m_attn_factor_multiplies_the_scale_that_follows(read: Callable[..., ModelConfig]) -> None:
    """As in yarn's own code and vLLM; transformers does not read it."""
    scaling = {"type": "yarn", "factor": 4.0}
    plain, halved = read(rope_scaling=scaling), read(rope_scaling={**scaling, "attn_factor": 0.5})
    assert attention_scale(halved.rope) == pytest.approx(attention_scale(plain.rope) / 2)
    stated = read(rope_scaling={**scaling, "attn_factor": 0.5, "attention_factor": 1.5})
    assert attention_scale(stated.rope) == 1.5


def test_m_linear_scaling_extends_the_length(read: Callable[..., ModelConfig]) -> None:
    assert read(rope_scaling={"type": "linear", "factor": 4.0}).max_model_len == 1024


def test_f6_eos_of_the_tokenizer_too(
    read: Callable[..., ModelConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def write(name: str, **values: object) -> None:
        (tmp_path / name).write_text(json.dumps(values))

    write("generation_config.json", eos_token_id=7)
    decoder = {"5": {"content": "<|im_end|>", "special": True}}
    write("tokenizer_config.json", eos_token="<|im_end|>", added_tokens_decoder=decoder)
    assert read(eos_token_id=9).eos_token_ids == (9, 7, 5)
    assert read(eos_token_id=5).eos_token_ids == (5, 7)
    write("tokenizer_config.json", eos_token={"content": "</s>", "lstrip": False})
    write("tokenizer.json", added_tokens=[{"id": 2, "content": "</s>"}])
    assert read(eos_token_id=9).eos_token_ids == (9, 7, 2)
    write("tokenizer.json", model={"type": "BPE", "vocab": {"a": 0, "</s>": 3}})
    assert read(eos_token_id=9).eos_token_ids == (9, 7, 3)
    write("tokenizer.json", model={"type": "Unigram", "vocab": [["a", -1.0], ["</s>", 0.0]]})
    assert read(eos_token_id=9).eos_token_ids == (9, 7, 1)
    write("tokenizer.json", model={"type": "BPE", "vocab": {"</s>": 100}})  # no row of the model
    assert read(eos_token_id=9).eos_token_ids == (9, 7)
    (tmp_path / "tokenizer.json").write_text("no JSON")
    assert read(eos_token_id=9).eos_token_ids == (9, 7)
    assert caplog.messages == []


def test_f1_the_digest_is_of_what_ids_mean(tmp_path: Path) -> None:
    def digest(indent: int | None, vocab: object, *added: tuple[int, str]) -> str:
        tokens = [{"id": number, "content": content} for number, content in added]
        values = {"added_tokens": tokens, "model": {"vocab": vocab}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(values, indent=indent))
        return read_vocabulary_digest(tmp_path)

    assert read_vocabulary_digest(tmp_path) == ""
    one = digest(None, {"a": 0, "b": 1}, (2, "</s>"))
    assert digest(4, {"b": 1, "a": 0}, (2, "</s>")) == one
    assert digest(None, [["a", -1.0], ["b", -2.0]], (2, "</s>")) == one
    assert digest(None, {"a": 1, "b": 0}, (2, "</s>")) != one
    assert digest(None, {"a": 0, "b": 1}, (3, "</s>")) != one


def test_f6_no_eos_at_all_is_said(
    read: Callable[..., ModelConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read().eos_token_ids == ()
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path} names no EOS token")


def test_eos_of_both_files(read: Callable[..., ModelConfig], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read(eos_token_id=9).eos_token_ids == (9, 7)
    assert read(eos_token_id=[1, 2]).eos_token_ids == (1, 2, 7, 9)
    assert read(eos_token_id=None).eos_token_ids == (7, 9)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
    "no-architecture": ({"architectures": ...}, "architectures is missing"),
    "model-type": ({"model_type": "mixtral"}, "model_type 'mixtral'"),
    "no-model-type": ({"model_type": None}, "model_type is missing"),
    "missing": ({"hidden_size": ...}, "hidden_size is missing"),
    "wrong-type": ({"vocab_size": "many"}, "vocab_size is 'many'"),
    "bool-for-int": ({"vocab_size": True}, "vocab_size is True"),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "heads": ({"num_key_value_heads": 4}, "num_key_value_heads 4"),
    "head-dim": ({"hidden_size": 50}, "hidden_size 50"),
    "odd-head-dim": ({"head_dim": 7}, "head_dim 7"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "partial-rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "mistral-window": ({**MISTRAL, "sliding_window": 4096}, "sliding_window 4096"),
    "mistral-default-window": ({**MISTRAL, "sliding_window": ...}, "sliding_window 4096"),
    "llama-window": ({"sliding_window": 128}, "sliding_window 128"),
    "qwen3-window": ({**QWEN3, "num_key_value_heads": 2, "use_sliding_window": True}, "use_sliding_window"),
    "layer-types": ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    "rope-type": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
    "rope-types-differ": ({"rope_scaling": {"rope_type": "yarn", "type": "linear"}}, "type 'linear'"),
    "rope-factor": ({"rope_scaling": {"type": "yarn"}}, "needs factor"),
    "rope-unknown": ({"rope_parameters": {"mrope_section": [1, 2]}}, "mrope_section"),
    "rope-partial": ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
    "dtype": ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    "eos": ({"eos_token_id": "</s>"}, "eos_token_id"),
}


@pytest.mark.parametrize(("changes", "names"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refused_in_one_line_that_names_the_field(
    read: Callable[..., ModelConfig], changes: dict[str, Any], names: str
) -> None:
    with pytest.raises(StartupError) as refused:
        read(**changes)
    message = str(refused.value)
    assert names in message
    assert "config.json: " in message
    assert "\n" not in message


@pytest.mark.parametrize("text", [None, "{", "[]"], ids=["absent", "not-json", "not-an-object"])
def test_unreadable_file(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(StartupError, match=r"config\.json"):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (None, {}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        (
            {
                "do_sample": True,
                "temperature": 0.6,
                "top_k": 20,
                "top_p": 1,
                "min_p": None,
                "eos_token_id": 3,
            },
            {"temperature": 0.6, "top_k": 20, "top_p": 1.0, "eos_token_id": (3,)},
        ),
        ({"repetition_penalty": 1.05, "bos_token_id": 1}, {"repetition_penalty": 1.05}),
    ],
)
def test_generation_defaults(
    tmp_path: Path, written: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    if written is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(written))
    assert read_generation_defaults(tmp_path) == expected


def test_dtype_and_layout(read: Callable[..., ModelConfig]) -> None:
    config = read(dtype="bfloat16", num_key_value_heads=3)
    assert resolve_dtype("auto", config, {"float32", "bfloat16"}) == "bfloat16"
    assert resolve_dtype("auto", config, {"float32"}) == "float32"
    assert resolve_dtype("bfloat16", config, {"float32"}) == "bfloat16"
    with pytest.raises(StartupError, match="int4"):
        resolve_dtype("int4", config, {"float32"})
    layout = kv_layout(config, 16, "bfloat16")
    assert layout.page_bytes == 3 * 2 * 2 * 16 * 8 * 2


@pytest.mark.process
def test_reading_a_config_imports_no_torch() -> None:
    code = "import sys, pdserve.models.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
