"""Which prefill and which decode node serve a request: least expected work, a pure function.

Filter: of the ready pairs given, where others exist, those that did not just fail this request.
Gate: prefill has credit, decode has room. Both are hints that a caller may pass (``forced``).
Pick: fewest prompt tokens ahead on prefill (queued, plus those of this prompt that it has not cached), then
the decode node with the least of its batch taken and the least of this prompt missing, each a share of 1: a
conversation stays where its history is, unless that node is busier by more than the history is worth. Then
the emptiest decode node, then the one used longest ago.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Pair:
    """Incarnations. ``prefill`` is empty when decode prefills locally."""

    prefill: str
    decode: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillView:
    """A node that may prefill, as this request sees it."""

    incarnation: str
    num_queued_tokens: int
    num_cached_tokens: int  # of this prompt, estimated
    is_full: bool  # it has just said Busy
    last_used: int  # grows with each dispatch


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeView:
    """A node that may decode, as this request sees it."""

    incarnation: str
    num_active: int
    max_active: int  # 0: unknown
    num_free_pages: int
    num_total_pages: int  # 0: unknown
    num_wanted_pages: int  # by this request
    num_cached_tokens: int  # of this prompt, estimated
    last_used: int


@dataclass(frozen=True, slots=True)
class ReadyPair:
    """``prefill`` is the decode node itself when it prefills locally."""

    prefill: PrefillView
    decode: DecodeView

    @property
    def pair(self) -> Pair:
        local = self.prefill.incarnation == self.decode.incarnation
        return Pair("" if local else self.prefill.incarnation, self.decode.incarnation)


@dataclass(frozen=True, slots=True)
class Chosen:
    pair: Pair
    num_uncached_tokens: int
    num_pages: int
    num_tokens_ahead: int = 0  # on prefill, up to this request's first token


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Ready pairs exist, none has credit and room now."""

    waits_for: str


@dataclass(frozen=True, slots=True)
class NoPair:
    """No pair is ready."""


PairingDecision: TypeAlias = Chosen | NoRoom | NoPair


def choose_pair(
    num_tokens: int,
    candidates: Sequence[ReadyPair],
    *,
    prefill_credit_tokens: int,
    avoid: Sequence[Pair] = (),
    forced: bool = False,
) -> PairingDecision:
    """``num_tokens``: to prefill, kept output included. ``avoid``: pairs that failed this request."""
    if not candidates:
        return NoPair()
    best = _least_suspect(candidates, avoid)
    if not forced:
        with_credit = [c for c in best if _has_credit(c.prefill, num_tokens, prefill_credit_tokens)]
        if not with_credit:
            return NoRoom("prefill credit")
        best = [c for c in with_credit if _has_room(c.decode)]
        if not best:
            return NoRoom("decode pages or batch slots")
    chosen = min(best, key=lambda candidate: _cost(candidate, num_tokens))
    return Chosen(
        chosen.pair,
        _num_uncached(chosen.prefill, num_tokens),
        num_pages=chosen.decode.num_wanted_pages,
        num_tokens_ahead=_num_ahead(chosen.prefill, num_tokens),
    )


def _least_suspect(candidates: Sequence[ReadyPair], avoid: Sequence[Pair]) -> Sequence[ReadyPair]:
    """Pairs of nodes that had no part in a failure; else other pairs than those that failed; else all."""
    if not avoid:
        return candidates
    nodes = {node for pair in avoid for node in (pair.prefill, pair.decode)}
    strangers = [c for c in candidates if c.pair.prefill not in nodes and c.pair.decode not in nodes]
    return strangers or [c for c in candidates if c.pair not in avoid] or candidates


def _num_uncached(prefill: PrefillView, num_tokens: int) -> int:
    """At least one token is always computed: its logits are wanted."""
    return max(1, num_tokens - prefill.num_cached_tokens)


def _num_ahead(prefill: PrefillView, num_tokens: int) -> int:
    return prefill.num_queued_tokens + _num_uncached(prefill, num_tokens)


def _has_credit(prefill: PrefillView, num_tokens: int, credit_tokens: int) -> bool:
    if prefill.num_queued_tokens == 0:
        return True
    return not prefill.is_full and _num_ahead(prefill, num_tokens) <= credit_tokens


def _has_room(decode: DecodeView) -> bool:
    if decode.num_active == 0:
        return True
    # A few more than fit the batch: they are prefilled while running ones end.
    has_slot = not decode.max_active or decode.num_active < decode.max_active + max(1, decode.max_active // 4)
    return has_slot and (not decode.num_total_pages or decode.num_free_pages >= decode.num_wanted_pages)


def _cost(candidate: ReadyPair, num_tokens: int) -> tuple[int, float, float, int, int, str, str]:
    prefill, decode = candidate.prefill, candidate.decode
    missing_share = max(0, num_tokens - decode.num_cached_tokens) / num_tokens
    return (
        _num_ahead(prefill, num_tokens),
        decode.num_active / (decode.max_active or 1) + missing_share,
        -decode.num_free_pages / (decode.num_total_pages or 1),
        prefill.last_used,
        decode.last_used,
        prefill.incarnation,
        decode.incarnation,
    )
