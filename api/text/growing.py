"""Streams of which every event holds all of its output so far, as SGLang's do."""

from __future__ import annotations

from collections import defaultdict

from .pieces import OutputDelta, joined

# Up to so many tokens every delta is shown, and after that when the output has grown by a part in `_GROWTH`,
# as with SGLang's `--stream-interval`: what is sent of an output is then bounded by a multiple of its length,
# not by its square.
_ALWAYS_SHOWN_TOKENS = 512
_GROWTH = 128


class GrowingOutputs:
    """The outputs of one stream."""

    def __init__(self) -> None:
        self._so_far: defaultdict[int, list[OutputDelta]] = defaultdict(list)  # by the output's index
        self._num_shown: defaultdict[int, int] = defaultdict(int)  # tokens in the latest event

    def push(self, delta: OutputDelta) -> OutputDelta | None:
        """All of its output so far, or None when this is not shown yet."""
        index = delta.output.index
        self._so_far[index].append(delta)
        if delta.finish_reason is None and not is_due(delta.num_tokens, self._num_shown[index]):
            return None
        shown = joined(self._so_far[index])
        self._so_far[index] = [shown]
        self._num_shown[index] = shown.num_tokens
        return shown


def is_due(num_tokens: int, num_shown: int) -> bool:
    """Whether an event is to show all `num_tokens` of an output, of which the latest showed `num_shown`."""
    return num_tokens <= _ALWAYS_SHOWN_TOKENS or num_tokens >= num_shown + num_tokens // _GROWTH
