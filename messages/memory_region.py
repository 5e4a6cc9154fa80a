"""Memory that peers write into one-sided."""

from __future__ import annotations

import msgspec

from .bounds import Count, Number, Text


class MemoryRegion(msgspec.Struct, frozen=True, kw_only=True):
    """Registered memory that a peer may write into: the pool of one rank of a decode node, or an inbox for
    weights.

    ``session`` is what the backend addresses the owner by: ``host:port`` for Mooncake, the name of the
    shared-memory object for shm, an agent's name and its metadata for NIXL. Page ``i`` of a
    pool starts at ``address + i * stride_bytes`` of the rank's layout; ``scratch_address`` is 8 bytes inside
    the region that nothing else uses, for the first contact.
    """

    session: Text
    address: Number
    num_bytes: Count
    scratch_address: Number
