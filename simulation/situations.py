"""How often each fault and each rare situation came about."""

from __future__ import annotations

from collections import Counter

# A run of enough seeds in which one of these never happened has not tested what it claims.
SITUATIONS = (
    "requests that ended with every token",
    "requests that failed for good",
    "requests that can never fit",
    "choices that ran in turns",
    "new attempts from kept tokens",
    "crashes of a prefill node",
    "crashes of a decode node",
    "freezes of a prefill node",
    "freezes of a decode node",
    "reincarnations at an old address",
    "prefill nodes replaced that were frozen",
    "decode nodes replaced that were frozen",
    "deaths proven while the cluster runs",
    "connections dropped with a word",
    "connections dropped in silence",
    "connections stalled",
    "connections of a router dropped",
    "messages reordered between connections",
    "writes that failed",
    "writes that failed though every byte arrived",
    "writes of which a part had landed when they failed",
    "pages written half",
    "pages landed after the failure was reported",
    "pages landed after their sender had died",
    "pages landed after their sender was frozen and went on",
    "pages landed after their receiver was frozen and went on",
    "pages landed in quarantine",
    "pages written twice",
    "writes slower than a heartbeat",
    "writes cancelled before they began",
    "first contacts that failed",
    "first contacts that hung on a frozen peer",
    "rooms refused as busy",
    "rooms and pairs refused for other weights",
    "updates of weights",
    "control messages of a storm",
    "hellos in another's name",
    "memory released",
    "orders to a router: abort",
    "orders to a router: pause",
    "orders to a router: hold, wait",
    "orders to a router: hold, abort",
    "orders to a router: hold, retract",
    "orders to a router: listen",
    "orders to a router: stand still",
    "cancels of a queued request",
    "cancels while waiting for pages on decode",
    "cancels while waiting on prefill",
    "cancels while prefill computes",
    "cancels while the last pages travel",
    "cancels while prefill knows the room no more",
    "cancels while running",
    "cancels after the end on decode",
    "cancels of one choice of several",
    "aborts that overtook their request's end",
    "first tokens that ended the request",
    "prompts found in the prefix cache",
    "prompts found in decode's cache",
    "prompts that decode computes itself",
    "requests retracted for want of pages",
    "page digests computed",
)


class Statistics:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count(self, situation: str, times: int = 1) -> None:
        self.counts[situation] += times

    def missing(self) -> list[str]:
        return [situation for situation in SITUATIONS if not self.counts[situation]]

    def table(self) -> str:
        """Situations in the order above, then what else was counted."""
        names = [*SITUATIONS, *sorted(self.counts.keys() - set(SITUATIONS))]
        return "\n".join(f"  {name:<60}{self.counts[name]:>12,}" for name in names)
