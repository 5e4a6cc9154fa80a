"""The router's state over scripted nodes: what becomes of requests, whatever nodes and readers do.

In virtual time, which passes at once: a test may wait for minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from pdserve.api.generation import ChoiceDelta, GenerateSpec, GenerationInfo, SessionHold, TurnParams
from pdserve.messages.node import (
    AttemptFailed,
    FailureCode,
    Finish,
    GenerateRequest,
    NodeEntry,
    NodeLoad,
    TokenOutput,
    TokenOutputs,
)
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work
from pdserve.router.attempts import RequestRecord
from pdserve.router.dispatcher import Dispatcher
from pdserve.router.events import (
    Arrival,
    Dispatch,
    Listen,
    NodesMove,
    NodesStandStill,
    Pause,
    Registered,
    Resume,
    TakenOut,
    Tick,
)
from pdserve.router.registry import MAX_NODES
from pdserve.runtime.errors import RequestError

from .lab import Lab, ScriptedNode

Spec = Callable[..., GenerateSpec]
Expected = Callable[[tuple[int, ...], int, int], list[int]]


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Ends with what must hold between the parts."""
    lab = Lab()
    yield lab
    assert lab.state.violations() == []


def small_cluster(lab: Lab, **options: object) -> tuple[ScriptedNode, ScriptedNode]:
    prefill, decode = lab.prefill(), lab.decode()
    lab.start(**options)
    lab.ready()
    return prefill, decode


def large_cluster(lab: Lab, **options: object) -> list[ScriptedNode]:
    """Two of each: prefill p and q, decode d and e."""
    nodes = [lab.prefill("p"), lab.prefill("q")]
    nodes += [lab.decode(name, peers=("p-1", "q-1")) for name in "de"]
    lab.start(**options)
    lab.ready(4)
    return nodes


def test_a_request_goes_to_the_decode_node_alone_and_streams(
    lab: Lab, spec: Spec, expected: Expected
) -> None:
    prefill, decode = small_cluster(lab)
    generation = lab.generate(spec())
    assert lab.read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert generation.info.num_attempts == 1
    assert generation.info.weight_version == "v1"
    assert [span.name for span in generation.info.spans] == ["queue", "pairing"]
    assert [(r.prefill_incarnation, r.work.choices, r.stream_interval) for r in decode.requests()] == [
        ("p-1", (0,), 1)
    ]
    assert decode.requests()[0].weight_version == "v1"
    assert prefill.requests() == []
    assert lab.state.counters.requests == {"finished": 1}
    assert lab.state.counters.attempts == {"ok": 1}


def test_choices_come_each_with_its_own_tokens(lab: Lab, spec: Spec, expected: Expected) -> None:
    small_cluster(lab)
    generation = lab.generate(spec(num_choices=3))
    assert lab.read(generation) == {choice: expected((1, 2, 3), choice, 8) for choice in range(3)}


def test_many_requests_at_once(lab: Lab, spec: Spec, expected: Expected) -> None:
    nodes = large_cluster(lab)

    answers = [lab.generate(spec(f"r{i}", prompt=(i, i + 1), max_tokens=20)) for i in range(100)]
    for i, answer in enumerate(answers):
        assert lab.read(answer) == {0: expected((i, i + 1), 0, 20)}
    assert all(node.requests() for node in nodes if node.entry.role == "decode")


def test_a_colocated_decode_node_needs_no_prefill_node(
    lab: Lab, spec: Spec, entry: Callable[..., NodeEntry], expected: Expected
) -> None:
    decode = lab.decode(peers=())
    decode.entry = entry(colocated=True)
    lab.start()
    lab.ready(1)
    assert lab.read(lab.generate(spec())) == {0: expected((1, 2, 3), 0, 8)}
    assert decode.requests()[0].prefill_incarnation == ""


def test_prompts_with_a_common_prefix_go_to_the_same_prefill_node(lab: Lab, spec: Spec) -> None:
    *_, decode, other = large_cluster(lab)
    prefix = tuple(range(40))
    for i in range(6):
        lab.read(lab.generate(spec(f"r{i}", prompt=(*prefix, 100 + i), max_tokens=1)))
    paired = {r.prefill_incarnation for node in (decode, other) for r in node.requests()}
    assert len(paired) == 1


def test_a_conversation_goes_back_to_its_decode_node(lab: Lab, spec: Spec) -> None:
    *_, decode, other = large_cluster(lab)
    prompts = {name: tuple(range(first, first + 24)) for name, first in (("a", 1), ("b", 100), ("c", 200))}
    for turn in range(3):
        for name, prompt in prompts.items():
            answer = lab.read(lab.generate(spec(f"{name}{turn}", prompt=prompt)))
            prompts[name] = (*prompt, *answer[0], 7 + turn)
    used = {
        name: {n.entry.url for n in (decode, other) for r in n.requests() if r.request_id[0] == name}
        for name in prompts
    }
    assert all(len(urls) == 1 for urls in used.values()), used
    assert set.union(*used.values()) == {decode.entry.url, other.entry.url}


