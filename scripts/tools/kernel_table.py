"""What Triton's kernels compile to for an H100 or H200: registers, spills, shared memory, instructions.

    scripts/dev kernel_table [NAME ...] [--slow] [--json]

The target is sm_90; no GPU and no driver is needed. Each variant is a call of a kernel's own function on the
meta device, at the shapes of a model: what it would launch is compiled as a launch on a GPU would have it
compiled, and read from the machine code by the tools that come with Triton. NAMEs pick variants whose name
begins so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

# Read when triton is imported.
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from pdserve.kernels import launch
from pdserve.kernels.paged_attention.triton import PagedPlan, paged_attention, splits_of
from pdserve.kernels.rms_norm.triton import rms_norm
from pdserve.kernels.rotary.triton import rotary_
from pdserve.kernels.rotate_and_store.triton import rotate_and_store_
from pdserve.kernels.sampling.triton import gumbel_argmax
from pdserve.kernels.silu_and_mul.triton import silu_and_mul
from pdserve.kernels.store_kv.triton import store_kv_

TARGET = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model's attention, on one rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    num_layers: int = 32


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one kernel of one variant became."""

    variant: str
    kernel: str
    num_warps: int
    registers: int  # of a thread
    stack_bytes: int  # of a thread
    spills: int  # instructions that read or write local memory
    shared_bytes: int  # of a block of threads
    tensor_core: str  # HGMMA (of whole warp groups), HMMA, or nothing
    wide_loads: int  # instructions that load 16 bytes from global memory
    narrow_loads: int  # all other loads from global memory


