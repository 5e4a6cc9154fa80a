"""What went wrong in the updater and the flush of the system that these were modelled on, and must not here.

There: a flush behind an update was asserted, and a busy scheduler died of it; a flush that failed could be
told as done; a failed update left weights of two versions; a release of a busy node was asserted; a second
resume was a KeyError.
"""

from __future__ import annotations

import pytest

from pdserve.messages.node import CallReply, ClientToNode, FlushCache
from pdserve.messages.weights import (
    CommitWeights,
    FromDisk,
    FromGpuMemory,
    FromGroup,
    FromSharedMemory,
    FromTensors,
    MemoryReply,
    PrepareWeights,
    ReleaseMemory,
    ResumeMemory,
    StageWeights,
    WeightSource,
)

from .cluster import DecodeNode, Pair, PrefillNode, prompt_of

ADMIN = b"admin"
NODES = pytest.mark.parametrize("role", ["prefill", "decode"])


def ask(pair: Pair, role: str, message: ClientToNode, num_jobs: int = 0) -> CallReply | MemoryReply:
    node = node_of(pair, role)
    (pair.to_prefill if role == "prefill" else pair.to_decode)(message, ADMIN)
    for _ in range(num_jobs):
        pair.compute(node)
    reply = pair.last_reply(node, ADMIN)
    assert isinstance(reply, CallReply | MemoryReply)
    return reply


def node_of(pair: Pair, role: str) -> PrefillNode | DecodeNode:
    return pair.prefill if role == "prefill" else pair.decode


def prepare(source: WeightSource) -> PrepareWeights:
    return PrepareWeights(call_id=1, update_id="u", source=source, weight_version="v2")


@NODES
def test_an_update_of_a_busy_node_is_an_answer_and_the_cache_goes_with_the_old_weights(role: str) -> None:
    pair = Pair()
    pair.start("cached", prompt_of(12))
    pair.run()
    assert ask(pair, role, prepare(FromDisk(model_path="weights-2")), 1).success
    pair.start("running", prompt_of(13, seed=1))
    refused = ask(pair, role, CommitWeights(call_id=2, update_id="u"))
    assert (refused.success, refused.message) == (False, "the node is not idle")
    pair.run()
    pair.check_answer("running", prompt_of(13, seed=1), 4)
    assert node_of(pair, role).status.weight_version == "v2"
    assert node_of(pair, role).allocator.counts().shared == 0
    pair.finish()


@NODES
def test_a_flush_that_drops_nothing_says_so(role: str) -> None:
    pair = Pair()
    pair.start("running", prompt_of(12))
    refused = ask(pair, role, FlushCache(call_id=2))
    assert (refused.success, refused.message) == (False, "The node is not idle, and no timeout was given.")
    pair.run()
    cached = node_of(pair, role).allocator.counts().shared
    assert cached > 0
    node_of(pair, role).control._drop_cache = lambda: False
    in_use = ask(pair, role, FlushCache(call_id=3))
    assert (in_use.success, "in use" in in_use.message) == (False, True)
    pair.finish()


SOURCES: list[WeightSource] = [
    FromDisk(model_path="wrong-model"),
    FromTensors(num_bytes=5),
    FromGroup(group_name="none", tensors=(), is_one_bucket=False, timeout_s=1.0),
    FromSharedMemory(name="pdserve-no-such-file"),
    FromGpuMemory(device_uuid="none", handle=b"", offset=0, tensors=()),
]


@NODES
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
def test_an_update_that_fails_leaves_the_old_weights_whole_and_their_version(
    role: str, source: WeightSource
) -> None:
    pair = Pair()
    if isinstance(source, FromTensors):
        staged = ask(pair, role, StageWeights(call_id=5, update_id="u", offset=0, data=b"wrong"))
        assert staged.success
    failed = ask(pair, role, prepare(source), 1)
    assert not failed.success
    assert failed.message
    assert not ask(pair, role, CommitWeights(call_id=2, update_id="u")).success
    node = node_of(pair, role)
    assert (node.status.weight_version, node.engine.weights) == ("default", "weights-1")
    pair.start("a", prompt_of(9))
    pair.finish()
    pair.check_answer("a", prompt_of(9), 4)


@NODES
def test_a_release_of_a_busy_node_is_an_answer(role: str) -> None:
    pair = Pair()
    pair.start("running", prompt_of(12))
    release = ReleaseMemory(call_id=4, tags=("kv_cache",), timeout_s=0.0)
    assert ask(pair, role, release) == MemoryReply(
        call_id=4, success=False, message="the node was not idle in time"
    )
    pair.run()
    pair.check_answer("running", prompt_of(12), 4)
    pair.finish()


@NODES
def test_a_second_resume_is_an_answer(role: str) -> None:
    pair = Pair()
    resume = ResumeMemory(call_id=4, tags=("weights",))
    never = ask(pair, role, resume)
    assert ask(pair, role, ReleaseMemory(call_id=5, tags=("weights",), timeout_s=1.0), 1).success
    assert ask(pair, role, resume, 1).success
    assert ask(pair, role, resume) == never
    assert never == MemoryReply(call_id=4, success=False, message="not released: weights")
    pair.finish()
