"""Durations: none contradicts another, and all are scaled alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import pdserve
from pdserve.runtime.timing import UNSCALED, Timing

FOLDERS = {"api", "components", "decode", "engine", "front", "links", "messages", "node", "prefill", "ranks"}
FOLDERS |= {"router", "runtime", "transfer", "weights", "cli.py"}

# Seconds that nobody waits for another process, and why they are constants.
LOOKS_AGAIN = {  # at what is its own, or before anybody could tell the difference
    "decode/scheduler.py": {"_DEADLINE_CHECK_S"},
    "node/run.py": {"_LONGEST_SLEEP_S"},
    "ranks/worker.py": {"_LONGEST_SLEEP_S"},
    "router/members.py": {"AWAITED_PING_INTERVAL_S", "UNREADY_PING_INTERVAL_S"},
    "router/service.py": {"SHORTEST_SLEEP_S", "WAIT_POLL_S"},
    "router/state.py": {"BUSY_TICK_S", "IDLE_TICK_S", "STALL_S"},
    "router/updates/coordinator.py": {"LOOK_AGAIN_S"},
    "router/updates/rollout.py": {"COMMIT_AGAIN_S"},
    "runtime/garbage.py": {"INTERVAL_S", "LONGEST_S"},
    "runtime/returned_memory.py": {"INTERVAL_S"},
    "runtime/supervisor.py": {"_POLL_S"},
    "transfer/backends/pump.py": {"CHECK_INTERVAL_S", "STALLED_AFTER_S", "STALLED_CHECK_INTERVAL_S"},
    "components/invariant_checker.py": {"IDLE_FOR_S"},
}
OF_A_MESSAGE = {  # what it may say, or what it means where it does not say
    "api/http/errors.py": {"_DEFAULT_RETRY_AFTER_S"},
    "messages/operation.py": {"MAX_FORWARD_SLEEP_S"},
    "messages/weights.py": {"LEASE_S", "MAX_GROUP_TIMEOUT_S"},
    "router/admission.py": {"MAX_RETRY_AFTER_S"},
}
MEASURED = {  # and what is kept of it, or told in the log
    "api/surfaces/metrics.py": {"_E2E_BUCKETS_S", "_ITL_BUCKETS_S", "_TTFT_BUCKETS_S"},
    "api/text/timelines.py": {"KEPT_S", "_STAGE_BUCKETS_S"},
    "components/metrics_reporter.py": {"_STEP_BUCKETS_S", "_TRANSFER_BUCKETS_S"},
    "engine/step_profiler.py": {"_OVERHEAD_S"},
    "front/facts.py": {"_STARTED_UNIX_S"},
    "router/first_token_rate.py": {"_MIN_WINDOW_S"},
    "messages/link_guard.py": {"_TELL_INTERVAL_S"},
    "transfer/wire_meter.py": {"RECENT_S"},
}
OF_THE_SYSTEM = {  # of the interpreter, of faults made on purpose, of who ends a cluster from outside
    "node/start.py": {"_SWITCH_INTERVAL_S"},
    "runtime/cluster_process.py": {"_GRACE_S"},
    "transfer/backends/faulty.py": {"HELD_S", "LATE_S"},
}


@pytest.mark.parametrize("factor", [0.01, 0.25, 1.0, 100.0])
def test_a_factor_scales_every_duration(factor: float) -> None:
    scaled = UNSCALED.scaled(factor)
    assert asdict(scaled) == {name: seconds * factor for name, seconds in asdict(UNSCALED).items()}
    assert scaled.settle_margin_s == factor * UNSCALED.settle_margin_s


def test_none_is_for_nobody() -> None:
    """What nobody waits for is no duration of ours."""
    text = "".join(text for _, text in sources())
    assert [name for name in asdict(UNSCALED) if not re.search(rf"timing\.{name}\b", text)] == []


def sources() -> Iterator[tuple[str, str]]:
    """Path and text of each file that the product's processes run."""
    root = Path(pdserve.__file__).parent
    for path in root.rglob("*.py"):
        if path.relative_to(root).parts[0] in FOLDERS:
            yield str(path.relative_to(root)), path.read_text()


def test_no_other_place_says_how_long_processes_wait() -> None:
    known: dict[str, set[str]] = {**LOOKS_AGAIN, **OF_A_MESSAGE, **MEASURED, **OF_THE_SYSTEM}
    constant = re.compile(r"^(_?[A-Z][A-Z0-9_]*_S)\b.*=", re.MULTILINE)
    assert {path: set(found) for path, text in sources() if (found := constant.findall(text))} == known


def test_no_call_waits_by_default() -> None:
    """A number in a signature is a duration that no `Timing` scales."""
    default = re.compile(r"\b(?:timeout|interval|wait|grace)_s: float = [0-9]")
    of_one_process = {"engine/worker_thread.py", "engine/job_thread.py", "runtime/logs.py"}
    assert {path for path, text in sources() if default.search(text)} == of_one_process


def test_all_are_seconds() -> None:
    assert all(name.endswith("_s") and seconds > 0 for name, seconds in asdict(Timing()).items())


@pytest.mark.parametrize(
    ("rule", "odd"),
    [
        ("lease_s > 2 * front_ping_interval_s", {"lease_s": 2.0}),
        ("pong_timeout_s > ping_interval_s", {"pong_timeout_s": 1.0}),
        ("peer_silence_s > peer_ping_interval_s", {"peer_ping_interval_s": 2.0}),
        ("node_grace_s > drain_s", {"drain_s": 15.0}),
        ("max_restart_s >= restart_s", {"restart_s": 61.0}),
    ],
)
def test_one_that_contradicts_itself_cannot_be_made(rule: str, odd: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(rule)} is expected of Timing"):
        replace(UNSCALED, **odd)
