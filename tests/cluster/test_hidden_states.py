"""Hidden states and embeddings over two nodes are the reference model's; streams survive a node's crash."""

from __future__ import annotations

from pathlib import Path

import torch

from pdserve import Engine
from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.tests.cluster.helpers import GREEDY, greedy_ids, random_ids, request, wait_until
from pdserve.tests.cluster.reference import Reference

PROMPT = random_ids(90, 150)  # three chunks
FLAGS = ["--deterministic", "--poison-reserved-pages", "--chunked-prefill-size", "64"]


def test_hidden_states_of_prompt_and_output(engine: Engine, reference: Reference) -> None:
    sampling = {"max_new_tokens": 5, **GREEDY}
    plain = engine.generate(input_ids=PROMPT, sampling_params=sampling)
    answer = engine.generate(input_ids=PROMPT, sampling_params=sampling, return_hidden_states=True)
    assert answer["output_ids"] == plain["output_ids"]
    info = answer["meta_info"]
    assert info["cached_tokens_details"] == {"device": 0, "host": 0, "storage": 0, "storage_backend": None}
    prompt_rows, *output_rows = info["hidden_states"]
    assert (len(prompt_rows), len(output_rows)) == (len(PROMPT), 4)
    expected = reference.hidden_states([*PROMPT, *answer["output_ids"][:-1]])
    assert torch.allclose(torch.tensor([*prompt_rows, *output_rows]), expected, atol=1e-3)


def test_an_embedding_is_the_last_tokens_state(
    engine: Engine, cluster: LocalCluster, reference: Reference
) -> None:
    prompts = [PROMPT, random_ids(91, 7)]
    states = [reference.hidden_states(prompt)[-1] for prompt in prompts]
    expected = torch.stack([state / state.norm() for state in states])
    encoded = engine.encode(input_ids=prompts)
    assert torch.allclose(torch.tensor([one["embedding"] for one in encoded]), expected, atol=1e-4)
    answer = request(cluster.url, "/v1/embeddings", {"input": prompts}).json
    assert torch.allclose(torch.tensor([one["embedding"] for one in answer["data"]]), expected, atol=1e-4)
    assert answer["usage"]["prompt_tokens"] == 157


def test_streams_survive_a_crash_after_n_outputs(cluster: LocalCluster, log_path: Path) -> None:
    prompts = [random_ids(92 + seed, 20) for seed in range(3)]
    expected = [greedy_ids(cluster.url, prompt, 24) for prompt in prompts]
    # Of 72 outputs one of the two nodes gives 40 and ends, and never both.
    flags = [str(SHIPPED_MODEL), *FLAGS, "--num-decode", "2", "--crash-after-outputs", "40"]
    flags += ["--force-stream-interval", "1"]
    with LocalCluster(flags, log_path=log_path) as crashing:
        before = {worker["incarnation"] for worker in crashing.workers()}
        answers = [greedy_ids(crashing.url, prompt, 24) for prompt in prompts]
        assert answers == expected
        wait_until(
            lambda: len({worker["incarnation"] for worker in crashing.workers()} - before) >= 1,
            30.0,
            "a decode node that ended itself is started again",
        )