def test_decode_is_told_how_much_is_ahead_on_prefill(lab: Lab, spec: Spec) -> None:
    _, decode = small_cluster(lab)
    lab.read(lab.generate(spec("a", prompt=tuple(range(40)))))
    lab.read(lab.generate(spec("b", prompt=tuple(range(50)))))
    assert [request.num_prefill_tokens_ahead for request in decode.requests()] == [40, 10]


def test_answers_go_on_without_a_prefill_node(lab: Lab, spec: Spec, expected: Expected) -> None:
    prefill, decode = small_cluster(lab)
    assert lab.read(lab.generate(spec("before"))) == {0: expected((1, 2, 3), 0, 8)}
    prefill.die()
    assert lab.read(lab.generate(spec("after"))) == {0: expected((1, 2, 3), 0, 8)}
    assert [request.prefill_incarnation for request in decode.requests()] == ["p-1", ""]
    assert lab.is_ready()


def test_a_retracted_request_goes_on_with_what_it_has(lab: Lab, spec: Spec, expected: Expected) -> None:
    _, decode = small_cluster(lab)
    decode.tokens_per_attempt = 3
    generation = lab.generate(spec())
    lab.until(lambda: lab.state.counters.num_tokens == 3)
    decode.tokens_per_attempt = None
    reason = "too few pages"
    decode.emit(AttemptFailed(request_id="r", attempt=1, code="retracted", reason=reason, retriable=True))
    assert lab.read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert [(r.was_retracted, len(r.work.output_ids)) for r in decode.requests()] == [(False, 0), (True, 3)]
    assert lab.state.counters.attempts["retracted"] == 1


def test_an_id_in_use_is_refused(lab: Lab, spec: Spec) -> None:
    _, decode = small_cluster(lab)
    decode.tokens_per_attempt = 1
    generation = lab.generate(spec())
    with pytest.raises(RequestError) as refused:
        lab.generate(spec())
    assert refused.value.status == 409
    generation.cancel()


def test_a_decode_node_lost_in_mid_stream_is_continued_elsewhere(
    lab: Lab, spec: Spec, expected: Expected
) -> None:
    *_, d, e = large_cluster(lab)
    d.tokens_per_attempt = e.tokens_per_attempt = 3
    generation = lab.generate(spec(max_tokens=8))
    lab.until(lambda: len(generation.deltas) == 3)
    ids = generation.ids[0]
    first, second = (d, e) if d.requests() else (e, d)
    second.tokens_per_attempt = None
    first.die()
    assert lab.read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert second.requests()[0].work.output_ids == tuple(ids[:3])
    assert second.requests()[0].prefill_incarnation != first.requests()[0].prefill_incarnation
    assert generation.info.num_attempts == 2
    assert lab.state.counters.attempts == {"peer_lost": 1, "ok": 1}


def test_a_frozen_decode_node_is_suspected_and_told_to_stop(lab: Lab, spec: Spec, expected: Expected) -> None:
    *_, d, e = large_cluster(lab, pong_timeout_s=0.05)
    d.tokens_per_attempt = e.tokens_per_attempt = 3
    generation = lab.generate(spec(max_tokens=8))
    first, second = (d, e) if d.requests() else (e, d)
    second.tokens_per_attempt = None
    first.answers_pings = False
    assert lab.read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert [cancel.attempt for cancel in first.cancels()] == [1]
    # It resumes and goes on where it was: nobody listens.
    late = TokenOutput(request_id="r", attempt=1, choice=0, position=3, token_ids=(1,))
    first.emit(TokenOutputs(outputs=(late,)))


def test_a_connection_that_died_in_silence_is_made_again(lab: Lab) -> None:
    """A network that forgot it tells nobody; the node goes on registering itself and waits for pings."""
    node = lab.decode()
    lab.start(lease_s=0.8)
    lab.until(lambda: lab.healthy() == ["d-1"])
    (wire,) = node.wires
    node.answers_pings = False  # on this connection, that is
    while wire in node.wires:
        lab.register(node)
        lab.run(0.005)
    node.answers_pings = True
    lab.register(node)
    lab.until(lambda: lab.healthy() == ["d-1"])


