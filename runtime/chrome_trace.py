"""Chrome traces of several processes as one, on one clock."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True)
class NodeTrace:
    """One process's trace. `lead_s`: how far its host's clock is ahead of ours."""

    path: Path
    label: str
    lead_s: float = 0.0


def merge_traces(traces: Sequence[NodeTrace], merged: Path) -> None:
    """Writes all events to `merged` (gzip), times in microseconds since the first of them.

    Every trace gets a process of its own, named by its label: pids of several hosts may be the same.
    Raises OSError for a file that cannot be read or written, msgspec.DecodeError for one that is no trace.
    """
    documents = [(trace, msgspec.json.decode(gzip.decompress(trace.path.read_bytes()))) for trace in traces]
    placed: list[dict[str, Any]] = []
    for position, (trace, document) in enumerate(documents):
        # Unix microseconds of our clock; a float still tells a quarter of one apart.
        base_us = int(document.get("baseTimeNanoseconds", 0)) / 1000 - trace.lead_s * 1e6
        pids = {event.get("pid"): None for event in document["traceEvents"]}
        number = {pid: position * 1000 + index for index, pid in enumerate(pids)}
        for event in document["traceEvents"]:
            moved = {**event, "pid": number[event.get("pid")]}
            if "ts" in event:
                moved["ts"] = event["ts"] + base_us
            if event.get("name") == "process_name":
                moved["args"] = {"name": trace.label}
            placed.append(moved)
    first_us = min((event["ts"] for event in placed if event["ph"] != "M" and "ts" in event), default=0.0)
    for event in placed:
        if "ts" in event:
            event["ts"] = max(0.0, event["ts"] - first_us)
    content = {
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": int(first_us * 1000),
        "traceEvents": placed,
    }
    merged.write_bytes(gzip.compress(msgspec.json.encode(content), compresslevel=3))
