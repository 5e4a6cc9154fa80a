"""Memory of this node that other nodes write weights into, a few slots at a time.

What a peer was asked to write and did not report as written may still land, at any time: a frozen sender
resumes. So an inbox whose pull did not end well is *set aside*: it stays mapped and registered for as long as
the process lives, nobody reads it again, and the next pull gets a new one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..messages.memory_region import MemoryRegion
from ..messages.weights import WRITE_PART_BYTES
from ..runtime.errors import StartupError
from ..transfer.backends.base import TransferBackend

_log = logging.getLogger(__name__)

NUM_SLOTS = 4
MAX_SET_ASIDE = 4  # so what a node may hold for good is bounded


class Inbox:
    """Slots of `slot_bytes`, one behind the other."""

    def __init__(self, backend: TransferBackend, num_slots: int, slot_bytes: int) -> None:
        """Raises StartupError when the memory cannot be had or not registered."""
        self._backend = backend
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._memory = backend.allocate(num_slots * slot_bytes)
        self.region: MemoryRegion = backend.register()

    def slot(self, index: int) -> memoryview:
        start = index * self.slot_bytes
        return self._memory[start : start + self.slot_bytes]

    def close(self) -> None:
        """The process ends. The memory stays mapped while this object lives."""
        self._backend.close()


class Inboxes:
    """Of a node: the one in use, made when it is first wanted, and those set aside."""

    def __init__(
        self,
        make_backend: Callable[[], TransferBackend],
        *,
        num_slots: int = NUM_SLOTS,
        slot_bytes: int = WRITE_PART_BYTES,
    ) -> None:
        self._make_backend = make_backend
        self._num_slots = num_slots
        self._slot_bytes = slot_bytes
        self._current: Inbox | None = None
        self._set_aside: list[Inbox] = []

    def current(self) -> Inbox:
        """No write into it is under way. Raises StartupError when there can be none."""
        if self._current is None:
            if len(self._set_aside) >= MAX_SET_ASIDE:
                raise StartupError(
                    f"{MAX_SET_ASIDE} inboxes are set aside, as peers may still write into them; start the "
                    "node again to be rid of them"
                )
            self._current = self._make()
        return self._current

    def set_aside(self) -> None:
        """Something may still be written into the current one."""
        if self._current is not None:
            self._set_aside.append(self._current)
            self._current = None
            _log.warning("an inbox for weights is set aside, the %d. one", len(self._set_aside))

    def close(self) -> None:
        for inbox in self._set_aside:
            inbox.close()
        if self._current is not None:
            self._current.close()

    def _make(self) -> Inbox:
        backend = self._make_backend()
        try:
            return Inbox(backend, self._num_slots, self._slot_bytes)
        except (StartupError, OSError) as error:  # the second: no memory
            backend.close()
            raise StartupError(f"no memory for weights can be registered: {error}") from error
