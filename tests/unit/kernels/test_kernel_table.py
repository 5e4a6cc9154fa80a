"""Triton's kernels compiled for sm_90, without a GPU: what they take of one, and which units they use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pdserve

TOOL = Path(pdserve.__file__).resolve().parent / "scripts/tools/kernel_table.py"
MOST_SHARED_BYTES = 227 * 1024  # of a block of threads
# Loads of an attention kernel that are no keys, values or queries: what a row is, and its pages.
NARROW_LOADS = 12


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """In a process of its own: in this one Triton interprets kernels."""
    done = subprocess.run(
        [sys.executable, "-P", TOOL, "--json", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kernels: list[dict[str, Any]] = json.loads(done.stdout)
    return kernels


def complaints(kernel: dict[str, Any]) -> list[str]:
    name, shared_bytes = kernel["kernel"], kernel["shared_bytes"]
    found = []
    if kernel["spills"] or kernel["stack_bytes"]:
        found.append(f"{kernel['spills']} spills, {kernel['stack_bytes']} bytes of stack")
    if shared_bytes > MOST_SHARED_BYTES:
        found.append(f"{shared_bytes} bytes of shared memory")
    if name in ("_decode", "_prefill"):
        if kernel["narrow_loads"] > NARROW_LOADS:
            found.append(f"{kernel['narrow_loads']} loads of less than 16 bytes")
        wanted = "HGMMA" if name == "_prefill" else "HMMA"
        if kernel["tensor_core"] != wanted and "float32" not in kernel["variant"]:
            found.append(f"no {wanted}")
    return [f"{kernel['variant']}: {name}: {told}" for told in found]


@pytest.mark.process
@pytest.mark.timeout(300)
def test_kernels_fit_a_gpu_and_use_its_units() -> None:
    kernels = compiled()
    assert {kernel["kernel"] for kernel in kernels} == {
        "_rms_norm",
        "_silu_and_mul",
        "_rotate_and_store",
        "_best_of_block",
        "_best_of_row",
        "_decode",
        "_merge",
        "_prefill",
    }
    assert [told for kernel in kernels for told in complaints(kernel)] == []
    assert [kernel for kernel in kernels if not kernel["wide_loads"]] == []


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(600)
def test_so_they_do_at_other_shapes() -> None:
    assert [told for kernel in compiled("--slow") for told in complaints(kernel)] == []
