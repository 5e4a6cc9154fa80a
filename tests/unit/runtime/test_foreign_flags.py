"""Launch lines of other servers, as people paste them."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import pytest

from pdserve.runtime.command_line import add_flags, arguments_of, node_config, router_config
from pdserve.runtime.config import FLAGS
from pdserve.runtime.errors import StartupError
from pdserve.runtime.foreign_flags import FOREIGN_FIELD, foreign_names, without_effect

ALL = frozenset({"up", "router", "prefill", "decode"})


def parsed(line: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser, ALL)
    return vars(parser.parse_args(shlex.split(line)))


@pytest.mark.parametrize(
    "line",
    [
        "Qwen/Qwen3-4B --dtype half --max-model-len 32k --gpu-memory-utilization 0.9 --trust-remote-code "
        "--enable-prefix-caching --enforce-eager --disable-log-requests -tp 2 --swap-space 4 --seed 0",
        "--model Qwen/Qwen3-4B --tokenizer-mode auto --kv-cache-dtype auto --pipeline-parallel-size 1 "
        "--enable-chunked-prefill --max-num-batched-tokens 8192 --max-num-seqs 16 --load-format auto "
        "--generation-config vllm --download-dir /models --revision main --uvicorn-log-level warning",
        "--model-path Qwen/Qwen3-4B --host 127.0.0.1 --port 30000 --mem-fraction-static 0.85 --tp-size 1 "
        "--enable-metrics --schedule-policy lpm --attention-backend triton --disable-cuda-graph "
        "--chunked-prefill-size 4096 --context-length 4096 --random-seed 1 --log-level-http warning --dp 1",
    ],
)
def test_a_pasted_line_is_taken(line: str) -> None:
    given = parsed(line.replace("--dp 1", "--dp-size 1"))
    for config in (router_config(given), node_config("prefill", given), node_config("decode", given)):
        assert config.foreign_flags == given[FOREIGN_FIELD]
        assert config.foreign_flags


def test_one_line_names_each_once_and_says_why() -> None:
    given = parsed("--trust-remote-code --gpu-memory-utilization 0.9 --trust-remote-code")
    assert without_effect(given[FOREIGN_FIELD]) == (
        "without effect here: --trust-remote-code (no code of a checkpoint is ever run), "
        "--gpu-memory-utilization (--kv-cache-gb sets the pool's size)"
    )


@pytest.mark.parametrize(
    "line",
    [
        "--quantization fp8",
        "--kv-cache-dtype fp8_e5m2",
        "--pipeline-parallel-size 2",
        "--data-parallel-size 4",
        "--enable-lora",
        "--tool-call-parser hermes",
        "--reasoning-parser qwen3",
        "--override-generation-config {}",
        "--speculative-config {}",
        "--skip-tokenizer-init",
    ],
)
def test_what_would_change_answers_is_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(line)
    assert line.split()[0] in capsys.readouterr().err


def test_they_are_none_of_our_own() -> None:
    foreign = list(foreign_names())
    assert len(foreign) == len(set(foreign))
    assert not set(foreign) & {name for flag in FLAGS for name in flag.names}


def test_the_help_does_not_list_them() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, ALL)
    assert "trust-remote-code" not in parser.format_help()


def test_a_file_may_hold_them(tmp_path: Path) -> None:
    file = tmp_path / "pasted.yaml"
    file.write_text("trust_remote_code: true\nmax-model-len: 8k\nprefill: {swap-space: 4}\ndtype: half\n")
    prefill = node_config("prefill", {"config": file})
    assert prefill.foreign_flags == ("--trust-remote-code", "--swap-space")
    assert (prefill.max_model_len, prefill.dtype) == (8000, "float16")
    assert router_config({"config": file}).foreign_flags == ("--trust-remote-code",)
    file.write_text("kv-cache-dtype: fp8")
    with pytest.raises(StartupError, match="unknown key 'kv-cache-dtype'"):
        router_config({"config": file})
    file.write_text("max-model-len: 8kb")
    with pytest.raises(StartupError, match="max-model-len: '8kb' is no number of tokens"):
        router_config({"config": file})
    file.write_text("max-modellen: 8")
    with pytest.raises(StartupError, match="did you mean max-model-len"):
        router_config({"config": file})


def test_a_program_may_give_them() -> None:
    options = {
        "trust_remote_code": True,
        "enforce_eager": False,
        "gpu_memory_utilization": 0.9,
        "dtype": "half",
    }
    assert arguments_of(options, ALL) == [
        "--trust-remote-code",
        "--gpu-memory-utilization=0.9",
        "--dtype=float16",
    ]
    with pytest.raises(StartupError, match="there is no option 'quantization'"):
        arguments_of({"quantization": "fp8"}, ALL)
    with pytest.raises(StartupError, match="did you mean --num-decode"):
        arguments_of({"num-decoder": 2}, ALL)
