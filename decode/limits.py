"""What a decode node takes at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    max_running: int  # sequences in a batch
    max_batch_tokens: int  # of a step that prefills locally
    max_model_len: int
    returns_hidden_states: bool = False
