"""StepProfiler: which forwards are in which trace, with torch's own profiler."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from pdserve.engine.forward_batch import ForwardBatch
from pdserve.engine.step_profiler import ProfileError, StepProfiler
from pdserve.messages.operation import DEFAULT_PROFILE_STEPS, StartProfile


def plan(folder: Path, **changes: object) -> StartProfile:
    return StartProfile(profile_id="p1", output_dir=str(folder / "traces"), activities=("CPU",), **changes)  # type: ignore[arg-type]


def run(profiler: StepProfiler, step: int, *, is_prefill: bool = False) -> None:
    batch = SimpleNamespace(step=step, num_prefill_tokens=9 if is_prefill else 0, row_ids=("r",))
    with profiler.step(cast(ForwardBatch, batch)):
        torch.ones(64, 64) @ torch.ones(64, 64)


def steps_in(path: Path) -> list[str]:
    """Of the forwards in a trace, in order: "prefill 3" for a prefill step with number 3."""
    document = json.loads(gzip.decompress(path.read_bytes()))
    found = [
        entry
        for entry in document["traceEvents"]
        if entry.get("cat") == "user_annotation" and " step " in entry["name"]
    ]
    base_us = document["baseTimeNanoseconds"] / 1000
    now_us = time.time() * 1e6
    assert all(now_us - 60e6 < base_us + entry["ts"] <= now_us for entry in found), "on the host's clock"
    assert any(entry.get("name") == "aten::mm" for entry in document["traceEvents"])
    names = [entry["name"].partition(":")[0] for entry in sorted(found, key=lambda entry: entry["ts"])]
    return [name.replace("step ", "") for name in names]


def test_so_many_steps_are_recorded_and_no_more(tmp_path: Path) -> None:
    profiler = StepProfiler("decode-1")
    run(profiler, 1)
    assert profiler.overhead_s == 0.0
    profiler.start(plan(tmp_path, num_steps=2))
    assert profiler.overhead_s > 2.0, "or a step that starts to record would be taken for one that hangs"
    for step in (2, 3, 4):
        run(profiler, step, is_prefill=step == 2)
    (path,) = profiler.stop()
    assert path.name == "p1-decode-1-all.trace.json.gz"
    assert steps_in(path) == ["prefill 2", "decode 3"]
    profiler.start(plan(tmp_path))
    run(profiler, 5)
    assert steps_in(*profiler.stop()) == ["decode 5"]


def test_a_profile_that_is_not_stopped_ends_by_itself(tmp_path: Path) -> None:
    """Its trace would hold the loop for seconds."""
    profiler = StepProfiler("decode-1")
    profiler.start(plan(tmp_path))
    for step in range(DEFAULT_PROFILE_STEPS + 2):
        run(profiler, step)
    (path,) = profiler.stop()
    assert steps_in(path) == [f"decode {step}" for step in range(DEFAULT_PROFILE_STEPS)]


def test_a_long_profile_has_files_that_are_soon_written(tmp_path: Path) -> None:
    """While torch writes one, the loop answers nobody."""
    profiler = StepProfiler("decode-1")
    profiler.start(plan(tmp_path, num_steps=70))
    for step in range(72):
        run(profiler, step)
    paths = profiler.stop()
    assert [path.name.removeprefix("p1-decode-1-").partition(".")[0] for path in paths] == [
        "all",
        "all-2",
        "all-3",
    ]
    assert [len(steps_in(path)) for path in paths] == [32, 32, 6]
    assert steps_in(paths[2])[-1] == "decode 69"


def test_a_stage_that_does_not_come_leaves_the_recorder_to_the_other(tmp_path: Path) -> None:
    profiler = StepProfiler("decode-1")
    profiler.start(plan(tmp_path, num_steps=3, by_stage=True))
    run(profiler, 0, is_prefill=True)
    for step in range(1, 40):
        run(profiler, step)
    prefill, decode = profiler.stop()
    assert (len(steps_in(prefill)), steps_in(decode)) == (32, ["decode 32", "decode 33", "decode 34"])


def test_stages_have_traces_of_their_own(tmp_path: Path) -> None:
    profiler = StepProfiler("decode-1")
    profiler.start(plan(tmp_path, num_steps=2, by_stage=True))
    for step, is_prefill in enumerate([False, False, False, True, True, True]):
        run(profiler, step, is_prefill=is_prefill)
    traces = {path.name.split("-")[-1].partition(".")[0]: steps_in(path) for path in profiler.stop()}
    assert traces == {"decode": ["decode 0", "decode 1"], "prefill": ["prefill 3", "prefill 4"]}


def test_without_a_forward_there_is_no_trace(tmp_path: Path) -> None:
    profiler = StepProfiler("prefill-1")
    profiler.start(plan(tmp_path))
    with pytest.raises(ProfileError, match="a profile is running"):
        profiler.start(plan(tmp_path))
    assert profiler.stop() == ()


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("a file")
    profiler = StepProfiler("prefill-1")
    with pytest.raises(ProfileError, match="File exists"):
        profiler.start(plan(tmp_path))
    (tmp_path / "traces").unlink()
    profiler.start(plan(tmp_path))
    profiler.stop()


def test_a_trace_that_cannot_be_written_does_not_end_the_engine(tmp_path: Path) -> None:
    profiler = StepProfiler("prefill-1")
    profiler.start(plan(tmp_path, num_steps=1))
    (tmp_path / "traces").rmdir()
    run(profiler, 1)
    with pytest.raises(ProfileError, match="was not written"):
        profiler.stop()
    profiler.start(plan(tmp_path))
    profiler.stop()