def test_choices_of_a_lost_node_are_each_continued_alone(lab: Lab, spec: Spec, expected: Expected) -> None:
    *_, d, e = large_cluster(lab)
    d.tokens_per_attempt = e.tokens_per_attempt = 2
    generation = lab.generate(spec(max_tokens=6, num_choices=3))
    first, second = (d, e) if d.requests() else (e, d)
    lab.until(lambda: lab.state.counters.num_tokens == 6)
    second.tokens_per_attempt = None
    first.die()
    assert lab.read(generation) == {choice: expected((1, 2, 3), choice, 6) for choice in range(3)}
    assert sorted(request.work.choices for request in second.requests()) == [(0,), (1,), (2,)]


def test_the_only_decode_node_comes_back_as_another_incarnation(
    lab: Lab, spec: Spec, entry: Callable[..., NodeEntry], expected: Expected
) -> None:
    _, decode = small_cluster(lab)
    decode.tokens_per_attempt = 3
    generation = lab.generate(spec(max_tokens=8))
    lab.until(lambda: lab.state.counters.num_tokens == 3)
    decode.tokens_per_attempt = None
    decode.start_again("d-2")
    lab.register(decode)
    assert lab.read(generation) == {0: expected((1, 2, 3), 0, 8)}


@pytest.mark.parametrize("code", ["busy", "version_skew", "not_ready"])
def test_what_costs_no_attempt_goes_on_until_it_works(
    lab: Lab, spec: Spec, code: FailureCode, expected: Expected
) -> None:
    _, decode = small_cluster(lab, busy_delay_s=0.001)
    decode.fail_with = [code] * 6
    generation = lab.generate(spec())
    assert lab.read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert lab.state.counters.attempts == {code: 6, "ok": 1}


def test_three_failures_fail_the_request(lab: Lab, spec: Spec) -> None:
    _, decode = small_cluster(lab)
    decode.fail_with = ["transfer_failed"] * 3
    generation = lab.generate(spec())
    with pytest.raises(RequestError, match="scripted transfer_failed") as error:
        lab.read(generation)
    assert error.value.status == 503
    assert len(decode.requests()) == 3
    assert lab.state.counters.requests == {"failed": 1}


def test_a_request_that_can_never_be_served_is_the_clients_mistake(lab: Lab, spec: Spec) -> None:
    _, decode = small_cluster(lab)
    decode.fail_with = ["invalid"]
    with pytest.raises(RequestError) as error:
        lab.read(lab.generate(spec()))
    assert error.value.status == 400
    assert len(decode.requests()) == 1


def test_a_gap_is_asked_for_again(lab: Lab, spec: Spec) -> None:
    _, decode = small_cluster(lab)
    decode.tokens_per_attempt = 0
    generation = lab.generate(spec(max_tokens=4))

    def emit(position: int, *ids: int, finish: Finish | None = None) -> None:
        output = TokenOutput(
            request_id="r", attempt=1, choice=0, position=position, token_ids=ids, finish=finish
        )
        decode.emit(TokenOutputs(outputs=(output,)))

    emit(0, 10)
    emit(2, 12)  # position 1 got lost
    emit(3, 13, finish=Finish(reason="length"))
    assert [(resend.choice, resend.position) for resend in decode.resends()] == [(0, 1)]
    emit(1, 11, 12, 13, finish=Finish(reason="length"))
    emit(1, 11, 12, 13, finish=Finish(reason="length"))
    assert lab.read(generation) == {0: [10, 11, 12, 13]}


@pytest.mark.parametrize("is_colocated", [False, True])
def test_a_node_that_shuts_down_is_not_asked_again_before_its_next_pong(
    lab: Lab, spec: Spec, expected: Expected, entry: Callable[..., NodeEntry], is_colocated: bool
) -> None:
    """Otherwise a request uses up its attempts before the router knows that the node drains."""
    decode = lab.decode()
    if is_colocated:
        decode.entry = entry(colocated=True)
    else:
        lab.prefill()
    lab.start(ping_interval_s=0.3)
    lab.ready(1 if is_colocated else 2)
    decode.fail_with = ["shutting_down"] * 5
    decode.draining = True
    generation = lab.generate(spec())
    num_pings = decode.num_pings()
    lab.until(lambda: decode.num_pings() > num_pings)
    assert len(decode.requests()) == 1
    decode.fail_with.clear()  # started again
    decode.draining = False
    assert lab.read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert len(decode.requests()) == 2


def test_a_retry_waits_for_the_weights_it_began_with(
    lab: Lab, spec: Spec, entry: Callable[..., NodeEntry]
) -> None:
    """A mixed answer is worse than none."""
    prefill, decode = small_cluster(lab, no_pair_timeout_s=0.05)
    decode.tokens_per_attempt = 2
    generation = lab.generate(spec())
    lab.until(lambda: lab.state.counters.num_tokens == 2)
    prefill.entry = entry("prefill", "p", weight_version="v2")
    decode.entry = entry(weight_version="v2")
    lab.until(lambda: {node.entry.weight_version for node in lab.state.nodes} == {"v2"})
    decode.emit(
        AttemptFailed(
            request_id="r", attempt=1, code="version_skew", reason="weights changed", retriable=True
        )
    )
    with pytest.raises(RequestError, match="no pair of nodes serves weight version v1 any more"):
        lab.read(generation)


