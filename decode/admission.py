"""Which waiting requests may have pages now, so that nobody ever runs out of them in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .sequence import DecodeRequest

# A request that does not fit lets smaller ones pass for this long; then the line waits for it.
OVERTAKING_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """What admission may give away at this moment."""

    pages: int  # neither taken nor promised
    sequences: int  # places in the batch
    most_pages: int  # that could be given away if all that runs had ended


def choose_admitted(
    waiting: Iterable[DecodeRequest],
    capacity: Capacity,
    pages_needed: Callable[[DecodeRequest], int],
    now: float,
) -> list[DecodeRequest]:
    """Oldest first; who does not fit is overtaken by who does, until it has waited OVERTAKING_LIMIT_S.

    Nobody waits for one who would not fit into an empty node: what it lacks may never come back.
    `pages_needed` is the most that a request can ever hold, growth included: since admission counts that,
    growth cannot fail and nothing that runs has to be thrown out.
    """
    admitted: list[DecodeRequest] = []
    pages, places = capacity.pages, capacity.sequences
    for request in waiting:
        need, num_choices = pages_needed(request), len(request.sequences)
        if need <= pages and num_choices <= places:
            admitted.append(request)
            pages -= need
            places -= num_choices
        elif need <= capacity.most_pages and now - request.arrived_s > OVERTAKING_LIMIT_S:
            break
    return admitted
