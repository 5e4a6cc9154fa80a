"""A line in the log for each request that comes and for each that ends, as detailed as an operator wants."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence

import msgspec

from ..generation import ChoiceDelta, GenerateSpec

_log = logging.getLogger(__name__)

LEVELS = (0, 1, 2, 3)  # SGLang's: sizes; sampling too; the first ids too; all ids
_NUM_SHOWN_IDS = 64


class RequestLog:
    """`is_on` and `level` may be changed at any time: of a request that began while it was on, both lines."""

    def __init__(self, *, is_on: bool = False, level: int = 2) -> None:
        self.is_on = is_on
        self.level = level

    def begins(self, spec: GenerateSpec) -> RequestLine:
        line = RequestLine(spec, self.level if self.is_on else None)
        line.begins()
        return line


class RequestLine:
    """What is noted of one request. `level` None: nothing."""

    def __init__(self, spec: GenerateSpec, level: int | None) -> None:
        self._spec = spec
        self._level = level
        self._started_s = time.monotonic()
        self._ids: defaultdict[int, list[int]] = defaultdict(list)  # by choice
        self._reasons: dict[int, str] = {}

    def begins(self) -> None:
        if self._level is None:
            return
        spec = self._spec
        text = f"{len(spec.work.prompt_ids)} prompt tokens, {len(spec.work.choices)} choices"
        if self._level >= 1:
            text += f", {msgspec.json.encode(spec.work.sampling).decode()}"
        _log.info("request %s: %s%s", spec.request_id, text, self._shown(spec.work.prompt_ids))

    def take(self, delta: ChoiceDelta) -> None:
        if self._level is None:
            return
        self._ids[delta.choice] += delta.token_ids
        if delta.finish_reason is not None:
            self._reasons[delta.choice] = delta.finish_reason

    def ends(self) -> None:
        """A choice without a finish reason was cut by a stop string, or its client left, or it failed."""
        if self._level is None:
            return
        for choice in self._spec.work.choices:
            ids = self._ids[choice]
            _log.info(
                "request %s: choice %d: %s after %.3f s, %d tokens%s",
                self._spec.request_id,
                choice,
                self._reasons.get(choice, "ended"),
                time.monotonic() - self._started_s,
                len(ids),
                self._shown(ids),
            )

    def _shown(self, ids: Sequence[int]) -> str:
        if self._level is None or self._level < 2:
            return ""
        shown = list(ids if self._level >= 3 else ids[:_NUM_SHOWN_IDS])
        return f", ids {shown}{'' if len(shown) == len(ids) else ' …'}"
