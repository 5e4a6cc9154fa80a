"""`scripts/dev step_cost`: every step that it times is one in which all requests decode."""

from __future__ import annotations

import pytest

from pdserve.scripts.tools import step_cost


@pytest.mark.parametrize("num_running", [1, 300])
def test_all_requests_decode_in_every_step(num_running: int) -> None:
    node = step_cost.Node(num_running, 3)
    for _ in range(3):
        assert node.num_decoding == num_running
        assert node.step_s() > 0


def test_requests_that_do_not_run_to_the_end_are_no_measurement() -> None:
    node = step_cost.Node(2, 3)
    for _ in range(step_cost.MOST_STEPS_TO_START + 4):
        node.step_s()
    assert node.num_decoding == 0
