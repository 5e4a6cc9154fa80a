"""Which waiting requests may have pages now, so that everyone's turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .sequence import DecodeRequest


@dataclass(frozen=True, slots=True)
class Capacity:
    """What admission may give away at this moment."""

    pages: int  # that nobody holds, was promised or is expected to need
    sequences: int  # places in the batch
    most_pages: int  # that could be given away if all that runs had ended


def choose_admitted(
    waiting: Iterable[DecodeRequest],
    capacity: Callable[[], Capacity],
    pages_needed: Callable[[DecodeRequest], int],
    now: float,
    overtaking_s: float,
) -> Iterator[DecodeRequest]:
    """Oldest first; who does not fit is overtaken by who does, until it has waited for `overtaking_s`.

    Nobody waits for one who would not fit into an empty node: what it lacks may never come back.
    The caller admits each request before it asks for the next; `capacity` is asked again after each, as what
    one takes or locks changes what is left by more than its own need.
    """
    left = capacity()
    for request in waiting:
        need, num_choices = pages_needed(request), len(request.sequences)
        if need <= left.pages and num_choices <= left.sequences:
            yield request
            left = capacity()
        elif need <= left.most_pages and now - request.arrived_s > overtaking_s:
            return
