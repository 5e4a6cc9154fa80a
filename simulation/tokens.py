"""What the fake engine samples and remembers: tokens by a formula, KV that can be checked.

The KV slot of position i holds a number made of the weights and of all tokens up to i, so a page that holds
another sequence's KV, an older one, or that of other weights, is noticed by whoever reads it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

from ..messages.kv_layout import KVLayout

PAGE_SIZE = 4
LAYOUT = KVLayout(num_kv_heads=1, num_layers=1, page_size=PAGE_SIZE, head_dim=2, dtype="float32")
EOS = 0  # never sampled by the formula
VOCAB_SIZE = 1000


def next_token(token_ids: Sequence[int], choice: int) -> int:
    return 1 + zlib.crc32(repr((tuple(token_ids), choice)).encode()) % 997


def expected_tokens(prompt: Sequence[int], count: int, choice: int = 0) -> list[int]:
    """The only right continuation of a prompt."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(next_token(token_ids, choice))
    return token_ids[len(prompt) :]


def prompt_of(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Prompts of different seeds share no page."""
    return tuple(1 + (seed * 101 + position) % 997 for position in range(num_tokens))


def kv_of(token_ids: Sequence[int], weights: str) -> list[int]:
    """The right content of the slots of a sequence: each depends on all tokens before it."""
    values: list[int] = []
    value = zlib.crc32(weights.encode())
    for token in token_ids:
        value = zlib.crc32(token.to_bytes(4, "little"), value)
        values.append(value)
    return values


class Pool:
    """What each slot of each page holds; None: nothing that a forward may read."""

    def __init__(self, num_pages: int) -> None:
        self.pages: list[tuple[int | None, ...]] = [(None,) * PAGE_SIZE for _ in range(num_pages)]

    def poison(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.pages[page] = (None,) * PAGE_SIZE

    def copy(self, source: int, destination: int) -> None:
        self.pages[destination] = self.pages[source]

    def write(self, page: int, slot: int, value: int) -> None:
        self.pages[page] = (*self.pages[page][:slot], value, *self.pages[page][slot + 1 :])