class _NoDriver:
    """What Triton asks a driver when it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        del device
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def variants(slow: bool = False) -> dict[str, Callable[[], object]]:
    """Calls on the meta device, by name; `slow` adds those that CI leaves out."""
    llama, head_64 = Shape(32, 8, 128), Shape(32, 8, 64)
    calls: dict[str, Callable[[], object]] = {
        "rms_norm 4096": partial(_rms_norm, 4096),
        "silu_and_mul 14336": lambda: silu_and_mul(_meta(8, 2 * 14336)),
        "rotate_and_store 48 x 128": partial(_rotate_and_store, llama),
        "gumbel_argmax 128256": partial(_gumbel_argmax, 128_256),
        "decode 128, group 4": partial(_decode, llama),
        "decode 64, group 4, one split": partial(_decode, head_64, num_rows=256),
        "prefill 128, group 4": partial(_prefill, llama),
        "prefill 64, group 4": partial(_prefill, head_64),
    }
    if not slow:
        return calls
    calls |= {
        "rms_norm 896": partial(_rms_norm, 896),
        "rms_norm 8192": partial(_rms_norm, 8192),
        "rms_norm 32 x 128": lambda: rms_norm(_meta(8, 48, 128)[:, :32], _meta(128), 1e-6),
        "rotary 40 x 128": partial(_rotary, llama),
        "rotary 40 x 64": partial(_rotary, head_64),
        "store_kv 8 x 128": partial(_store_kv, llama),
        "store_kv 8 x 64": partial(_store_kv, head_64),
        "rotate_and_store 48 x 128, norms": partial(_rotate_and_store, llama, has_norms=True),
        "rotate_and_store 48 x 64": partial(_rotate_and_store, head_64),
        "gumbel_argmax 151936": partial(_gumbel_argmax, 151_936),
    }
    for name, shape in {
        "128, group 1": Shape(32, 32, 128),
        "128, group 7": Shape(28, 4, 128),
        "128, group 8": Shape(64, 8, 128, num_layers=80),
        "128, group 4, pages of 1": Shape(32, 8, 128, page_size=1),
        "128, group 4, pages of 64": Shape(32, 8, 128, page_size=64),
        "128, group 4, float16": Shape(32, 8, 128, dtype=torch.float16),
        "128, group 4, float32": Shape(32, 8, 128, dtype=torch.float32),
        "64, group 7": Shape(14, 2, 64),
        "80, group 3": Shape(12, 4, 80),
        "32, group 2": Shape(8, 4, 32),
        "256, group 4": Shape(16, 4, 256),
    }.items():
        calls[f"decode {name}"] = partial(_decode, shape)
        calls[f"prefill {name}"] = partial(_prefill, shape)
    return calls


def compiled(name: str, call: Callable[[], object]) -> Iterator[Compiled]:
    """Every kernel that `call` would launch."""
    triton.runtime.driver.set_active(_NoDriver())
    with launch.noted() as launches:
        call()
    for noted in launches:
        kernel = noted.kernel.warmup(*noted.arguments, grid=noted.grid, **noted.options)
        yield _read(name, noted.kernel.__name__, kernel)


def _read(variant: str, name: str, kernel: Any) -> Compiled:  # noqa: ANN401  Triton's, which has no types
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        code = subprocess.run(
            [tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", code)
    if found is None:
        raise RuntimeError(f"{tool} says nothing of registers")
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", code, re.MULTILINE)
    loads = [opcode for opcode in opcodes if re.match(r"(LDG|LDGSTS)\b", opcode)]
    wide = [opcode for opcode in loads if ".128" in opcode]
    return Compiled(
        variant=variant,
        kernel=name,
        num_warps=kernel.metadata.num_warps,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        spills=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        shared_bytes=kernel.metadata.shared,
        tensor_core=next(
            (unit for unit in ("HGMMA", "HMMA") if any(o.startswith(unit) for o in opcodes)), ""
        ),
        wide_loads=len(wide),
        narrow_loads=len(loads) - len(wide),
    )


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _layer(shape: Shape, num_pages: int = 1000) -> Tensor:
    pool = _meta(
        num_pages, shape.num_kv_heads, shape.num_layers, 2, shape.page_size, shape.head_dim, dtype=shape.dtype
    )
    return pool[:, :, 0]


def _heads(shape: Shape, num_tokens: int) -> Tensor:
    """Of the fused projection."""
    return _meta(num_tokens, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim, dtype=shape.dtype)


def _rms_norm(size: int) -> object:
    return rms_norm(_meta(8, size), _meta(size), 1e-6)


def _rotary(shape: Shape) -> None:
    angles = _meta(8, shape.head_dim // 2)
    rotary_(_heads(shape, 8)[:, : shape.num_heads + shape.num_kv_heads], angles, angles)


def _rotate_and_store(shape: Shape, has_norms: bool = False) -> None:
    angles, index = _meta(8, shape.head_dim // 2), _meta(8, dtype=torch.int64)
    norm = _meta(shape.head_dim) if has_norms else None
    rotate_and_store_(_heads(shape, 8), _layer(shape), angles, angles, index, index, norm, norm, 1e-6)


def _store_kv(shape: Shape) -> None:
    kv = _heads(shape, 8)[:, shape.num_heads :].view(8, 2, shape.num_kv_heads, shape.head_dim)
    index = _meta(8, dtype=torch.int64)
    store_kv_(_layer(shape), kv, index, index)


def _gumbel_argmax(vocab_size: int) -> object:
    numbers = _meta(8, dtype=torch.int64)
    logits = _meta(8, vocab_size, dtype=torch.float32)
    return gumbel_argmax(logits, _meta(8, dtype=torch.float32), numbers, numbers, numbers)


def _decode(shape: Shape, num_rows: int = 8) -> object:
    plan = PagedPlan(
        tables=_meta(num_rows, 1024, dtype=torch.int32),
        decodes=_meta(num_rows, 3, dtype=torch.int32),
        prefills=_meta(0, 4, dtype=torch.int32),
        longest_prefill=0,
        num_splits=splits_of(num_rows, shape.num_kv_heads),
    )
    q = _heads(shape, num_rows)[:, : shape.num_heads]
    return paged_attention(q, _layer(shape), plan, shape.head_dim**-0.5)


def _prefill(shape: Shape) -> object:
    plan = PagedPlan(
        tables=_meta(1, 1024, dtype=torch.int32),
        decodes=_meta(0, 3, dtype=torch.int32),
        prefills=_meta(1, 4, dtype=torch.int32),
        longest_prefill=2048,
        num_splits=1,
    )
    q = _heads(shape, 2048)[:, : shape.num_heads]
    return paged_attention(q, _layer(shape), plan, shape.head_dim**-0.5)


def table(results: list[Compiled]) -> str:
    """As Markdown."""
    lines = [
        "| variant | kernel | warps | registers | spills | shared, KiB | tensor cores | 16-byte loads "
        "| others |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.variant} | `{r.kernel}` | {r.num_warps} | {r.registers} | {r.spills} "
        f"| {r.shared_bytes / 1024:.1f} | {r.tensor_core or '-'} | {r.wide_loads} | {r.narrow_loads} |"
        for r in results
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/dev kernel_table", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--slow", action="store_true", help="all variants, not only those of CI")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    results = [
        kernel
        for name, call in variants(asked.slow).items()
        if not asked.names or name.startswith(tuple(asked.names))
        for kernel in compiled(name, call)
    ]
    print(json.dumps([asdict(kernel) for kernel in results]) if asked.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
