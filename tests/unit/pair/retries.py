"""What a router does for one request when attempts are retracted: it keeps the ids and tries again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pdserve.messages.node import Finish

from .cluster import Pair

FREE = ("retracted", "busy")


@dataclass
class RetriedRequest:
    """One request over all of its attempts. Call `pump` after each turn of the pair."""

    pair: Pair
    request_id: str
    prompt: Sequence[int]
    choices: tuple[int, ...] = (0,)
    options: dict[str, Any] = field(default_factory=dict)
    kept: dict[int, list[int]] = field(default_factory=dict)  # of attempts that are over
    finishes: dict[int, Finish] = field(default_factory=dict)
    failure: str = ""  # a code that is no reason to try again
    num_retractions: dict[int, int] = field(default_factory=dict)  # by choice
    _open: dict[int, tuple[int, ...]] = field(default_factory=dict)  # attempt -> its choices
    _last_attempt: int = 0

    def start(self) -> None:
        self._try(self.choices)
        self.pair.settle()

    def _try(self, choices: tuple[int, ...]) -> None:
        self._last_attempt += 1
        self._open[self._last_attempt] = choices
        self.pair.generate(
            self.request_id,
            self.prompt,
            attempt=self._last_attempt,
            output_ids=self.kept.get(choices[0], ()),
            choices=choices,
            was_retracted=any(choice in self.num_retractions for choice in choices),
            **self.options,
        )

    def pump(self) -> bool:
        """Whether a new attempt was made."""
        tried = False
        for attempt, choices in list(self._open.items()):
            base = len(self.kept.get(choices[0], ()))
            stream = self.pair.stream(self.request_id, attempt, base=base)
            if stream.failure is None:
                if set(choices) <= stream.finishes.keys():
                    self._take(attempt, stream.tokens, stream.finishes)
                continue
            self._take(attempt, stream.tokens, stream.finishes)
            if stream.failure.code not in FREE:
                self.failure = stream.failure.code
                continue
            idle = tuple(choice for choice in choices if choice not in self.finishes)
            if stream.failure.code == "retracted":
                self.num_retractions |= {c: self.num_retractions.get(c, 0) + 1 for c in idle}
            for group in [(choice,) for choice in idle] if any(self.kept.values()) else [idle]:
                self._try(group)
                tried = True
        return tried

    def _take(self, attempt: int, tokens: dict[int, list[int]], finishes: dict[int, Finish]) -> None:
        del self._open[attempt]
        self.finishes |= finishes
        for choice, token_ids in tokens.items():
            self.kept[choice] = [*self.kept.get(choice, ()), *token_ids]

    @property
    def is_over(self) -> bool:
        return not self._open

    def tokens(self, choice: int = 0) -> list[int]:
        """All that came, of attempts that run too."""
        so_far = list(self.kept.get(choice, ()))
        for attempt, choices in self._open.items():
            if choice in choices:
                stream = self.pair.stream(self.request_id, attempt, base=len(so_far))
                so_far += stream.tokens.get(choice, [])
        return so_far
