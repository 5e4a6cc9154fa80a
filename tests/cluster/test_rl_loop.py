"""A slice of docs/examples/rl_loop.py, and that its check finds what is stamped with the wrong weights."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pdserve
from pdserve.runtime.config import SHIPPED_MODEL

EXAMPLES = Path(pdserve.__file__).resolve().parent / "docs" / "examples"


@pytest.fixture(scope="module")
def rl_loop() -> ModuleType:
    """The example, which is a script: it finds its neighbour beside itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module("rl_loop")


@pytest.mark.slow
@pytest.mark.timeout(600)  # 25 s on two cores of its own
def test_every_token_agrees_with_the_weights_that_it_is_stamped_with() -> None:
    command = [sys.executable, str(EXAMPLES / "rl_loop.py"), "--updates", "5"]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, timeout=190, check=False)
        counts = dict(re.findall(r"([A-Z_]+) (\S+)", "".join(done.stdout.splitlines()[-1:])))
        if counts.get("REFUSED") != "0":  # 178 attempts in 200 updates: five may have none
            break
    assert done.returncode == 0, done.stdout + done.stderr
    assert (counts["UPDATES"], counts["CROSSED"], counts["FAILURES"]) == ("5", "0", "0")
    assert int(counts["ROOMS"]) >= int(counts["SAMPLES"]) > 0
    assert int(counts["REFUSED"]) > 0
    assert float(counts["MAX_DELTA"]) <= 1e-3 < float(counts["UNDER_OTHERS"])


def test_a_wrong_stamp_is_found(rl_loop: ModuleType) -> None:
    torch.set_num_threads(1)
    policy, tally = rl_loop.Policy(SHIPPED_MODEL), rl_loop.Tally()
    bare = rl_loop.Sample(list(range(1, 20)), [5, 6, 7, 8], [], [(0, 4, "default")])
    with torch.no_grad():
        logprobs = policy.logprobs(bare, policy.weights["default"]).tolist()
    sample = dataclasses.replace(bare, logprobs=logprobs)
    tally.check(sample, policy)
    assert (tally.failures, tally.num_tokens) == ([], 4)

    policy.train([sample, dataclasses.replace(sample, output_ids=[5, 6, 8, 8])])
    policy.keep("step-1")
    tally.check(dataclasses.replace(sample, spans=[(0, 2, "default"), (2, 4, "step-1")]), policy)
    assert [re.sub(r"\S+$", "", failure) for failure in tally.failures] == [
        "tokens 2 to 4 under 'step-1' are off by "
    ]
    assert tally.max_other_delta == 0
    tally.compare(dataclasses.replace(sample, spans=[(0, 4, "step-1")]), policy)
    assert tally.max_other_delta == pytest.approx(0, abs=1e-5), "they are those of the weights before"
    tally.check(dataclasses.replace(sample, spans=[(0, 4, "nobody's")]), policy)
    assert tally.failures[1:] == ['a sample of version "nobody\'s", which is not kept']
