"""Writes that land when everyone has given them up, with real processes and Mooncake.

A prefill node whose writes are sent seconds late (`--faulty delay=1`), and one that is well; the decode node
has so few pages that it would use a page again at once if it let go of it too early.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest

from pdserve.bench.local_cluster import LocalCluster
from pdserve.front.member_calls import MemberCalls, RouterAnswer
from pdserve.runtime.cluster_secret import given_secret
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.process import AccessKeys, end
from pdserve.tests.cluster.helpers import (
    GREEDY,
    Body,
    Stream,
    all_paired,
    clean_cluster,
    frozen,
    greedy_ids,
    kill_nodes,
    num_busy,
    num_quarantined,
    random_ids,
    scheduler_process,
    stream_all,
    wait_until,
)

NODE_FLAGS = ["--dtype", "float32", "--chunked-prefill-size", "64", "--num-threads", "1"]
ARGUMENTS = [str(SHIPPED_MODEL), *NODE_FLAGS, "--poison-reserved-pages"]
pytestmark = pytest.mark.timeout(300)
SMALL_POOL = ["--kv-cache-gb", "0.0055"]  # 120 pages of 16 tokens
NUM_PROMPT_PAGES = 40
START_S = 60.0
LONG: Body = {"prompt": random_ids(50, 16 * NUM_PROMPT_PAGES - 5), "max_tokens": 24, **GREEDY}
# Together more than all pages that are not in quarantine.
PRESSURE: list[Body] = [
    {"prompt": random_ids(60 + number, 120 + 13 * number), "max_tokens": 20, **GREEDY} for number in range(10)
]


@contextmanager
def extra_node(cluster: LocalCluster, role: str, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """A further node, started by hand."""
    arguments = [role, str(SHIPPED_MODEL), *NODE_FLAGS, *flags, "--port", "0", "--router", cluster.url]
    process = subprocess.Popen([sys.executable, "-P", "-m", "pdserve", *arguments])
    try:
        yield process
    finally:
        end(process, grace_s=30.0)


def ask_as_member(cluster: LocalCluster, method: str, path: str, body: bytes = b"") -> None:
    """What only processes of the cluster may ask. All of them have the secret of our environment."""

    async def ask() -> RouterAnswer:
        async with aiohttp.ClientSession() as session:
            keys = AccessKeys(cluster_secret=given_secret(""))
            return await MemberCalls(session, cluster.url, keys).ask(method, path, body)

    assert asyncio.run(ask()).problem == ""


def add_by_hand(cluster: LocalCluster, url: str) -> None:
    ask_as_member(cluster, "POST", "/workers", json.dumps({"url": url}).encode())


def remove(cluster: LocalCluster, url: str) -> None:
    ask_as_member(cluster, "DELETE", f"/workers/{url}")


@contextmanager
def with_one_late_node(tmp_path: Path, delay_s: float) -> Iterator[tuple[LocalCluster, str, str]]:
    """The cluster, the URL of the prefill node that writes late, and of the healthy one, not yet in use."""
    plan = f"delay=1.0,delay_s={delay_s}"
    with clean_cluster([*ARGUMENTS, *SMALL_POOL, "--faulty", plan], tmp_path / "log") as cluster:
        (late,) = [worker["url"] for worker in cluster.workers("prefill")]
        with extra_node(cluster, "prefill", *SMALL_POOL):
            wait_until(lambda: all_paired(cluster, 2, 1), START_S, "two prefill nodes")
            (healthy,) = {worker["url"] for worker in cluster.workers("prefill")} - {late}
            remove(cluster, healthy)
            wait_until(lambda: all_paired(cluster, 1, 1), 10.0, "the healthy node to be out of use")
            yield cluster, late, healthy


def wait_until_known(cluster: LocalCluster, role: str) -> None:
    wait_until(lambda: len(cluster.workers(role)) == 2, START_S, f"a second {role} node")


def wait_for_log(tmp_path: Path, pattern: str) -> None:
    wait_until(lambda: re.search(pattern, (tmp_path / "log").read_text()), 30.0, f"{pattern!r} in the log")


@pytest.fixture(scope="module")
def undisturbed(shared_cluster: LocalCluster) -> list[dict[int, list[int]]]:
    """Of LONG, and of PRESSURE."""
    return [answer.token_ids for answer in stream_all(shared_cluster.url, [LONG, *PRESSURE])]


def press(cluster: LocalCluster, expected: list[dict[int, list[int]]]) -> None:
    for answer, right in zip(stream_all(cluster.url, PRESSURE), expected, strict=True):
        assert answer.token_ids == right


def test_prefill_frozen_in_mid_write(tmp_path: Path, undisturbed: list[dict[int, list[int]]]) -> None:
    with with_one_late_node(tmp_path, delay_s=4.0) as (cluster, late, healthy):
        stream = Stream(cluster.url, LONG)
        wait_for_log(tmp_path, "bytes: delay")
        due_at = time.monotonic() + 4.0
        with frozen(scheduler_process(cluster, late)):
            add_by_hand(cluster, healthy)
            answer = stream.answer()
            assert answer.is_proper, answer
            assert answer.token_ids == undisturbed[0]
            wait_until(lambda: num_busy(cluster) == 0, 10.0, "nothing but quarantine")
            assert num_quarantined(cluster) == NUM_PROMPT_PAGES
            press(
                cluster, undisturbed[1:]
            )  # every page that is free is used again; those in quarantine are not
            assert num_quarantined(cluster) == NUM_PROMPT_PAGES
            assert "is due since" not in (tmp_path / "log").read_text()
            streams = [Stream(cluster.url, body) for body in PRESSURE]
            streams[0].wait_for_tokens(1)
            time.sleep(max(0.0, due_at + 1.5 - time.monotonic()))
        # It goes on, and what it held lands while others use the rest of the pool.
        wait_for_log(tmp_path, "delay, is due since [1-9]")
        for stream, right in zip(streams, undisturbed[1:], strict=True):
            answer = stream.answer()
            assert answer.is_proper, answer
            assert answer.token_ids == right
        wait_until(lambda: num_quarantined(cluster) == 0, 30.0, "the node that went on to drain its room")
        cluster.wait_idle(timeout_s=15.0)
        cluster.flush()


@pytest.mark.slow
@pytest.mark.parametrize("supervised", [True, False], ids=["reaped", "refused"])
def test_decode_frozen_and_the_sender_killed(
    tmp_path: Path, undisturbed: list[dict[int, list[int]]], supervised: bool
) -> None:
    """Not supervised: nobody reaps the killed node, and its ports, which are refused, are the proof."""
    with with_one_late_node(tmp_path, delay_s=2.0) as (cluster, late, healthy):
        decode = scheduler_process(cluster, cluster.workers("decode")[0]["url"])
        stream = Stream(cluster.url, LONG)
        wait_for_log(tmp_path, "bytes: delay")
        with frozen(decode):
            wait_for_log(tmp_path, "delay, is due since")  # the receiver's kernel has it now
            supervisor = psutil.Process(cluster.pid)
            if not supervised:
                supervisor.suspend()
            kill_nodes(cluster, [late], with_fronts=True)
        try:
            add_by_hand(cluster, healthy)
            answer = stream.answer()
            assert answer.is_proper, answer
            assert answer.token_ids == undisturbed[0]
            press(cluster, undisturbed[1:])
            wait_until(lambda: num_quarantined(cluster) == 0, 15.0, "the proof of its death, and settling")
        finally:
            supervisor.resume()
        wait_until(lambda: all_paired(cluster, 2, 1), START_S, "the killed node to be back")
        cluster.wait_idle(timeout_s=30.0)
        cluster.flush()


@pytest.mark.slow
def test_frozen_newcomers_hold_nobody_up(tmp_path: Path) -> None:
    """Of either role, frozen as soon as the router knows them: hand-offs of the others go on meanwhile."""
    with clean_cluster(ARGUMENTS, tmp_path / "log") as cluster:
        prompts = [random_ids(80 + number, 200) for number in range(20)]
        expected = [greedy_ids(cluster.url, prompt, 4) for prompt in prompts]
        cluster.flush()
        with extra_node(cluster, "prefill") as prefill, extra_node(cluster, "decode") as decode:
            newcomers = [psutil.Process(prefill.pid), psutil.Process(decode.pid)]
            for role, process in zip(("prefill", "decode"), newcomers, strict=True):
                wait_until_known(cluster, role)
                process.suspend()
            answers = [greedy_ids(cluster.url, prompt, 4) for prompt in prompts]
            assert [process.status() for process in newcomers] == [psutil.STATUS_STOPPED] * 2
            assert answers == expected
            for process in newcomers:
                process.resume()
        cluster.wait_idle(timeout_s=15.0)
