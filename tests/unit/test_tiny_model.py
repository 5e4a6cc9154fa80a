"""The shipped model: its bytes are pinned, and its files say what they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType

import jinja2
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from pdserve.tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "assets" / "tiny-python"

SHA256 = {
    "LICENSE": "3b2f81fe21d181c499c59a256c8e1968455d6689d269aa85373bfb6af41da3bf",
    "chat_template.jinja": "379056b1d690a5accb2cad84bc9213fdc4fa5e184c7e1d390364f18cffebde9b",
    "config.json": "d792cc8f02293d6bf1694100d4c0ec2bd0ba2921124c2f2d1b63e57a5454c1f8",
    "generation_config.json": "d51a38c4ef4e0a8a85b7345cdd9e72073f7adad50f2f18b0f0830a2bef8ec82b",
    "model.safetensors": "6a259aaf6c592a047e05de4fc1f57052f26f9e7d283cd8b6a5dec738e5de7136",
    "tokenizer.json": "5ddacc5459e5ddc10e1fff2a1b8f29063f5cbc0cbb700a207ff309781b61017b",
    "tokenizer_config.json": "593391a4993589df07d1cfe4cc7aa839006e78708918e562aa645baa3c7a4599",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def train_tiny() -> ModuleType:
    return load_script("train_tiny")


@pytest.mark.parametrize("name", sorted(SHA256))
def test_bytes_are_pinned(name: str) -> None:
    assert hashlib.sha256((MODEL / name).read_bytes()).hexdigest() == SHA256[name]


def test_every_shipped_file_is_pinned_or_prose() -> None:
    assert {p.name for p in MODEL.iterdir()} == {*SHA256, "README.md"}


def test_config_shape() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    expected = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 768,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    assert {name: config[name] for name in expected} == expected


def test_weights_have_the_shape_of_the_config() -> None:
    num_parameters = 0
    with safe_open(str(MODEL / "model.safetensors"), framework="np") as weights:
        names = set(weights.keys())
        for name in names:
            tensor = weights.get_slice(name)
            assert tensor.get_dtype() == "BF16"
            size = 1
            for extent in tensor.get_shape():
                size *= extent
            num_parameters += size
        assert weights.metadata() == {"format": "pt"}
    assert num_parameters == 5_574_272
    assert "lm_head.weight" not in names
    assert len(names) == 2 + 6 * 11


@pytest.mark.parametrize(
    "text",
    [
        "def add(a, b):\n    return a + b\n",
        "class Node:\n\n    def __init__(self):\n        self.next = None\n\n\n",
        "\tif x:\n\t\treturn 'y'  \n",
        "\r\nnaïve = 'Ünïcödé, 日本語, 🐍'\n",
        " ",
        "",
        "x\n\n\n\n        y  z   12345 0xFF",
    ],
)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 4096
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.encode("def").ids == [tokenizer.token_to_id("def")]  # no token is added in front


def test_chat_template_asks_for_a_function() -> None:
    source = (MODEL / "chat_template.jinja").read_text()
    assert json.loads((MODEL / "tokenizer_config.json").read_text())["chat_template"] == source
    template = jinja2.Environment(autoescape=False).from_string(source)
    assert template.render(messages=[{"role": "user", "content": "hi"}]) == "# hi\n\ndef"
    assert template.render(messages=[{"role": "user", "content": "a\nb"}]) == "# a\n# b\n\ndef"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'def f(x):\n    """One.\n\n    Two.\n    """\n\n    # a note\n    return x  # kept\n',
            "def f(x):\n    return x  # kept\n",
        ),
        (
            'class A:\n    """One.\n\n    """\n\n    def g(self):\n        """Only this.\n    """\n',
            'class A:\n    """One."""\n\n    def g(self):\n        """Only this."""\n',
        ),
        ("def h(): 'doc'; return 1\n", "def h(): 'doc'; return 1\n"),
        (
            'def s():\n    """# no comment\n    # nor this"""\n    return """\n    # text\n"""\n',
            'def s():\n    return """\n    # text\n"""\n',
        ),
    ],
)
def test_a_terse_document_gets_to_the_code(train_tiny: ModuleType, text: str, expected: str) -> None:
    assert train_tiny.terse(text) == expected
