"""choose_victim: the youngest that was promised least, never the oldest while that can wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pdserve.decode.retraction import choose_victim
from pdserve.decode.sequence import RequestState

if TYPE_CHECKING:
    from .conftest import Requests

RUNNING, LOCAL = RequestState.RUNNING, RequestState.LOCAL_PREFILL


def test_the_youngest_goes(make: Requests) -> None:
    requests = [make(name, state=RUNNING) for name in "abc"]
    assert choose_victim(requests, may_wait=True) is requests[2]


def test_who_prefills_here_may_go_too(make: Requests) -> None:
    requests = [make("a", state=RUNNING), make("b", state=LOCAL)]
    assert choose_victim(requests, may_wait=True) is requests[1]


@pytest.mark.parametrize("state", [RequestState.WAITING, RequestState.HANDOFF])
def test_who_has_nothing_to_give_stays(make: Requests, state: RequestState) -> None:
    requests = [make("a", state=RUNNING), make("b", state=RUNNING), make("c", state=state)]
    assert choose_victim(requests, may_wait=True) is requests[1]


def test_who_was_retracted_before_stays(make: Requests) -> None:
    requests = [make("a", state=RUNNING), make("b", state=RUNNING, was_retracted=True)]
    assert choose_victim(requests, may_wait=True) is None
    requests.append(make("c", state=RUNNING))
    assert choose_victim(requests, may_wait=True) is requests[2]


def test_the_oldest_goes_only_when_nothing_would_come_back(make: Requests) -> None:
    oldest = make("a", state=RUNNING)
    assert choose_victim([oldest], may_wait=True) is None
    assert choose_victim([oldest], may_wait=False) is oldest
    assert choose_victim([], may_wait=False) is None
