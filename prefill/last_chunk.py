"""How long the last chunk of a prompt shall be, so that little is left on the wire when it is computed.

Chunks are as long as the budget allows, and what remains is the last one: of so many forwards no other
choice leaves less for the end. One forward more, for a tail, is worth its cost only where the pages of a
long last chunk take longer than that forward: on a slow wire, or with a model whose chunks are quick. So it
is decided by what was measured on this node:

    step_s    what a forward costs however few tokens it has: the shortest of the latest ones
    token_s   what each token adds to that
    wire_s    what a token's KV takes on the wire

Cutting L tokens into L − T and T, the pages of the first part are in place when the tail is computed if
(L − T) · wire_s ≤ step_s + T · token_s; the smallest such T leaves T · wire_s of L · wire_s behind the end.
"""

from __future__ import annotations

from collections import deque

_FORWARDS = 256  # the shortest of so many; an estimate that is too high only means that nothing is cut
_KEPT = 0.8  # of an old average, against 0.2 of what was just measured
# A tail costs time to the first token and saves time to the second: it must save at least twice what it
# costs, and cost at most this share of the prompt's own prefill.
_MIN_SAVED_PER_COST = 2.0
_MAX_COST_SHARE = 0.03


class LastChunk:
    def __init__(self, page_size: int, bytes_per_token: int) -> None:
        self._page_size = page_size
        self._bytes_per_token = bytes_per_token
        self._forward_s: deque[float] = deque(maxlen=_FORWARDS)
        self._token_s = 0.0
        self._wire_s = 0.0

    def measured_forward(self, num_tokens: int, seconds: float) -> None:
        """One forward, of `num_tokens` prompt tokens of any number of prompts."""
        self._forward_s.append(seconds)
        beyond = max(0.0, seconds - min(self._forward_s)) / num_tokens
        self._token_s = _KEPT * self._token_s + (1 - _KEPT) * beyond if self._token_s else beyond

    def measured_wire(self, num_bytes: int, seconds: float) -> None:
        """One hand-off: what was written, and how long writes were outstanding."""
        if num_bytes:
            token_s = self._bytes_per_token * seconds / num_bytes
            self._wire_s = _KEPT * self._wire_s + (1 - _KEPT) * token_s if self._wire_s else token_s

    def tail(self, start: int, end: int) -> int:
        """How many of the tokens [start, end), the last ones of a prompt, to leave for one forward more.

        0: compute them all now. What comes before the tail ends with a whole page.
        """
        if not self._forward_s or not self._wire_s or not self._token_s:
            return 0
        step_s = min(self._forward_s)
        num_tokens = end - start
        if num_tokens * self._wire_s <= _MIN_SAVED_PER_COST * step_s:
            return 0
        wanted = (num_tokens * self._wire_s - step_s) / (self._token_s + self._wire_s)
        boundary = (end - max(1, int(wanted))) // self._page_size * self._page_size
        saved_s = (boundary - start) * self._wire_s
        prefill_s = end * self._token_s
        if (
            boundary <= start
            or saved_s < _MIN_SAVED_PER_COST * step_s
            or step_s > _MAX_COST_SHARE * prefill_s
        ):
            return 0
        return end - boundary
