"""How much a prefill node takes at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class PrefillLimits:
    """The scheduler reads them at every step; `prefill_settings` may change them in between."""

    max_batch_tokens: int
    max_batch_rows: int
    max_waiting: int
    returns_hidden_states: bool = False
    overlaps_transfer: bool = True  # a chunk's pages travel while the next one computes
