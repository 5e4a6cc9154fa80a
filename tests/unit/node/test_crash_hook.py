from __future__ import annotations

import pytest

from pdserve.messages.node import AttemptFailed, TokenOutput, TokenOutputs
from pdserve.node.crash_hook import CrashHook

FAILED = AttemptFailed(request_id="a", attempt=1, code="deadline", reason="late", retriable=False)


def outputs(count: int) -> TokenOutputs:
    one = TokenOutput(request_id="a", attempt=1, choice=0, position=0, token_ids=(1,))
    return TokenOutputs(outputs=(one,) * count)


@pytest.mark.parametrize(("limit", "ends_at"), [(0, None), (1, 0), (3, 1), (4, 1), (5, 2), (7, None)])
def test_it_ends_once_with_the_output_that_reaches_the_limit(limit: int, ends_at: int | None) -> None:
    ends: list[int] = []
    num_done = 0
    hook = CrashHook(limit, lambda: ends.append(num_done))
    for count in (2, 2, 1):
        hook.sent(FAILED)
        hook.sent(outputs(count))
        num_done += 1
    assert ends == ([] if ends_at is None else [ends_at])
