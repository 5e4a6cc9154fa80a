"""A node's memory in a process of its own: announces its region, then answers on stdin and stdout.

``read OFFSET LENGTH`` prints the bytes in hex; ``flood REGION`` writes its pool into another's, until it
is killed; ``close`` closes the backend; the end of stdin ends it all."""

from __future__ import annotations

import itertools
import select
import sys

import msgspec

from pdserve.messages.memory_region import MemoryRegion
from pdserve.transfer.backends import create_backend
from pdserve.transfer.backends.base import TransferBackend, WriteState
from pdserve.transfer.copy_plan import Run


def main(name: str, transport: str, num_bytes: int) -> None:
    backend = create_backend(name, transport, "127.0.0.1")
    pool = backend.allocate(num_bytes)
    print(msgspec.json.encode(backend.register()).decode(), flush=True)
    for line in sys.stdin:
        match line.split(maxsplit=1):
            case ["read", where]:
                offset, length = map(int, where.split())
                print(pool[offset : offset + length].hex(), flush=True)
            case ["flood", region]:
                flood(backend, pool, msgspec.json.decode(region, type=MemoryRegion))
            case ["close"]:
                backend.close()
                print("closed", flush=True)
    backend.close()


def flood(backend: TransferBackend, pool: memoryview, region: MemoryRegion) -> None:
    """Says "flooding" once the first write is in place. Every round has bytes of its own."""
    backend.first_contact(0, region)
    for handle in itertools.count(1):
        select.select([backend], [], [])
        for result in backend.poll():
            assert result.state is WriteState.DONE, result.reason
        if handle == 2:
            print("flooding", flush=True)
        pool[:] = bytes([handle % 251 + 1]) * len(pool)
        backend.submit(handle, region, Run(0, 0, len(pool)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
