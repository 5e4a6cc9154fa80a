"""What an operator orders: not done when it comes after who gave it has given up."""

from __future__ import annotations

import msgspec

from .bounds import Number, Seconds


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """Asks a node to do something that is not a request's.

    `not_after_unix_s`: on the node's own clock, which `Pong.unix_s` told; 0: at any time. Who gave the order
    waits until then and no longer. Afterwards it may have ordered the contrary, by another connection, which
    came sooner: a late order would have the last word, and nobody would know.
    """

    call_id: Number = 0
    not_after_unix_s: Seconds = 0.0

    def is_over(self, unix_s: float) -> bool:
        return 0.0 < self.not_after_unix_s < unix_s
