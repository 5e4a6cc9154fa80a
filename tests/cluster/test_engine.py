"""`Engine`: clusters of a program's own, and one that runs elsewhere."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from pdserve import Engine
from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.errors import RequestError, StartupError, UnreachableError
from pdserve.tests.cluster.helpers import GREEDY, greedy_ids, is_alive, random_ids, wait_until
from pdserve.tests.cluster.reference import Reference

SAMPLING = {"max_new_tokens": 12, **GREEDY}
PROMPT = random_ids(70, 40)


def test_blocking_streamed_awaited_and_batched_answers_are_the_same(
    engine: Engine, cluster: LocalCluster
) -> None:
    expected = greedy_ids(cluster.url, PROMPT, 12)
    assert engine.generate(input_ids=PROMPT, sampling_params=SAMPLING)["output_ids"] == expected
    *_, last = engine.generate(input_ids=PROMPT, sampling_params=SAMPLING, stream=True)
    assert last["output_ids"] == expected
    batch = engine.generate(input_ids=[PROMPT, random_ids(71, 9)], sampling_params=SAMPLING)
    assert batch[0]["output_ids"] == expected

    async def awaited() -> None:
        calls = [engine.aio.generate(input_ids=PROMPT, sampling_params=SAMPLING) for _ in range(8)]
        assert all(answer["output_ids"] == expected for answer in await asyncio.gather(*calls))
        events = await engine.async_generate(input_ids=PROMPT, sampling_params=SAMPLING, stream=True)
        assert [event async for event in events][-1]["output_ids"] == expected
        # A plain call inside a running loop blocks it, and works.
        assert engine.generate(input_ids=PROMPT, sampling_params=SAMPLING)["output_ids"] == expected

    asyncio.run(awaited())


def test_logprobs_and_scores_are_the_reference_models(engine: Engine, reference: Reference) -> None:
    rows = reference.logprobs(PROMPT)
    expected = [float(rows[position - 1, PROMPT[position]]) for position in range(5, len(PROMPT))]
    assert engine.prompt_logprobs(input_ids=PROMPT, logprob_start_len=5) == pytest.approx(expected, abs=1e-4)

    labels, items = [3, 7], [PROMPT[20:], [9, 8]]
    scores = engine.score(PROMPT[:20], items, labels)
    for item, row in zip(items, scores, strict=True):
        last = reference.logprobs([*PROMPT[:20], *item])[-1]
        assert row == pytest.approx([math.exp(float(last[label])) for label in labels], rel=1e-3)
    for row in engine.score(PROMPT[:20], items, labels, apply_softmax=True, item_first=True):
        assert sum(row) == pytest.approx(1.0)


def test_leaving_a_stream_releases_it(engine: Engine, cluster: LocalCluster) -> None:
    events = engine.generate("class", {"max_new_tokens": 800, **GREEDY}, stream=True)
    next(events)
    events.close()
    cluster.wait_idle(timeout_s=15.0)


def test_control_calls_are_answered(engine: Engine) -> None:
    assert engine.flush_cache(timeout_s=10.0).success
    assert engine.abort_request("nobody").success
    refused = engine.update_weights_from_disk("/no/such/model")
    assert not refused.success
    assert "/no/such/model" in refused.message
    assert {row["role"] for row in engine.get_load()} == {"prefill", "decode"}
    assert engine.get_server_info()["weight_version"] == engine.get_model_info()["weight_version"]


def test_nodes_are_looked_into_and_set(engine: Engine) -> None:
    rows = {row["role"]: row for row in engine.get_internal_state()}
    settings = rows["decode"]["settings"]
    assert rows["prefill"]["settings"]["chunked_prefill_size"] == 64
    assert engine.set_internal_state({"local_prefill_threshold": 3, "max_queued_prefills": 5}).success
    rows = {row["role"]: row for row in engine.get_internal_state()}
    assert rows["prefill"]["settings"]["max_queued_prefills"] == 5
    assert rows["decode"]["settings"]["local_prefill_threshold"] == 3
    back = {"local_prefill_threshold": settings["local_prefill_threshold"], "max_queued_prefills": 32}
    assert engine.set_internal_state(back).success
    rows = {row["role"]: row for row in engine.get_internal_state()}
    assert rows["decode"]["settings"]["local_prefill_threshold"] is None
    assert engine.configure_logging(log_level="debug").success
    assert {row["log_level"] for row in engine.get_internal_state()} == {"debug"}
    assert engine.configure_logging(log_level="info").success
    assert engine.freeze_gc().success
    assert all(row["is_gc_frozen"] for row in engine.get_internal_state())


def test_slow_motion_slows_each_forward(engine: Engine) -> None:
    sampling = {"max_new_tokens": 6, **GREEDY}
    expected = engine.generate("def", sampling)["output_ids"]
    assert engine.slow_down(0.1).success
    slow = engine.generate("def", sampling)
    assert engine.slow_down(None).success
    assert slow["output_ids"] == expected
    assert slow["meta_info"]["e2e_latency"] > 5 * 0.1, "each token but the first takes a forward on decode"


def test_a_profile_shows_both_nodes_on_one_clock(engine: Engine, tmp_path: Path) -> None:
    assert engine.start_profile(tmp_path, num_steps=3, profile_id="e2e").success
    assert not engine.start_profile(tmp_path).success
    engine.flush_cache(timeout_s=10.0)
    engine.generate(input_ids=random_ids(72, 40), sampling_params=SAMPLING)
    done = engine.stop_profile()
    assert done.success, done.message
    assert sum(map(len, done.traces.values())) == 2
    document = json.loads(gzip.decompress(Path(done.merged).read_bytes()))
    steps = [entry for entry in document["traceEvents"] if entry.get("cat") == "user_annotation"]
    begins = {
        kind: min(entry["ts"] for entry in steps if entry["name"].startswith(kind))
        for kind in ("prefill step", "decode step")
    }
    assert begins["prefill step"] < begins["decode step"] < begins["prefill step"] + 60e6
    assert not engine.stop_profile().success


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_streams_go_on_after_a_pause_as_if_there_had_been_none(
    engine: Engine, mode: Literal["in_place", "retract"]
) -> None:
    sampling = {"max_new_tokens": 48, **GREEDY}
    prompts = [random_ids(73 + number, 30) for number in range(3)]
    expected = [
        answer["output_ids"] for answer in engine.generate(input_ids=prompts, sampling_params=sampling)
    ]
    engine.slow_down(0.01)

    async def paused() -> list[list[int]]:
        calls = [
            asyncio.create_task(engine.aio.generate(input_ids=prompt, sampling_params=sampling))
            for prompt in prompts
        ]
        await asyncio.sleep(0.5)
        assert (await engine.aio.pause_generation(mode)).success
        rows = await engine.aio.get_internal_state()
        assert {row["pause"] for row in rows} == {mode}
        late = asyncio.create_task(engine.aio.generate("def", {"max_new_tokens": 2}))
        await asyncio.sleep(1.0)
        assert not any(call.done() for call in (*calls, late))
        assert (await engine.aio.continue_generation()).success
        await late
        return [answer["output_ids"] for answer in await asyncio.gather(*calls)]

    found = asyncio.run(paused())
    engine.slow_down(None)
    assert found == expected


def test_a_refused_request_names_the_parameter(engine: Engine) -> None:
    with pytest.raises(RequestError, match="max_new_tokens") as caught:
        engine.generate("x", {"max_new_tokens": -1})
    assert (caught.value.status, caught.value.param) == (400, "max_new_tokens")


def test_who_does_not_answer_is_named() -> None:
    with pytest.raises(StartupError, match="no engine at http"):
        Engine(url="http://127.0.0.1:9")


def test_a_start_that_fails_is_one_line_with_the_reason(log_path: Path) -> None:
    before = own_processes()
    with pytest.raises(StartupError, match="no model at /no/such/model") as caught:
        Engine("/no/such/model", log_path=log_path)
    assert "\n" not in str(caught.value)
    assert own_processes() == before


def test_two_engines_in_one_process_leave_nothing_behind(log_path: Path) -> None:
    before = own_processes()
    flags: dict[str, Any] = {"num_threads": 1, "kv_cache_gb": 0.05, "api_key": "secret", "log_path": log_path}
    with Engine(colocated=True, **flags) as first:
        with Engine(colocated=True, host="0.0.0.0", **flags) as second:
            assert second.flush_cache(5.0).success, "its admin key is its own secret"
            with (
                Engine(url=second.url, api_key="secret") as other,
                pytest.raises(RequestError, match="admin API key"),
            ):
                other.flush_cache()
            assert first.url != second.url
            ids = [engine.generate("def", SAMPLING)["output_ids"] for engine in (first, second)]
            assert ids[0] == ids[1]
            with pytest.raises(StartupError, match="API key"):
                Engine(url=first.url)
        with pytest.raises(UnreachableError, match="shut down"):
            second.get_load()
        assert first.get_load()
    assert own_processes() == before


# The engine is made in a thread that ends, which must not end the cluster.
PROGRAM = """
import sys, threading
from pdserve import Engine
engines = []
flags = {"colocated": True, "num_threads": 2, "kv_cache_gb": 0.05, "tensor_parallel_size": int(sys.argv[1])}
thread = threading.Thread(target=lambda: engines.append(Engine(**flags)))
thread.start()
thread.join()
engines[0].generate("def", {"max_new_tokens": 2})
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("number", "num_ranks"), [(signal.SIGKILL, 2), (None, 1)])
def test_the_cluster_ends_with_the_program(number: signal.Signals | None, num_ranks: int) -> None:
    command = [sys.executable, "-P", "-c", PROGRAM, str(num_ranks)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdin is not None
        assert program.stdout.readline() == "ready\n"
        processes = psutil.Process(program.pid).children(recursive=True)
        assert len(processes) >= 3 + num_ranks, (
            "supervisor, router, the ranks of a decode node, and its front"
        )
        if number is None:
            program.stdin.close()  # it runs to its end, and shuts nothing down itself
        else:
            program.send_signal(number)
        wait_until(lambda: not any(is_alive(process) for process in processes), 60.0, "the cluster's end")


def own_processes() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True) if is_alive(process)}
