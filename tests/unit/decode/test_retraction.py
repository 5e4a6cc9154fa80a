"""choose_victim: the youngest that was promised least, never the oldest while that can wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdserve.decode.retraction import choose_victim

if TYPE_CHECKING:
    from .conftest import Requests


def test_the_youngest_goes(make: Requests) -> None:
    requests = [make(name) for name in "abc"]
    assert choose_victim(requests, may_wait=True) is requests[2]


def test_who_was_retracted_before_stays(make: Requests) -> None:
    requests = [make("a"), make("b", was_retracted=True)]
    assert choose_victim(requests, may_wait=True) is None
    requests.append(make("c"))
    assert choose_victim(requests, may_wait=True) is requests[2]


def test_the_oldest_goes_only_when_nothing_would_come_back(make: Requests) -> None:
    oldest = make("a")
    assert choose_victim([oldest], may_wait=True) is None
    assert choose_victim([oldest], may_wait=False) is oldest
    assert choose_victim([], may_wait=False) is None
