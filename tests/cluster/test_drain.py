"""SIGTERM: what was accepted ends properly, nothing new is, and everything is gone afterwards."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil

from pdserve.bench.local_cluster import LocalCluster
from pdserve.tests.cluster.helpers import (
    COMPLETIONS,
    GREEDY,
    Body,
    Stream,
    is_alive,
    random_ids,
    request,
    stream_all,
    wait_until,
)

NEW: Body = {"prompt": [5, 6, 7], "max_tokens": 4}


def test_sigterm_with_requests_in_every_stage(log_path: Path) -> None:
    flags = ["--deterministic", "--chunked-prefill-size", "64", "--max-queued-prefills", "2"]
    cluster = LocalCluster(flags, log_path=log_path)
    cluster.start()
    try:
        running: Body = {"prompt": random_ids(50, 30), "max_tokens": 150, **GREEDY}
        # More than prefill takes at once: some wait on the node, some are sent back to the router's queue.
        queued: list[Body] = [
            {"prompt": random_ids(60 + number, 400), "max_tokens": 5, **GREEDY} for number in range(8)
        ]
        (undisturbed,) = stream_all(cluster.url, [running])
        assert request(cluster.url, "/slow_down", {"forward_sleep_time": 0.01}).status == 200
        stream = Stream(cluster.url, running)
        stream.wait_for_tokens(5)
        streams = [Stream(cluster.url, {**body, "request_id": f"q{i}"}) for i, body in enumerate(queued)]
        wait_until(
            lambda: request(cluster.url, "/requests/q7").status == 200, 10.0, "the last to be accepted"
        )
        processes = [psutil.Process(cluster.pid), *psutil.Process(cluster.pid).children(recursive=True)]
        os.kill(cluster.pid, signal.SIGTERM)

        wait_until(lambda: request(cluster.url, "/ready").status == 503, 10.0, "/ready to say no")
        assert request(cluster.url, "/health").status == 200
        refused = request(cluster.url, COMPLETIONS, NEW)
        assert (refused.status, refused.json["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
        assert not stream.is_over, "the stream was over before the drain began"

        answer = stream.answer()
        assert answer.is_proper, answer
        assert answer.token_ids == undisturbed.token_ids
        for stream in streams:
            answer = stream.answer()
            assert answer.is_proper, answer
            assert len(answer.token_ids[0]) == 5
    finally:
        exit_code = cluster.stop()
    log = log_path.read_text()
    assert exit_code == 0, log
    assert "Traceback" not in log, log
    assert not [process for process in processes if is_alive(process)]