def test_cancel_releases_decode_and_is_idempotent(lab: Lab, spec: Spec) -> None:
    _, decode = small_cluster(lab)
    decode.tokens_per_attempt = 1
    generation = lab.generate(spec())
    generation.cancel()
    generation.cancel()
    assert [(cancel.attempt, cancel.choices) for cancel in decode.cancels()] == [(1, ())]
    assert lab.requests.num_running == 0
    assert lab.state.counters.requests == {"cancelled": 1}


def test_a_stopped_choice_is_cancelled_and_the_others_go_on(lab: Lab, spec: Spec, expected: Expected) -> None:
    _, decode = small_cluster(lab)
    generation = lab.generate(spec(num_choices=2, max_tokens=30))

    def stop(delta: ChoiceDelta) -> None:
        if delta.choice == 0:
            generation.stop_choice(0)
            generation.stop_choice(0)

    generation.on_delta = stop
    lab.until(lambda: generation.is_over)
    assert generation.ids[1] == expected((1, 2, 3), 1, 30)
    assert [cancel.choices for cancel in decode.cancels()] == [(0,)]


def test_stopping_the_last_choice_ends_the_request(lab: Lab, spec: Spec) -> None:
    small_cluster(lab)
    generation = lab.generate(spec(max_tokens=1000))
    generation.on_delta = lambda delta: generation.stop_choice(0)
    lab.until(lambda: generation.is_over)
    assert lab.state.counters.requests == {"finished": 1}


def test_a_full_queue_is_429(lab: Lab, spec: Spec) -> None:
    lab.start(max_queued_requests=2)
    for i in range(2):
        lab.generate(spec(f"r{i}"))
    with pytest.raises(RequestError) as refused:
        lab.generate(spec("more"))
    assert refused.value.status == 429
    assert refused.value.retry_after_s is not None
    assert lab.state.counters.requests == {"refused": 1}


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ((), "no decode node is registered"),
        (("prefill",), "no decode node is registered"),
        (("decode",), "no prefill node is registered"),
        (("prefill", "decode"), "no decode node has connected to a prefill node yet"),
    ],
)
def test_without_a_ready_pair_it_is_503_that_says_what_is_missing(
    lab: Lab, spec: Spec, roles: tuple[str, ...], reason: str
) -> None:
    if "prefill" in roles:
        lab.prefill()
    if "decode" in roles:
        lab.decode(peers=())
    lab.start(no_pair_timeout_s=0.1)
    lab.until(lambda: len(lab.healthy()) == len(roles))
    with pytest.raises(RequestError, match=reason) as error:
        lab.complete(spec())
    assert (error.value.status, error.value.retry_after_s) == (503, 0.1)


def test_a_request_waits_for_the_first_pair(lab: Lab, spec: Spec, expected: Expected) -> None:
    lab.start()
    waiting = lab.generate(spec())
    for node in (lab.prefill(), lab.decode()):
        lab.register(node)
    assert lab.read(waiting) == {0: expected((1, 2, 3), 0, 8)}


def test_requests_wait_for_room_and_go_in_order(lab: Lab, spec: Spec, expected: Expected) -> None:
    prefill, decode = lab.prefill(), lab.decode()
    decode.load = NodeLoad(
        num_total_pages=1000, num_free_pages=1000, page_size=4, max_running_requests=2
    )  # and one more while those run
    lab.start()
    lab.ready()
    generations = [lab.generate(spec(f"r{i}", max_tokens=5)) for i in range(12)]
    for generation in generations:
        assert lab.read(generation) == {0: expected((1, 2, 3), 0, 5)}
    assert [request.request_id for request in decode.requests()] == [f"r{i}" for i in range(12)]
    assert prefill.requests() == []


def test_gates_are_passed_when_nothing_moves(lab: Lab, spec: Spec, expected: Expected) -> None:
    """A pong may go on saying that there is no room; only decode's answer counts."""
    lab.prefill()
    decode = lab.decode()
    decode.load = NodeLoad(
        num_total_pages=10, num_free_pages=0, page_size=4, num_running_reqs=9, max_running_requests=1
    )
    lab.start(gate_patience_s=0.05)
    lab.ready()
    assert lab.read(lab.generate(spec())) == {0: expected((1, 2, 3), 0, 8)}


