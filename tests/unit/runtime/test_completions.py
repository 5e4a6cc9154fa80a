"""Results that a thread hands to the loop."""

from __future__ import annotations

import select
import threading

from pdserve.runtime.completions import Completions


def is_readable(completions: Completions[int], timeout_s: float = 0.0) -> bool:
    return bool(select.select([completions], [], [], timeout_s)[0])


def test_the_descriptor_is_readable_exactly_while_there_are_results() -> None:
    completions = Completions[int]()
    assert not is_readable(completions)
    completions.push(1)
    completions.push(2)
    assert is_readable(completions)
    assert completions.drain() == [1, 2]
    assert not is_readable(completions)
    assert completions.drain() == []


def test_a_push_ends_the_sleep_of_another_thread() -> None:
    completions = Completions[int]()
    pusher = threading.Timer(0.05, completions.push, [1])
    pusher.start()
    assert is_readable(completions, timeout_s=20)
    assert completions.drain() == [1]
    pusher.join()


def test_a_thread_that_ends_late_does_no_harm() -> None:
    completions = Completions[int]()
    completions.push(1)
    completions.close()
    completions.close()
    completions.push(2)
    assert completions.fileno() == -1
