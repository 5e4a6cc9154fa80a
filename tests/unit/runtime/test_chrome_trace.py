"""Merging traces: one clock, one process each, nothing lost."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pdserve.runtime.chrome_trace import NodeTrace, merge_traces

BASE_NS = 1_700_000_000_000_000_000


def write(path: Path, base_ns: int, *events: dict[str, Any]) -> Path:
    process = {"ph": "M", "name": "process_name", "pid": 7, "tid": 0, "ts": 0, "args": {"name": "python"}}
    content = {"baseTimeNanoseconds": base_ns, "traceEvents": [process, *events]}
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return path


def event(name: str, ts_us: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": 7, "tid": 1, "ts": ts_us, "dur": 5.0}


def test_events_of_hosts_with_other_clocks_and_bases_are_in_true_order(tmp_path: Path) -> None:
    # The second host's clock is 2 s ahead: what it calls 3 s was at 1 s.
    first = write(tmp_path / "a", BASE_NS, event("at 0.5 s", 500_000.0), event("at 2 s", 2_000_000.0))
    second = write(tmp_path / "b", BASE_NS + 1_000_000_000, event("at 1 s", 2_000_000.0))
    merged = tmp_path / "merged"
    merge_traces([NodeTrace(first, "prefill"), NodeTrace(second, "decode", lead_s=2.0)], merged)
    document = json.loads(gzip.decompress(merged.read_bytes()))
    spans = {entry["name"]: entry for entry in document["traceEvents"] if entry["ph"] == "X"}
    times = [spans[name]["ts"] for name in ("at 0.5 s", "at 1 s", "at 2 s")]
    assert times == pytest.approx([0.0, 500_000.0, 1_500_000.0], abs=1.0)
    assert document["baseTimeNanoseconds"] == pytest.approx(BASE_NS + 500_000_000, abs=1000)

    names = {
        entry["pid"]: entry["args"]["name"]
        for entry in document["traceEvents"]
        if entry["name"] == "process_name"
    }
    assert sorted(names.values()) == ["decode", "prefill"], "though both had the same pid"
    assert names[spans["at 1 s"]["pid"]] == "decode"


def test_a_file_that_is_not_here_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        merge_traces([NodeTrace(tmp_path / "other host", "decode")], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
