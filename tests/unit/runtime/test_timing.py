"""Durations: none contradicts another, and all are scaled alike."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import pdserve
from pdserve.runtime.timing import UNSCALED, Timing

FOLDERS = {"decode", "front", "node", "prefill", "ranks", "router", "runtime"}
FOLDERS |= {"transfer", "weights", "cli.py"}


@pytest.mark.parametrize("factor", [0.01, 0.25, 1.0, 100.0])
def test_a_factor_scales_every_duration(factor: float) -> None:
    scaled = UNSCALED.scaled(factor)
    assert asdict(scaled) == {name: seconds * factor for name, seconds in asdict(UNSCALED).items()}
    assert scaled.settle_margin_s == factor * UNSCALED.settle_margin_s


def test_none_is_for_nobody() -> None:
    """What nobody waits for is no duration of ours."""
    root = Path(pdserve.__file__).parent
    sources = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] in FOLDERS]
    text = "".join(path.read_text() for path in sources)
    assert [name for name in asdict(UNSCALED) if not re.search(rf"timing\.{name}\b", text)] == []


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