def test_a_deadline_in_the_queue_is_503_and_while_running_504(lab: Lab, spec: Spec) -> None:
    lab.start()
    with pytest.raises(RequestError) as error:
        lab.complete(spec(timeout_s=0.05))
    assert (error.value.status, error.value.code) == (503, "queue_timeout")
    for node in (lab.prefill(), lab.decode()):
        node.tokens_per_attempt = 1
        lab.register(node)
    lab.ready()
    with pytest.raises(RequestError) as error:
        lab.read(lab.generate(spec(timeout_s=0.05)))
    assert (error.value.status, error.value.code) == (504, "deadline_exceeded")


def test_static_urls_are_polled_until_they_answer(lab: Lab, spec: Spec) -> None:
    prefill = lab.prefill()
    lab.decode()
    prefill.alive = False
    lab.static_urls = ("http://p", "http://d")
    lab.start()
    lab.until(lambda: len(lab.state.nodes) == 1)
    prefill.alive = True
    lab.ready()


def test_every_node_is_told_of_every_node(lab: Lab) -> None:
    nodes = small_cluster(lab)
    for node in nodes:
        assert len(node.rosters()[-1].nodes) == 2


def test_a_dead_node_leaves_the_workers(lab: Lab) -> None:
    _, decode = small_cluster(lab, lease_s=1.0, pong_timeout_s=0.5)
    decode.die()
    assert lab.healthy() == ["p-1"]
    lab.until(lambda: len(lab.state.nodes) == 1)
    assert lab.state.nodes.explain_no_pair() == "no decode node is registered"


def test_a_node_whose_link_broke_is_connected_again(lab: Lab) -> None:
    _, decode = small_cluster(lab)
    decode.reset()
    assert not lab.is_ready()
    lab.ready()


def test_a_draining_node_gets_no_new_work(lab: Lab, spec: Spec) -> None:
    *_, d, e = large_cluster(lab)
    d.draining = True
    lab.ready(3)
    for i in range(4):
        lab.read(lab.generate(spec(f"r{i}", max_tokens=1)))
    assert (len(d.requests()), len(e.requests())) == (0, 4)


def test_a_node_that_leaves_ends_what_it_works_on(lab: Lab, spec: Spec, expected: Expected) -> None:
    prefill, decode = small_cluster(lab)
    decode.pace_s = 0.001
    generation = lab.generate(spec(max_tokens=100))
    lab.tell(TakenOut("http://d"))
    assert lab.state.nodes.explain_no_pair() == "every decode node is draining"
    assert lab.read(generation) == {0: expected((1, 2, 3), 0, 100)}
    assert generation.info.num_attempts == 1
    lab.until(lambda: [node.entry for node in lab.state.nodes] == [prefill.entry])


def test_a_router_takes_so_many_nodes(lab: Lab, entry: Callable[..., NodeEntry]) -> None:
    _, decode = small_cluster(lab)
    made_up = [entry("decode", f"made-up-{i}") for i in range(MAX_NODES)]
    for each in made_up[:-2]:
        lab.tell(Registered(each))
    with pytest.raises(RequestError, match=f"has {MAX_NODES} nodes, as many as it takes") as refusal:
        lab.tell(Registered(made_up[-1]))
    assert (refusal.value.status, refusal.value.code) == (503, "too_many_nodes")
    lab.register(decode)  # it is known


def test_f10_an_aborted_answer_has_every_token_that_nodes_have(
    lab: Lab, spec: Spec, expected: Expected
) -> None:
    _, decode = small_cluster(lab)
    decode.tokens_per_attempt, decode.num_withheld = 2, 3
    generation = lab.generate(spec(num_choices=2))
    lab.until(lambda: len(generation.ids.get(1, [])) == 2)
    lab.abort("r")
    assert lab.read(generation) == {choice: expected((1, 2, 3), choice, 5) for choice in (0, 1)}
    assert lab.state.counters.requests["aborted"] == 1
    assert [(cancel.attempt, cancel.aborts) for cancel in decode.cancels()] == [(1, True)]


@pytest.mark.parametrize("goes", ["silent", "lost"])
def test_f10_an_abort_ends_without_a_node_that_does_not_answer(
    lab: Lab, spec: Spec, expected: Expected, goes: str
) -> None:
    _, decode = small_cluster(lab, abort_grace_s=0.01 if goes == "silent" else 60.0)
    decode.tokens_per_attempt, decode.answers_aborts = 1, False
    generation = lab.generate(spec())
    lab.until(lambda: len(generation.deltas) == 1)
    lab.abort("r")
    assert len(decode.cancels()) == 1
    if goes == "lost":
        decode.die()
    assert lab.read(generation) == {0: expected((1, 2, 3), 0, 1)}
    assert len(decode.requests()) == 1, "what an abort found is not tried again"


