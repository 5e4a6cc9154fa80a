"""A decode node's connections to prefill nodes: what its rooms ask of them is done, what comes is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias, assert_never

from ..messages.peer import PeerPing, PeerPong, PeerRefused, PeerToDecode
from ..messages.timeline import SpanClock
from ..runtime.peer_clock import PeerClocks
from ..transfer.actions import CloseLink, OpenLink, PeerLost, PeerReady, SendToPrefill
from .death_probe import DeathProbe
from .peer_links import LinkDown, PeerLinks

LinkAction: TypeAlias = OpenLink | CloseLink | SendToPrefill | PeerReady | PeerLost

_log = logging.getLogger(__name__)


class PrefillPeers:
    """`heard` is told which updates of weights other nodes serve."""

    def __init__(
        self,
        links: PeerLinks,
        death_probe: DeathProbe,
        peer_clocks: PeerClocks,
        clock: SpanClock,
        heard: Callable[[set[str]], None],
    ) -> None:
        self._links = links
        self._death_probe = death_probe
        self._peer_clocks = peer_clocks  # by address
        self._clock = clock
        self._heard = heard

    def act(self, action: LinkAction) -> None:
        match action:
            case OpenLink():
                self._links.open(action.address, action.epoch)
                self._peer_clocks.forget(action.address)
            case CloseLink():
                self._links.close(action.address)
            case SendToPrefill():
                if isinstance(action.message, PeerPing):
                    self._peer_clocks.pinged(action.address, action.message.seq, self._clock.unix_now())
                self._links.send(action.address, action.message)
            case PeerReady():
                _log.info("prefill node at %s is ready", action.address)
            case PeerLost():
                _log.warning("prefill node at %s is lost: %s", action.address, action.reason)
            case _:
                assert_never(action)

    def receive(self) -> Iterator[tuple[str, PeerToDecode | LinkDown]]:
        """Everything that has arrived, with the address that it came from."""
        return self._links.receive()

    def note(self, address: str, message: PeerToDecode) -> None:
        """What a message says beside its room or epoch."""
        match message:
            case PeerPong(seq=seq, unix_s=unix_s):
                self._peer_clocks.answered(address, seq, self._clock.unix_now(), unix_s)
            case PeerRefused(update_id=update_id):
                self._heard({update_id})
            case _:
                pass

    def proven_dead(self) -> list[str]:
        """Incarnations whose death was proven since the last call."""
        return self._death_probe.poll()

    def watch(self, suspects: Mapping[str, tuple[str, ...]]) -> None:
        """These cannot be asked: look whether they are still there. See DecodeRooms.suspects."""
        self._death_probe.watch(suspects)
