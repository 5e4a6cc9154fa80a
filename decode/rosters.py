"""Who prefill nodes are: the union of what routers name."""

from __future__ import annotations

from ..messages.node import Roster


class Rosters:
    """What a router named that is silent for `life_s` counts no more, as soon as another one speaks."""

    def __init__(self, life_s: float) -> None:
        self._life_s = life_s
        self._rosters: dict[str, tuple[Roster, float]] = {}  # of each router, and when it came

    def heard(self, roster: Roster, now: float) -> set[str]:
        """Returns the addresses of all prefill nodes that are named."""
        self._rosters[roster.router_id] = (roster, now)
        self._rosters = {
            router: (named, at) for router, (named, at) in self._rosters.items() if now - at < self._life_s
        }
        return {
            node.zmq_address
            for named, _ in self._rosters.values()
            for node in named.nodes
            if node.role == "prefill"
        }
