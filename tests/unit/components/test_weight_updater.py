"""WeightUpdater: two phases, one update at a time, never a mix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pdserve.components.weight_updater import Answer, Prepared, WeightUpdater
from pdserve.messages.node import CallReply, CommitWeights, DiscardWeights, PrepareWeights
from pdserve.runtime.errors import StartupError


@dataclass(frozen=True)
class FakeCheckpoint:
    path: Path

    @property
    def fingerprint(self) -> str:
        return f"digest of {self.path}"


@dataclass
class FakeRanks:
    """The further ranks: what they were told, and when the own job was queued."""

    told: list[str] = field(default_factory=list)

    def load_shards(self, path: Path) -> None:
        self.told.append(f"load {path}")

    def drop_shards(self) -> None:
        self.told.append("drop")


@dataclass
class Bench:
    """An updater whose jobs run when the test says so."""

    jobs: list[tuple[str, Callable[[], FakeCheckpoint]]] = field(default_factory=list)

    ranks: FakeRanks = field(default_factory=FakeRanks)

    def __post_init__(self) -> None:
        self.updater = WeightUpdater(FakeCheckpoint, self.start_job, self.ranks)

    def start_job(self, name: str, run: Callable[[], FakeCheckpoint]) -> None:
        self.jobs.append((name, run))
        self.ranks.told.append("own job")

    def prepare(self, update_id: str, call_id: int = 1, link: bytes = b"router") -> Answer | None:
        path, version = f"/models/{update_id}", f"version of {update_id}"
        return self.updater.prepare(
            link,
            PrepareWeights(call_id=call_id, update_id=update_id, model_path=path, weight_version=version),
        )

    def finish_loading(self) -> Answer:
        _, run = self.jobs.pop(0)
        return self.updater.loaded(run())

    def commit(
        self, update_id: str, *, idle: bool = True
    ) -> tuple[CallReply, Prepared[FakeCheckpoint] | None]:
        message = CommitWeights(call_id=2, update_id=update_id)
        answer, swap = self.updater.commit(b"router", message, idle=idle)
        assert answer.link == b"router"
        return answer.reply, swap

    def discard(self, update_id: str) -> CallReply:
        return self.updater.discard(b"router", DiscardWeights(call_id=3, update_id=update_id)).reply


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_prepare_loads_off_the_loop_and_answers_when_it_is_done(bench: Bench) -> None:
    assert bench.prepare("u1", call_id=7) is None
    assert [name for name, _ in bench.jobs] == ["load weights"]
    assert not bench.updater.is_idle
    expected = Answer(b"router", CallReply(call_id=7, success=True, message="prepared"))
    assert bench.finish_loading() == expected
    assert bench.updater.is_idle


def test_commit_gives_what_was_prepared_once(bench: Bench) -> None:
    bench.prepare("u1")
    bench.finish_loading()
    reply, swap = bench.commit("u1")
    assert reply == CallReply(call_id=2, success=True, message="version of u1")
    assert swap == Prepared("u1", "/models/u1", "version of u1", FakeCheckpoint(Path("/models/u1")))
    reply, swap = bench.commit("u1")
    assert (reply.success, reply.message, swap) == (False, "update u1 is not prepared here", None)


def test_a_busy_node_says_no_and_keeps_the_update(bench: Bench) -> None:
    bench.prepare("u1")
    bench.finish_loading()
    reply, swap = bench.commit("u1", idle=False)
    assert (reply.success, reply.message, swap) == (False, "the node is not idle", None)
    reply, swap = bench.commit("u1")
    assert reply.success
    assert swap is not None


def test_a_checkpoint_that_cannot_serve_is_refused_with_the_reason(bench: Bench) -> None:
    bench.prepare("u1", call_id=7)
    answer = bench.updater.failed(StartupError("its vocab_size is 5, not 4"))
    expected = CallReply(call_id=7, success=False, message="its vocab_size is 5, not 4")
    assert answer == Answer(b"router", expected)
    assert bench.updater.is_idle
    assert not bench.commit("u1")[0].success


def test_one_update_loads_at_a_time(bench: Bench) -> None:
    bench.prepare("u1")
    answer = bench.prepare("u2", call_id=8, link=b"other")
    refusal = CallReply(call_id=8, success=False, message="update u1 is being prepared")
    assert answer == Answer(b"other", refusal)
    assert len(bench.jobs) == 1
    assert bench.finish_loading().link == b"router"
    assert bench.commit("u1")[0].success


def test_nothing_is_committed_while_it_loads(bench: Bench) -> None:
    bench.prepare("u1")
    assert bench.commit("u1")[1] is None


def test_a_newer_update_replaces_one_that_nobody_committed(bench: Bench) -> None:
    bench.prepare("u1")
    bench.finish_loading()
    assert bench.prepare("u2") is None
    assert bench.commit("u1")[1] is None, "its memory is given back before the newer one loads"
    bench.finish_loading()
    assert bench.commit("u2")[1] is not None


def test_what_was_discarded_cannot_be_committed(bench: Bench) -> None:
    bench.prepare("u1")
    bench.finish_loading()
    assert bench.discard("another").success
    assert bench.discard("u1") == CallReply(call_id=3, success=True)
    assert bench.commit("u1")[1] is None
    assert bench.discard("u1").success, "again is fine"


def test_what_is_discarded_while_it_loads_is_dropped(bench: Bench) -> None:
    bench.prepare("u1", call_id=7)
    assert bench.discard("u1").success
    assert len(bench.jobs) == 1, "a load cannot be stopped"
    answer = bench.finish_loading()
    assert answer.reply == CallReply(call_id=7, success=False, message="update u1 was discarded")
    assert bench.updater.is_idle
    assert bench.commit("u1")[1] is None
    bench.prepare("u1")
    assert bench.finish_loading().reply.success, "the same update may be asked for again"


def test_discarding_another_update_leaves_the_one_that_loads(bench: Bench) -> None:
    bench.prepare("u2")
    bench.discard("u1")
    assert bench.finish_loading().reply.success


def test_a_load_that_nobody_asked_for_is_a_defect(bench: Bench) -> None:
    with pytest.raises(RuntimeError):
        bench.updater.loaded(FakeCheckpoint(Path("x")))
    with pytest.raises(RuntimeError):
        bench.updater.failed(StartupError("x"))


def test_other_ranks_load_before_the_own_job_is_queued(bench: Bench) -> None:
    """Or forwards queued in between would be computed in another order, and wait for one another for ever."""
    bench.prepare("u1")
    assert bench.ranks.told == ["load /models/u1", "own job"]


def test_other_ranks_let_go_of_what_is_not_committed(bench: Bench) -> None:
    bench.prepare("u1")
    bench.finish_loading()
    bench.discard("u1")
    assert bench.ranks.told.count("drop") == 1
    bench.prepare("u2")
    bench.discard("u2")
    assert bench.ranks.told.count("drop") == 1  # it is still loading
    bench.finish_loading()
    assert bench.ranks.told.count("drop") == 2
    bench.prepare("u3")
    bench.updater.failed(StartupError("no such file"))
    assert bench.ranks.told.count("drop") == 3
    bench.prepare("u4")
    bench.finish_loading()
    bench.commit("u4")
    assert bench.ranks.told.count("drop") == 3
