"""Whether a decode node computes a prompt itself instead of asking the prefill node.

What decode holds of a prompt saves wire, what prefill holds saves compute. A prompt of which decode holds
nothing goes to prefill: that is what it is for. A follow-up turn finds its history on decode, and often only
a few tokens are missing.
"""

from __future__ import annotations

_WEIGHT = 0.2  # of the newest measurement
_STEP_SHARE = 0.5  # by so much prompt tokens may lengthen the steps of running streams
_MAX_CHUNK = 256  # tokens


class LocalPrefillPolicy:
    """Compares what the two ways cost, in seconds that clients wait.

    threshold: where given, prompts of which at most so many tokens are missing are computed here, no other.
    chunk_tokens: prompt tokens of one step beside running streams; None: by what was measured.
    page_size, page_bytes: of a KV page.
    """

    def __init__(
        self, *, threshold: int | None, chunk_tokens: int | None, page_size: int, page_bytes: int
    ) -> None:
        self.threshold = threshold  # may be changed at any time
        self._fixed_chunk_tokens = chunk_tokens
        self._page_size = page_size
        self._page_bytes = page_bytes
        # Measured; None: not yet.
        self._local_s: float | None = None  # per prompt token
        self._prefill_s: float | None = None  # per prompt token
        self._wire_s: float | None = None  # per byte
        self._step_s: float | None = None  # of a step that only decodes

    @property
    def chunk_tokens(self) -> int:
        """Prompt tokens that running streams bear in one step: half as much again as it takes without.

        Never less than a page, so that a full hit is one step.
        """
        if self._fixed_chunk_tokens is not None:
            return self._fixed_chunk_tokens
        token_s = self._local_s or self._prefill_s
        if self._step_s is None or token_s is None:
            return self._page_size
        return max(self._page_size, min(_MAX_CHUNK, int(_STEP_SHARE * self._step_s / token_s)))

    def is_local(
        self, *, num_tokens: int, num_cached: int, num_ahead_on_prefill: int, num_running: int
    ) -> bool:
        """num_tokens: of the prompt, of which decode holds the first num_cached.

        num_ahead_on_prefill: prompt tokens that the prefill node computes before this prompt's first output
        token, those of other prompts included; an estimate. num_running: requests that each step here serves.
        """
        num_missing = num_tokens - num_cached
        if self.threshold is not None:
            return num_missing <= self.threshold
        if num_cached == 0:
            return False
        if num_missing <= self.chunk_tokens:
            return True
        return self._local_cost_s(num_missing, num_running) < self._remote_cost_s(
            num_missing, num_ahead_on_prefill
        )

    def _local_cost_s(self, num_missing: int, num_running: int) -> float:
        """Its own wait, and that of every stream that steps with it."""
        return num_missing * self._token_s(self._local_s) * (1 + num_running)

    def _remote_cost_s(self, num_missing: int, num_ahead: int) -> float:
        num_pages = -(-num_missing // self._page_size)
        wire_s = num_pages * self._page_bytes * (self._wire_s or 0.0)
        return num_ahead * self._token_s(self._prefill_s) + wire_s

    def _token_s(self, measured: float | None) -> float:
        """A side that has not been measured is taken to be as fast as the other."""
        return measured or self._local_s or self._prefill_s or 1.0

    # ---- measurements -------------------------------------------------------------------------------

    def measured_local(self, num_tokens: int, seconds: float) -> None:
        """A step of nothing but prompt tokens."""
        self._local_s = _mean(self._local_s, num_tokens, seconds)

    def measured_step(self, seconds: float) -> None:
        """A step of nothing but output tokens."""
        self._step_s = _mean(self._step_s, 1, seconds)

    def measured_prefill(self, num_tokens: int, seconds: float) -> None:
        """The prefill node computed so many tokens of a prompt."""
        self._prefill_s = _mean(self._prefill_s, num_tokens, seconds)

    def measured_wire(self, num_bytes: int, seconds: float) -> None:
        """A hand-off had writes outstanding for so long."""
        self._wire_s = _mean(self._wire_s, num_bytes, seconds)


def _mean(before: float | None, amount: int, seconds: float) -> float | None:
    if amount <= 0 or seconds <= 0.0:
        return before
    each = seconds / amount
    return each if before is None else before + _WEIGHT * (each - before)
