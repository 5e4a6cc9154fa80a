"""A trainer's rank 0 as a process: it is told by lines on its standard input what to send, ``tensors`` or
``bucket``."""

from __future__ import annotations

import socket
import sys

import torch

from pdserve.docs.examples.trainer_group import TrainerGroup

MATRIX = torch.arange(6, dtype=torch.float32).view(2, 3)
ROW = torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def main(port: int) -> None:
    torch.set_num_threads(1)
    trainer = TrainerGroup("g", port, 2)
    for command in sys.stdin:
        trainer.send([MATRIX, ROW], is_one_bucket=command.strip() == "bucket")


if __name__ == "__main__":
    main(int(sys.argv[1]))
