"""What each fault does to a write, and that none breaks the contract of a backend but `corrupt`."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator

import pytest

from pdserve.messages.memory_region import MemoryRegion
from pdserve.runtime.errors import StartupError
from pdserve.tests.deadline import DEADLINE_S
from pdserve.transfer.backends.base import WriteResult, WriteState
from pdserve.transfer.backends.faulty import CORRUPT_BYTES, LATE_S, Fault, FaultPlan, FaultyBackend
from pdserve.transfer.backends.shm import ShmBackend
from pdserve.transfer.copy_plan import Run

POOL_BYTES = 8192
ALL = Run(0, 0, POOL_BYTES)
DONE, FAILED, CANCELLED = WriteState.DONE, WriteState.FAILED, WriteState.CANCELLED


class Pair:
    """A decode node's pool, and a prefill node whose every write has one fault."""

    def __init__(self, *shares: tuple[Fault, float], delay_s: float = 0.05, seed: int = 0) -> None:
        self.decode = ShmBackend()
        self.received = self.decode.allocate(POOL_BYTES)
        self.region: MemoryRegion = self.decode.register()
        self.backend = FaultyBackend(ShmBackend(), FaultPlan(shares, seed, delay_s))
        self.sent = self.backend.allocate(POOL_BYTES)
        self.sent[:] = bytes(1 + index % 251 for index in range(POOL_BYTES))
        self.backend.register()
        self.backend.first_contact(0, self.region)
        assert self.results(1)[0].state is DONE

    def results(self, num: int) -> list[WriteResult]:
        found: list[WriteResult] = []
        while len(found) < num:
            assert select.select([self.backend], [], [], 30)[0], "a result did not come"
            found += self.backend.poll()
        return found

    def poll_until(self, condition: Callable[[], bool]) -> list[WriteResult]:
        found: list[WriteResult] = []
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline
            select.select([self.backend], [], [], 0.01)
            found += self.backend.poll()
        return found

    def write(self, handle: int = 1, run: Run = ALL) -> WriteResult:
        self.backend.submit(handle, self.region, run)
        (result,) = self.results(1)
        assert result.handle == handle
        return result

    def close(self) -> None:
        assert self.backend.num_outstanding == 0
        self.backend.close()
        self.decode.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(*shares: tuple[Fault, float], **options: float) -> Pair:
        pairs.append(Pair(*shares, **options))  # type: ignore[arg-type]
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


def test_fail_sends_nothing(make: Callable[..., Pair]) -> None:
    pair = make((Fault.FAIL, 1.0))
    assert pair.write().state is FAILED
    assert bytes(pair.received) == bytes(POOL_BYTES)
    assert pair.backend.settle_s == 0.0


def test_late_lands_after_its_failure_and_within_the_settling_time(make: Callable[..., Pair]) -> None:
    pair = make((Fault.LATE, 1.0))
    assert pair.backend.settle_s == LATE_S
    assert pair.write().state is FAILED
    assert pair.backend.num_outstanding == 0
    assert bytes(pair.received) == bytes(POOL_BYTES)
    assert pair.poll_until(lambda: pair.received == pair.sent) == []


def test_late_is_not_sent_by_a_process_that_was_frozen(
    make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make((Fault.LATE, 1.0))
    assert pair.write().state is FAILED
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60.0)
    assert pair.backend.poll() == []
    monkeypatch.undo()
    time.sleep(0.05)
    assert pair.backend.poll() == []
    assert bytes(pair.received) == bytes(POOL_BYTES)


def test_half_lands_and_then_it_fails(make: Callable[..., Pair]) -> None:
    pair = make((Fault.HALF, 1.0))
    assert pair.write().state is FAILED
    half = POOL_BYTES // 2
    assert pair.received[:half] == pair.sent[:half]
    assert bytes(pair.received[half:]) == bytes(POOL_BYTES - half)


def test_delay_is_sent_late_and_cannot_be_cancelled(make: Callable[..., Pair]) -> None:
    pair = make((Fault.DELAY, 1.0), delay_s=0.2)
    pair.backend.submit(1, pair.region, ALL)
    pair.backend.cancel([1])
    assert pair.backend.poll() == []
    assert pair.backend.num_outstanding == 1
    assert bytes(pair.received) == bytes(POOL_BYTES)
    assert pair.results(1)[0].state is DONE
    assert pair.received == pair.sent


def test_duplicate_is_done_when_both_have_landed(make: Callable[..., Pair]) -> None:
    pair = make((Fault.DUPLICATE, 1.0))
    sends: list[int] = []
    submit = pair.backend.inner.submit

    def count(handle: int, region: MemoryRegion, run: Run) -> None:
        sends.append(handle)
        submit(handle, region, run)

    pair.backend.inner.submit = count  # type: ignore[method-assign]
    assert pair.write().state is DONE
    assert len(sends) == 2
    assert pair.received == pair.sent


def test_corrupt_says_done_and_is_not(make: Callable[..., Pair]) -> None:
    pair = make((Fault.CORRUPT, 1.0))
    assert pair.write().state is DONE
    assert all(pair.received[index] != pair.sent[index] for index in range(CORRUPT_BYTES))
    assert pair.received[CORRUPT_BYTES:] == pair.sent[CORRUPT_BYTES:]
    assert pair.write(2, Run(0, 16, 3)).state is DONE
    assert all(pair.received[16 + index] != pair.sent[index] for index in range(3))


def test_a_peer_is_let_go_of_when_the_last_late_write_has_landed(
    make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make((Fault.LATE, 1.0))
    left: list[MemoryRegion] = []
    monkeypatch.setattr(pair.backend.inner, "disconnect", left.append)
    pair.write()
    pair.backend.disconnect(pair.region)
    assert left == []
    pair.poll_until(lambda: bool(left))
    assert pair.received == pair.sent
    pair.backend.disconnect(pair.region)
    assert left == [pair.region] * 2


def test_the_shares_and_the_seed_decide(make: Callable[..., Pair]) -> None:
    def outcome(seed: int) -> list[WriteState]:
        pair = make((Fault.FAIL, 0.2), (Fault.DUPLICATE, 0.2), seed=seed)
        return [pair.write(handle, Run(0, 0, 8)).state for handle in range(1, 301)]

    first = outcome(1)
    assert first == outcome(1) != outcome(2)
    assert 30 < first.count(FAILED) < 90


def test_a_run_outside_of_the_pool_fails_and_is_no_fault(make: Callable[..., Pair]) -> None:
    pair = make((Fault.CORRUPT, 1.0))
    assert "source bytes" in pair.write(1, Run(POOL_BYTES - 8, 0, 16)).reason


def test_a_plan_is_read_from_a_flag() -> None:
    plan = FaultPlan.parse("fail=0.05, late=0.1,seed=7,delay_s=2.5")
    assert plan == FaultPlan(((Fault.FAIL, 0.05), (Fault.LATE, 0.1)), 7, 2.5)


@pytest.mark.parametrize(
    "text", ["fail", "fail=x", "burn=0.1", "fail=1.5", "fail=0.6,late=0.6", "seed=a", ""]
)
def test_a_bad_plan_is_refused(text: str) -> None:
    with pytest.raises(StartupError, match="--faulty"):
        FaultPlan.parse(text)