def test_f8_choices_beyond_a_node_s_places_go_in_turns(lab: Lab, spec: Spec, expected: Expected) -> None:
    _, decode = small_cluster(lab)
    decode.load = msgspec.structs.replace(decode.load, max_running_requests=3)
    lab.until(lambda: lab.load_of(decode).max_running_requests == 3)
    answer = lab.read(lab.generate(spec(num_choices=8)))
    assert answer == {choice: expected((1, 2, 3), choice, 8) for choice in range(8)}
    assert [request.work.choices for request in decode.requests()] == [(0, 1, 2), (3, 4, 5), (6, 7)]


def test_f8_choices_beyond_a_node_s_pages_go_in_turns(lab: Lab, spec: Spec) -> None:
    _, decode = small_cluster(lab)
    decode.load = msgspec.structs.replace(decode.load, num_total_pages=8, num_free_pages=8)
    lab.until(lambda: lab.load_of(decode).num_total_pages == 8)
    lab.read(lab.generate(spec(num_choices=5)))  # 3 + 8 - 1 tokens: 3 pages each
    assert [request.work.choices for request in decode.requests()] == [(0, 1), (2, 3), (4,)]


def test_f8_choices_that_wait_for_their_turn_end_with_an_abort_or_a_stop(
    lab: Lab, spec: Spec, expected: Expected
) -> None:
    _, decode = small_cluster(lab, pong_timeout_s=60.0, gate_patience_s=60.0)
    decode.load = msgspec.structs.replace(decode.load, max_running_requests=1)
    decode.tokens_per_attempt = 1
    lab.until(lambda: lab.load_of(decode).max_running_requests == 1)
    decode.answers_pings = False  # so it is busy with what it was sent, and nobody says otherwise
    generation = lab.generate(spec(num_choices=4))
    lab.until(lambda: lab.state.counters.num_tokens == 2)  # one more than there are places
    generation.stop_choice(3)
    lab.abort("r")
    assert lab.read(generation) == {
        0: [expected((1, 2, 3), 0, 1)[0]],
        1: [expected((1, 2, 3), 1, 1)[0]],
        2: [],
    }


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_f4_the_smallest_pool_ends_a_length_that_nobody_asked_for(lab: Lab, spec: Spec, role: str) -> None:
    """It is settled when the request is sent: when it comes, no node may be known."""
    lab.start()
    wanted = [
        replace(spec("default", max_tokens=900), has_default_length=True),
        replace(spec("short", max_tokens=5), has_default_length=True),
        replace(spec("floor", max_tokens=900, min_tokens=40), has_default_length=True),
        spec("asked", max_tokens=30),
    ]
    running = [lab.generate(each) for each in wanted]
    prefill, decode = lab.prefill(), lab.decode()
    node = prefill if role == "prefill" else decode
    node.load = msgspec.structs.replace(node.load, num_total_pages=7, num_free_pages=7)
    for each in (prefill, decode):
        lab.register(each)
    for answer in running:
        lab.read(answer)
    lengths = {request.request_id: request.work.sampling.max_tokens for request in decode.requests()}
    assert lengths == {"default": 26, "short": 5, "floor": 40, "asked": 30}, (
        "28 tokens of KV, 3 of the prompt"
    )


def test_unstreamed_requests_come_in_larger_pieces(lab: Lab) -> None:
    _, decode = small_cluster(lab)
    work = Work(prompt_ids=(1,), choices=(0,), sampling=SamplingParams(max_tokens=2))
    spec = GenerateSpec(request_id="r", work=work)
    lab.read(lab.generate(spec))
    request = decode.requests()[0]
    assert isinstance(request, GenerateRequest)
    assert request.stream_interval == 16


def test_a_salt_goes_to_the_node_and_into_the_estimates(lab: Lab, spec: Spec) -> None:
    _, decode = small_cluster(lab)
    prompt = tuple(range(1, 13))
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        lab.read(lab.generate(spec(name, prompt, cache_salt=salt)))
    assert [request.work.cache_salt for request in decode.requests()] == ["x", "y", "x"]
    ahead = [request.num_prefill_tokens_ahead for request in decode.requests()]
    assert ahead == [12, 12, 1], "nothing is known of what another salt left there"


def of_session(spec: GenerateSpec, session_id: str) -> GenerateSpec:
    return replace(spec, session=SessionHold(session_id, 60.0))


def decodes_of(nodes: list[Any], name: str) -> list[str]:
    """Which decode nodes were sent requests whose id begins with `name`."""
    return [n.entry.incarnation for n in nodes for r in n.requests() if r.request_id.startswith(name)]


