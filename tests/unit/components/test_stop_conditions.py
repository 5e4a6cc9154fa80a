"""check_finish: one table, one row a rule."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pdserve.components.stop_conditions import check_finish
from pdserve.messages.node import Finish
from pdserve.messages.sampling import SamplingParams

EOS = (2, 3)
LENGTH = Finish(reason="length")


def stop(token_id: int) -> Finish:
    return Finish(reason="stop", matched=token_id)


@pytest.mark.parametrize(
    ("sampling", "token_id", "num_output_tokens", "expected"),
    [
        pytest.param({}, 9, 1, None, id="goes on"),
        pytest.param({}, 2, 1, stop(2), id="eos"),
        pytest.param({}, 3, 1, stop(3), id="any of several eos"),
        pytest.param({"stop_token_ids": (9,)}, 9, 1, stop(9), id="stop id"),
        pytest.param({"stop_token_ids": (9,)}, 2, 1, stop(2), id="eos beside stop ids"),
        pytest.param({"ignore_eos": True}, 2, 1, None, id="ignore_eos"),
        pytest.param({"ignore_eos": True, "stop_token_ids": (9,)}, 9, 1, stop(9), id="ignore_eos, stop id"),
        pytest.param({"ignore_eos": True, "stop_token_ids": (2,)}, 2, 1, stop(2), id="eos as a stop id"),
        pytest.param({"min_tokens": 3}, 2, 1, None, id="eos before min_tokens"),
        pytest.param({"min_tokens": 3}, 2, 2, None, id="eos one before min_tokens"),
        pytest.param({"min_tokens": 3}, 2, 3, stop(2), id="eos at min_tokens"),
        pytest.param({"min_tokens": 3, "stop_token_ids": (9,)}, 9, 2, None, id="stop id before min_tokens"),
        pytest.param({"max_tokens": 4}, 9, 3, None, id="one before max_tokens"),
        pytest.param({"max_tokens": 4}, 9, 4, LENGTH, id="max_tokens"),
        pytest.param({"max_tokens": 4}, 9, 5, LENGTH, id="past max_tokens"),
        pytest.param({"max_tokens": 4}, 2, 4, stop(2), id="eos as the last token"),
        pytest.param({"max_tokens": 4, "ignore_eos": True}, 2, 4, LENGTH, id="ignored eos as the last token"),
        pytest.param({"max_tokens": 2, "min_tokens": 3}, 2, 2, LENGTH, id="max_tokens below min_tokens"),
        pytest.param({"max_tokens": 100}, 9, 19, None, id="one before max_model_len"),
        pytest.param({"max_tokens": 100}, 9, 20, LENGTH, id="max_model_len"),
        pytest.param({"max_tokens": 100, "min_tokens": 50}, 9, 20, LENGTH, id="max_model_len, min_tokens"),
    ],
)
def test_check_finish(
    sampling: dict[str, object], token_id: int, num_output_tokens: int, expected: Finish | None
) -> None:
    """A prompt of 10 tokens, a model of 30."""
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    finish = check_finish(token_id, num_output_tokens, params, EOS, 30, 10 + num_output_tokens)
    assert finish == expected


@pytest.mark.process
def test_the_router_can_ask_without_torch() -> None:
    script = "import sys, pdserve.components.stop_conditions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
