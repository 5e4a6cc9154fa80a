"""ClusterOperator: all nodes are asked, settings go to those that have them, traces are put together."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pdserve.messages.operation import SetInternalState, SlowDown, StartProfile
from pdserve.runtime.errors import RequestError
from pdserve.tests.unit.router.conftest import Bench, FakeNode
from pdserve.tests.unit.router.test_service import small_cluster


def trace(path: Path, name: str) -> str:
    events = [{"ph": "X", "name": name, "pid": 1, "tid": 1, "ts": 1.0, "dur": 1.0}]
    path.write_bytes(gzip.compress(json.dumps({"baseTimeNanoseconds": 0, "traceEvents": events}).encode()))
    return str(path)


def names_in(path: Path) -> set[str]:
    return {entry["name"] for entry in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}


async def test_every_node_is_asked_and_one_no_is_a_no(bench: Bench) -> None:
    nodes = await small_cluster(bench)
    slow = SlowDown(forward_sleep_s=1.0)
    assert (await bench.operator.operate(slow)).success
    assert all(node.operations == [slow] for node in nodes)
    nodes[1].operation_reply = "not now"
    reply = await bench.operator.operate(slow)
    assert not reply.success
    assert "http://d: not now" in reply.message


async def test_a_setting_goes_to_the_nodes_that_have_it(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    both = SetInternalState(settings={"max_queued_prefills": 2, "local_prefill_threshold": None})
    assert (await bench.operator.operate(both)).success
    assert prefill.operations == [SetInternalState(settings={"max_queued_prefills": 2})]
    assert decode.operations == [SetInternalState(settings={"local_prefill_threshold": None})]
    with pytest.raises(RequestError, match="page_size") as caught:
        await bench.operator.operate(SetInternalState(settings={"max_queued_prefills": 9, "page_size": 1}))
    assert caught.value.param == "server_args.page_size"
    assert len(prefill.operations) == 1, "none was asked when one is wrong"


async def test_without_nodes_nothing_succeeds(bench: Bench) -> None:
    await bench.start()
    operator = bench.operator
    assert not (await operator.operate(SlowDown(forward_sleep_s=1.0))).success
    assert not (await operator.stop_profile()).success
    assert await operator.internal_state() == {"internal_states": []}


async def test_the_state_of_each_node_is_told(bench: Bench) -> None:
    _, decode = await small_cluster(bench)
    decode.die()
    rows = (await bench.operator.internal_state())["internal_states"]
    by_role = {row["role"]: row for row in rows}
    assert by_role["prefill"]["memory_rss_bytes"] == 5
    assert by_role["decode"]["error"] == "it is not connected"


async def test_traces_are_put_together_where_they_can_be_read(bench: Bench, tmp_path: Path) -> None:
    prefill, decode = await small_cluster(bench)
    prefill.traces = (trace(tmp_path / "p", "chunk"),)
    decode.traces = (trace(tmp_path / "d", "step"),)
    operator = bench.operator
    start = StartProfile(profile_id="x", output_dir=str(tmp_path))
    assert (await operator.operate(start)).success
    done = await operator.stop_profile()
    assert (done.success, done.traces["http://p"]) == (True, [str(tmp_path / "p")])
    assert done.merged == str(tmp_path / "x-merged.trace.json.gz")
    assert names_in(tmp_path / "x-merged.trace.json.gz") == {"chunk", "step"}

    decode.rank_traces = ((1, trace(tmp_path / "d1", "rank 1's step")),)
    done = await operator.stop_profile()
    assert done.traces["http://d"] == [str(tmp_path / "d"), str(tmp_path / "d1")]
    assert names_in(tmp_path / "x-merged.trace.json.gz") == {"chunk", "step", "rank 1's step"}

    decode.traces = ("/another/host/d",)
    done = await operator.stop_profile()
    assert (done.success, done.merged) == (True, "")
    assert "not all on this host" in done.message


async def test_a_node_without_a_profile_makes_the_end_a_no(bench: Bench) -> None:
    nodes: list[FakeNode] = list(await small_cluster(bench))
    nodes[0].operation_reply = "no profile is running"
    done = await bench.operator.stop_profile()
    assert not done.success
    assert "http://p: no profile is running" in done.message
