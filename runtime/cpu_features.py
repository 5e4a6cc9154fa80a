"""Which number formats this host's processor multiplies in hardware."""

from __future__ import annotations

from pathlib import Path

# The flags of /proc/cpuinfo (x86 and Arm) that mean fast matrix products of a format. Without one, torch's
# products in that format are 20 times slower than in fp32.
_FLAGS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}


def native_dtypes(cpuinfo: str | None = None) -> frozenset[str]:
    """Of float32, bfloat16 and float16 those that are fast here. `cpuinfo`: as in /proc/cpuinfo."""
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.exists() else ""
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags.update(value.split())
    return frozenset({"float32", *(dtype for dtype, any_of in _FLAGS.items() if flags & any_of)})
