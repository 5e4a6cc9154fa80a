"""A decode node's memory in a process of its own: announces its region, then answers on stdin and stdout.

``read OFFSET LENGTH`` prints the bytes in hex; ``close`` closes the backend; the end of stdin ends it all.
"""

from __future__ import annotations

import sys

import msgspec

from pdserve.transfer.backends import create_backend


def main(name: str, transport: str, num_bytes: int) -> None:
    backend = create_backend(name, transport, "127.0.0.1")
    pool = backend.allocate(num_bytes)
    print(msgspec.json.encode(backend.register()).decode(), flush=True)
    for line in sys.stdin:
        match line.split():
            case ["read", offset, length]:
                print(pool[int(offset) : int(offset) + int(length)].hex(), flush=True)
            case ["close"]:
                backend.close()
                print("closed", flush=True)
    backend.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
