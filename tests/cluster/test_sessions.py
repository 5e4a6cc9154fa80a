"""Conversations that the cluster keeps: turns, and their KV on the node that the session names."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from pdserve import Engine
from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.errors import RequestError
from pdserve.tests.cluster.helpers import GREEDY, greedy_ids, random_ids, wait_until

SAMPLING = {"max_new_tokens": 24, **GREEDY}


def num_pinned(engine: Engine) -> int:
    return sum(row["num_pinned_pages"] for row in engine.get_load())


def test_turns_append_branch_and_replace(engine: Engine, cluster: LocalCluster) -> None:
    session_id = engine.open_session()
    decode = next(worker["url"] for worker in cluster.workers() if worker["role"] == "decode")
    assert session_id.endswith(f"@{urlsplit(decode).netloc}")
    talk = random_ids(95, 64)
    for rid in ("one", "two", "three"):
        after = {} if rid == "one" else {"rid": "one" if rid == "two" else "two"}
        new = talk if rid == "one" else random_ids(96, 9)
        answer = engine.generate(
            input_ids=new, rid=rid, session_params={"id": session_id, **after}, sampling_params=SAMPLING
        )
        prompt = talk if rid == "one" else [*talk, *new]
        assert answer["output_ids"] == greedy_ids(cluster.url, prompt, 24)
        assert answer["meta_info"]["prompt_tokens"] == len(prompt)
        talk = [*prompt, *answer["output_ids"]]
    num_pages = (len(talk) - 1) // 16
    wait_until(lambda: num_pinned(engine) == num_pages, 10.0, f"{num_pages} pages that stay for the session")
    params = {"id": session_id, "rid": "two", "offset": 70, "replace": True}
    branch = engine.generate(input_ids=[7, 8], rid="four", session_params=params, sampling_params=SAMPLING)
    assert branch["output_ids"] == greedy_ids(cluster.url, [*talk[:70], 7, 8], 24)
    with pytest.raises(RequestError, match="no turn 'three'"):
        engine.generate(input_ids=[7], session_params={"id": session_id, "rid": "three"})
    assert engine.close_session(session_id).success
    wait_until(lambda: num_pinned(engine) == 0, 10.0, "no page that stays")
    assert not engine.close_session(session_id).success
