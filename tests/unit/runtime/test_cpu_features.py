"""What /proc/cpuinfo says about number formats."""

from __future__ import annotations

import pytest

from pdserve.runtime.cpu_features import native_dtypes


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("", {"float32"}),
        ("flags\t\t: fpu avx2 fma\n", {"float32"}),
        ("processor\t: 0\nflags\t\t: avx2 avx512_bf16\n", {"float32", "bfloat16"}),
        ("flags\t\t: amx_bf16 amx_fp16\n", {"float32", "bfloat16", "float16"}),
        ("Features\t: fp asimd asimdhp bf16\n", {"float32", "bfloat16", "float16"}),
        ("bugs\t\t: bf16\n", {"float32"}),
    ],
)
def test_flags(cpuinfo: str, expected: set[str]) -> None:
    assert native_dtypes(cpuinfo) == expected


def test_this_host_has_float32() -> None:
    assert "float32" in native_dtypes()
