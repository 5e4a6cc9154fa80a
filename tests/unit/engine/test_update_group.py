"""A node in a trainer's process group. The trainer is a process that uses torch as trainers do."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from pdserve.engine.update_group import UpdateGroup
from pdserve.runtime.errors import StartupError
from pdserve.tests.trainer import MATRIX, ROW, free_port


class TrainerProcess:
    def __init__(self) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "pdserve.tests.trainer", str(self.port)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)

    def send(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def join(self) -> UpdateGroup:
        return UpdateGroup(name="g", host="127.0.0.1", port=self.port, rank=1, world_size=2, timeout_s=60.0)


def buffers(*sizes: int) -> list[torch.Tensor]:
    return [torch.zeros(size, dtype=torch.uint8) for size in sizes]


@pytest.mark.process
def test_tensors_arrive_and_a_trainer_that_dies_ends_the_wait() -> None:
    trainer = TrainerProcess()
    try:
        group = trainer.join()
        trainer.send("tensors")
        matrix, row = buffers(24, 6)
        group.receive([matrix, row], 60.0)
        assert torch.equal(matrix.view(torch.float32).view(2, 3), MATRIX)
        assert torch.equal(row.view(torch.bfloat16), ROW)
        trainer.send("bucket")
        (bucket,) = buffers(30)
        group.receive([bucket], 60.0)
        assert torch.equal(bucket, torch.cat([matrix, row]))

        trainer.process.kill()
        started = time.monotonic()
        with pytest.raises(StartupError, match="group 'g' broke while tensors were received"):
            group.receive(buffers(24), 600.0)
        assert time.monotonic() - started < 300, "its death is seen, not the deadline"
        with pytest.raises(StartupError, match="destroy it and make it again"):
            group.receive(buffers(24), 1.0)
    finally:
        trainer.end()


@pytest.mark.process
def test_a_trainer_that_sends_nothing_ends_the_wait_at_the_deadline() -> None:
    trainer = TrainerProcess()
    try:
        group = trainer.join()
        with pytest.raises(StartupError, match="broke while tensors were received"):
            group.receive(buffers(24), 0.2)
    finally:
        trainer.end()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is said to be missing")
def test_a_node_without_a_gpu_joins_no_group_of_nccl() -> None:
    with pytest.raises(StartupError, match=r"backend nccl needs a .*: use gloo"):
        UpdateGroup(name="g", host="127.0.0.1", port=1, rank=1, world_size=2, timeout_s=600.0, backend="nccl")


def test_a_trainer_that_is_not_there_is_told() -> None:
    with pytest.raises(
        StartupError, match=r"group 'g' of 2 ranks at 127.0.0.1:\d+ was not joined within 1 s"
    ):
        UpdateGroup(name="g", host="127.0.0.1", port=free_port(), rank=1, world_size=2, timeout_s=1.0)
    with pytest.raises(StartupError, match="was not joined"):
        UpdateGroup(name="g", host="no.such.host.invalid", port=5, rank=1, world_size=2, timeout_s=1.0)