def test_every_turn_goes_to_the_decode_node_that_the_session_names(lab: Lab, spec: Spec) -> None:
    *_, d, e = large_cluster(lab)
    ids = [lab.open_session() for _ in range(4)]
    assert sorted(session_id.rpartition("@")[2] for session_id in ids) == ["d", "d", "e", "e"]
    for turn in range(3):
        for session, session_id in enumerate(ids):
            one = spec(f"{session}-{turn}", prompt=(turn, 5))  # the other node may hold it as well
            lab.read(lab.generate(of_session(one, session_id)))
    for session, session_id in enumerate(ids):
        name = session_id.rpartition("@")[2]
        assert decodes_of([d, e], f"{session}-") == [f"{name}-1"] * 3
    assert {r.session_id for n in (d, e) for r in n.requests()} == set(ids)
    assert {r.session_timeout_s for n in (d, e) for r in n.requests()} == {60.0}


def test_a_session_outlives_its_decode_node(lab: Lab, spec: Spec, expected: Expected) -> None:
    *_, d, e = large_cluster(lab)
    session_id = lab.open_session("mine")
    params = TurnParams(id=session_id)
    first = lab.state.sessions.begin(params, "a", (1, 2, 3), lab.events.now)
    answer = lab.read(lab.generate(of_session(spec("a"), session_id)))
    lab.state.sessions.finish(first, tuple(answer[0]), lab.events.now)
    home, other = (d, e) if d.requests() else (e, d)
    home.tokens_per_attempt = 2
    second = lab.state.sessions.begin(TurnParams(id=session_id, rid="a"), "b", (7,), lab.events.now)
    assert second.prompt_ids == (1, 2, 3, *answer[0], 7)
    generation = lab.generate(of_session(spec("b", prompt=second.prompt_ids, max_tokens=4), session_id))
    lab.until(lambda: lab.state.counters.num_tokens == 8 + 2)
    home.die()
    assert lab.read(generation) == {0: expected(second.prompt_ids, 0, 4)}
    assert decodes_of([other], "b") == [other.entry.incarnation]
    home.alive, home.tokens_per_attempt = True, None
    home.entry = msgspec.structs.replace(home.entry, incarnation="again-1")
    lab.register(home)
    lab.ready(4)
    lab.read(lab.generate(of_session(spec("c"), session_id)))
    assert decodes_of([home, other], "c") == [other.entry.incarnation], "its KV is there now"


def test_a_busy_prefill_node_does_not_move_a_session(lab: Lab, spec: Spec) -> None:
    *_, d, e = large_cluster(lab)
    session_id = lab.open_session()
    home = d if session_id.endswith("@d") else e
    home.fail_with = ["busy"]
    lab.read(lab.generate(of_session(spec("a"), session_id)))
    assert decodes_of([d, e], "a") == [home.entry.incarnation] * 2


def test_a_turn_that_fails_at_home_goes_elsewhere(lab: Lab, spec: Spec) -> None:
    *_, d, e = large_cluster(lab)
    session_id = lab.open_session()
    home, other = (d, e) if session_id.endswith("@d") else (e, d)
    home.fail_with = ["transfer_failed"]
    lab.read(lab.generate(of_session(spec("a"), session_id)))
    assert decodes_of([home, other], "a") == [home.entry.incarnation, other.entry.incarnation]


def test_a_session_is_not_idle_while_a_turn_of_it_runs(lab: Lab, spec: Spec) -> None:
    *_, d, e = large_cluster(lab, session_timeout=0.05)
    session_id = lab.open_session()
    d.tokens_per_attempt = e.tokens_per_attempt = 2
    generation = lab.generate(of_session(spec("a"), session_id))
    lab.open_session()
    lab.until(lambda: len(lab.state.sessions) == 1)
    assert lab.state.sessions.begin(TurnParams(id=session_id), "b", (1,), lab.events.now).prompt_ids == (1,)
    generation.cancel()
    lab.until(lambda: len(lab.state.sessions) == 0)


def test_no_session_without_a_pair(lab: Lab) -> None:
    lab.decode()
    lab.start()
    with pytest.raises(RequestError) as refused:
        lab.open_session()
    assert refused.value.status == 503


