"""Who gives its pages back when what runs needs more than there is."""

from __future__ import annotations

from collections.abc import Iterable

from .sequence import DecodeRequest


def choose_victim(requests: Iterable[DecodeRequest], *, may_wait: bool) -> DecodeRequest | None:
    """The youngest request that was not promised all it can need; None: the choice waits for a page.

    `requests`: all that hold pages which they can give back, in order of arrival. The oldest of them is
    spared as long as others hold pages that will come back (`may_wait`): those that were promised everything,
    hand-offs that are on their way, pages in quarantine that settle. So the oldest always gets to its end,
    and since who was retracted once comes back only with all it can need, nobody is retracted twice.
    """
    held = [request for request in requests if not request.message.was_retracted]
    if len(held) == 1 and may_wait:
        return None
    return held[-1] if held else None
