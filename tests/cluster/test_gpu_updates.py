"""Updates of weights that a trainer has on a GPU: for `scripts/gpu_suite`, skipped where there is none."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from pdserve import Engine
from pdserve.bench.local_cluster import LocalCluster
from pdserve.docs.examples.gpu_bucket import GpuBucket
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.tests.cluster.helpers import in_background
from pdserve.tests.trainer import free_port

NORM = "model.norm.weight"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: not run"),
]

# A process of its own: it takes the second GPU, as the node takes the first one that it sees.
TRAINER = """
import sys, torch
from pdserve.docs.examples.trainer_group import TrainerGroup
torch.cuda.set_device(1)
group = TrainerGroup("gpus", int(sys.argv[1]), 2, "nccl")
sys.stdin.readline()
group.send([torch.full((int(sys.argv[2]),), 0.5, device="cuda")])
torch.cuda.synchronize()
sys.stdin.readline()
"""


def test_nodes_read_tensors_from_memory_of_the_gpu(cluster: LocalCluster) -> None:
    norm = load_file(SHIPPED_MODEL / "model.safetensors")[NORM]
    changed = (norm.float() * 0.5).to(norm.dtype)
    with Engine(url=cluster.url) as engine:
        for version, tensor in (("gpu", changed), ("default", norm)):
            with GpuBucket({NORM: tensor.to("cuda")}) as bucket:
                reply = engine.update_weights_from_gpu(bucket.memory, weight_version=version)
            assert reply.success, reply.message
            assert engine.get_weights_by_name(NORM, 4) == pytest.approx(tensor[:4].tolist())
            assert engine.check_weights()["success"], "the same bits on both nodes"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no 2 GPUs here, one for each rank: not run")
def test_a_trainer_broadcasts_over_nccl() -> None:
    port, size = free_port(), len(load_file(SHIPPED_MODEL / "model.safetensors")[NORM])
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(port), str(size)], stdin=subprocess.PIPE, text=True
    )
    assert trainer.stdin is not None
    try:
        with LocalCluster([str(SHIPPED_MODEL), "--colocated"]) as node, Engine(url=node.url) as engine:
            joined = engine.init_weights_update_group("127.0.0.1", port, 1, 2, "gpus", "nccl")
            assert joined.success, joined.message
            _, updated = in_background(
                lambda: engine.update_weights_from_distributed([NORM], ["float32"], [[size]], "gpus")
            )
            trainer.stdin.write("send\n")
            trainer.stdin.flush()
            reply = updated()
            assert reply.success, reply.message
            assert engine.get_weights_by_name(NORM, 4) == [0.5] * 4
            trainer.kill()
            lost = engine.update_weights_from_distributed([NORM], ["float32"], [[size]], "gpus")
            assert (lost.success, "broke" in lost.message) == (False, True), lost.message
            assert engine.generate("def", {"max_new_tokens": 2})["text"], "the node lives"
    finally:
        trainer.kill()
        trainer.communicate()
