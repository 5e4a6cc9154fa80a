"""Records forwards with torch's profiler. Everything here runs on the engine's thread: the profiler sees the
operators of the thread that started it.
"""

from __future__ import annotations

import contextlib
import gzip
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..messages.operation import DEFAULT_PROFILE_STEPS, StartProfile
from ..runtime.errors import PdserveError
from .forward_batch import ForwardBatch

# Forwards in a file. What torch keeps of them it puts together and writes with the interpreter's lock held: a
# few tenths of a second for so many, in which the loop answers nobody; a longer profile has several files.
_MAX_TRACE_STEPS = 32
_ALL = "all"  # the one trace of a profile that does not tell stages apart
_STAGES = ("prefill", "decode")
_OVERHEAD_S = 6.0
_COMPRESSION = 3
_COPIED_BYTES = 1 << 18


class ProfileError(PdserveError):
    """A profile cannot begin, or its trace was not written."""


class StepProfiler:
    """`node` names this node in the files: for each stage that was recorded one, and further ones (`-2`, …)
    where it was long."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._plan: StartProfile | None = None
        self._remaining: dict[str, int] = {}  # stage -> forwards that are still to be recorded
        self._open: tuple[str, profile] | None = None  # the stage that is recorded now
        self._num_open_steps = 0  # forwards that it has, those of another stage included
        self._num_files: Counter[str] = Counter()  # of each stage
        self._traces: list[Path] = []
        self._error = ""

    def start(self, plan: StartProfile) -> None:
        """From the next forward on. Raises ProfileError when it cannot be done here."""
        if self._plan is not None:
            raise ProfileError("a profile is running")
        try:
            Path(plan.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ProfileError(f"{plan.output_dir}: {error.strerror}") from error
        self._plan = plan
        self._remaining = dict.fromkeys(
            _STAGES if plan.by_stage else (_ALL,), plan.num_steps or DEFAULT_PROFILE_STEPS
        )
        self._traces, self._error = [], ""
        self._num_files.clear()

    def stop(self) -> tuple[Path, ...]:
        """Ends what is still recorded; returns every trace since `start`. Raises ProfileError."""
        if self._open is not None:
            self._close()
        self._plan = None
        self._remaining = {}
        if self._error:
            raise ProfileError(self._error)
        return tuple(self._traces)

    @property
    def overhead_s(self) -> float:
        """What a step may take longer, as it starts to record (2 s the first time) or writes a trace."""
        return 0.0 if self._plan is None else _OVERHEAD_S

    @contextlib.contextmanager
    def step(self, batch: ForwardBatch) -> Iterator[None]:
        """Around each forward."""
        if self._plan is None:
            yield
            return
        kind = _STAGES[0] if batch.num_prefill_tokens else _STAGES[1]
        stage = kind if self._plan.by_stage else _ALL
        if self._open is None and stage in self._remaining:
            self._open = (stage, _started(self._plan))
            self._num_open_steps = 0
        num_prefill = batch.num_prefill_tokens
        with record_function(
            f"{kind} step {batch.step}: {len(batch.row_ids)} rows, {num_prefill} prefill tokens"
        ):
            yield
        if self._open is not None:
            self._num_open_steps += 1
            wanted = self._open[0]
            self._remaining[wanted] -= stage == wanted
            if not self._remaining[wanted] or self._num_open_steps == _MAX_TRACE_STEPS:
                self._close()

    def _close(self) -> None:
        """A trace that cannot be written must not end the engine: `stop` tells."""
        assert self._open is not None
        assert self._plan is not None
        stage, recorded = self._open
        self._open = None
        if not self._remaining[stage]:
            del self._remaining[stage]
        recorded.stop()
        self._num_files[stage] += 1
        number = f"-{self._num_files[stage]}" if self._num_files[stage] > 1 else ""
        name = f"{self._plan.profile_id}-{self._node}-{stage}{number}.trace.json.gz"
        path = Path(self._plan.output_dir) / name
        try:
            _write(recorded, path)
        except (OSError, RuntimeError) as error:
            self._error = f"{path} was not written: {error}"
            self._remaining = {}  # nor would the next one be
        else:
            self._traces.append(path)


def _write(recorded: profile, path: Path) -> None:
    """Raises OSError and RuntimeError. torch compresses by itself too, but line by line: that takes 30 times
    as long, and the interpreter's lock most of the time."""
    with tempfile.NamedTemporaryFile(suffix=".json") as plain:
        recorded.export_chrome_trace(plain.name)
        with Path(plain.name).open("rb") as source, gzip.open(path, "wb", _COMPRESSION) as target:
            shutil.copyfileobj(source, target, _COPIED_BYTES)


def _started(plan: StartProfile) -> profile:
    activities = {ProfilerActivity.CPU} if "CPU" in plan.activities else set()
    if "GPU" in plan.activities and torch.cuda.is_available():
        activities.add(ProfilerActivity.CUDA)
    recorder = profile(
        activities=activities or {ProfilerActivity.CPU},
        record_shapes=plan.record_shapes,
        with_stack=plan.with_stack,
    )
    recorder.start()
    return recorder
