"""Every case of the table, against a real cluster, while eight streams go on undisturbed."""

from __future__ import annotations

import http.client
import json
from urllib.parse import urlsplit

from pdserve.api.http.bodies import BodyLimits
from pdserve.bench.local_cluster import LocalCluster
from pdserve.tests.bad_input_cases import BadInput, bad_input_cases
from pdserve.tests.cluster.helpers import Stream, random_ids, slowed, stream_all

NUM_STREAMS = 8


def problem_with(cluster: LocalCluster, case: BadInput) -> str:
    """What is wrong with the answer to `case`; empty if nothing is."""
    target = urlsplit(cluster.url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
    try:
        connection.request(case.method, case.path, case.body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        error = json.loads(response.read()).get("error", {})
    finally:
        connection.close()
    if (response.status, error.get("param"), error.get("code")) == (case.status, case.param, case.code):
        return ""
    return f"{case.name}: {response.status} {error}"


def test_bad_input_while_streams_go_on(cluster: LocalCluster) -> None:
    model = cluster.get("/v1/models")["data"][0]
    vocab_size = cluster.get("/model_info")["vocab_size"]
    cases = bad_input_cases(
        max_model_len=model["max_model_len"],
        vocab_size=vocab_size,
        max_body_bytes=BodyLimits().max_bytes,
    )
    bodies = [
        {
            "prompt": random_ids(seed, 20),
            "max_tokens": 100,
            "temperature": 0.8,
            "seed": seed,
            "ignore_eos": True,
        }
        for seed in range(NUM_STREAMS)
    ]
    undisturbed = stream_all(cluster.url, bodies)
    with slowed(cluster.url):
        streams = [Stream(cluster.url, body) for body in bodies]
        for stream in streams:
            stream.wait_for_tokens(1)
        problems = [problem for case in cases if (problem := problem_with(cluster, case))]
        answers = [stream.answer() for stream in streams]
    assert problems == []
    for answer, expected in zip(answers, undisturbed, strict=True):
        assert answer.is_proper
        assert answer.token_ids == expected.token_ids