@pytest.mark.parametrize("method", ["on_tokens", "open_attempt", "num_tokens"])
def test_a_fault_in_one_request_ends_that_one_alone(
    lab: Lab, spec: Spec, expected: Expected, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it comes as tokens arrive or as it is dispatched: the router and its other requests go on."""
    small_cluster(lab)
    intact = getattr(RequestRecord, method)

    def faulty(record: RequestRecord, *rest: object) -> Any:  # noqa: ANN401
        if record.request_id == "bad":
            raise KeyError("x")
        return intact(record, *rest)

    monkeypatch.setattr(RequestRecord, method, faulty)
    with pytest.raises(RequestError, match="KeyError") as caught:
        lab.read(lab.generate(spec("bad")))
    assert caught.value.status == 500
    generation = lab.generate(spec("good"))
    assert lab.read(generation) == {0: expected((1, 2, 3), 0, 8)}


def test_f1_a_node_with_other_files_is_told_of_once_by_name(
    lab: Lab,
) -> None:
    decode = lab.decode()
    decode.entry = msgspec.structs.replace(decode.entry, text_digests={"tokenizer.json": "theirs"})
    lab.model = replace(lab.model, text_digests={"tokenizer.json": "ours"})
    lab.start()
    lab.register(decode)
    (warning,) = [text for text in lab.log() if "differs" in text]
    assert "decode node http://d differs from this router in tokenizer.json: " in warning


def test_a_message_of_many_outputs_has_the_queue_looked_through_once(
    lab: Lab, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, decode = small_cluster(lab)
    decode.tokens_per_attempt = 0
    queue = lab.requests.queue
    generation = lab.generate(spec("a", num_choices=50, max_tokens=1))
    queue.hold()
    waiting = lab.generate(spec("b"))
    looks: list[float] = []
    due = queue.due

    def looked_through(now: float) -> Any:  # noqa: ANN401
        looks.append(now)
        return due(now)

    monkeypatch.setattr(queue, "due", looked_through)
    output = TokenOutput(
        request_id="a",
        attempt=decode.requests()[0].attempt,
        choice=0,
        position=0,
        token_ids=(1,),
        weight_version="v1",
        finish=Finish(reason="length"),
    )
    outputs = tuple(msgspec.structs.replace(output, choice=choice) for choice in range(50))
    decode.emit(TokenOutputs(outputs=outputs))
    assert len(looks) == 1
    assert lab.read(generation) == {choice: [1] for choice in range(50)}
    waiting.cancel()


def test_without_pairs_none_is_chosen_for_each_request_that_waits(
    lab: Lab, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.start()
    asked: list[object] = []
    monkeypatch.setattr(Dispatcher, "_choose", lambda self, ticket, *_: asked.append(ticket))
    for number in range(3):
        lab.generate(spec(f"r{number}"))
    lab.tell(Tick())
    assert [ticket.waits_for for ticket in lab.requests.queue] == ["a ready pair of nodes"] * 3
    assert asked == []


# ---- what it is asked to do, and says ---------------------------------------------------------------


def test_an_arrival_is_sent_at_once_and_nothing_else_is_done(lab: Lab, spec: Spec) -> None:
    small_cluster(lab)
    arrival = Arrival(spec(), GenerationInfo(num_attempts=0))
    (action,) = lab.state.handle(arrival, lab.events.now)
    assert isinstance(action, Dispatch)
    assert (action.attempt.pair.prefill, action.attempt.pair.decode) == ("p-1", "d-1")
    assert action.message.work.prompt_ids == (1, 2, 3)


def test_an_arrival_that_is_refused_leaves_nothing_behind(lab: Lab, spec: Spec) -> None:
    lab.start(max_queued_requests=1)
    lab.generate(spec("a"))
    with pytest.raises(RequestError):
        lab.generate(spec("b"))
    assert [record.request_id for record in lab.requests] == ["a"]
    assert lab.state.violations() == []


def test_no_deadline_runs_out_in_a_pause(lab: Lab, spec: Spec, expected: Expected) -> None:
    _, decode = small_cluster(lab)
    lab.tell(Pause("retract"))
    waiting = lab.generate(spec(timeout_s=0.1))
    lab.run(2.0)
    assert not waiting.is_over
    assert decode.requests() == []
    lab.tell(Resume())
    assert lab.read(waiting) == {0: expected((1, 2, 3), 0, 8)}


def test_nodes_that_stand_still_are_not_suspected_before_they_move(lab: Lab) -> None:
    _, decode = small_cluster(lab, lease_s=1.0, pong_timeout_s=0.5)
    lab.tell(NodesStandStill())
    decode.answers_pings = False
    lab.run(5.0)
    assert lab.is_ready()
    lab.tell(NodesMove())
    assert lab.is_ready(), "it has as much time as any"
    lab.run(1.0)
    assert lab.healthy() == ["p-1"]


def test_while_somebody_listens_nodes_are_asked_at_once_and_often(lab: Lab) -> None:
    _, decode = small_cluster(lab, ping_interval_s=10.0, pong_timeout_s=11.0, lease_s=60.0)
    lab.run(0.1)
    before = decode.num_pings()
    lab.tell(Listen(is_on=True))
    assert decode.num_pings() == before + 1
    lab.run(1.0)
    assert decode.num_pings() > before + 10
    lab.tell(Listen(is_on=False))
    lab.run(1.0)
    after = decode.num_pings()
    lab.run(5.0)
    assert decode.num_pings() == after
