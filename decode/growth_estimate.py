"""How much of the growth that is possible admission counts with.

A request may generate up to its max_tokens, and most end long before. Reserving all of it leaves most of the
pool unused, reserving nothing throws requests out again and again. So admission reserves a *share* of what
each admitted choice may still grow by: it starts high, sinks with each step that goes well, and after a
retraction it is what would have been right. (SGLang's new_token_ratio, with its constants.)
"""

from __future__ import annotations

_INITIAL_SHARE = 0.7
_MIN_SHARE_OF_INITIAL = 0.14
_NUM_STEPS_TO_MIN = 600
_NUM_STEPS_AHEAD = 20  # after a retraction what runs is given these before pages may be short again


class GrowthEstimate:
    """`conservativeness` multiplies the share; where the lowest share is 1, nothing is ever retracted."""

    def __init__(self, conservativeness: float = 1.0) -> None:
        self.set_conservativeness(conservativeness)

    def set_conservativeness(self, conservativeness: float) -> None:
        """Begins anew with it."""
        if conservativeness <= 0:
            raise ValueError(f"conservativeness is {conservativeness}, a number above 0 is expected")
        self.conservativeness = conservativeness
        self._initial = min(1.0, _INITIAL_SHARE * conservativeness)
        self._min = min(1.0, _INITIAL_SHARE * _MIN_SHARE_OF_INITIAL * conservativeness)
        self.share = self._initial

    def step(self) -> None:
        """A decode step found a page for every choice."""
        self.share = max(self._min, self.share - (self._initial - self._min) / _NUM_STEPS_TO_MIN)

    def retracted(self, *, num_output_tokens: int, max_tokens: int, num_sequences: int) -> None:
        """Too much was admitted. The figures are sums over the choices that go on."""
        used = num_output_tokens + _NUM_STEPS_AHEAD * num_sequences
        self.share = max(self.share, min(1.0, used / max(1, max_tokens)))
