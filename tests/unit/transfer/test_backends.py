"""What every backend must do, between two processes, and what each does of its own."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import mmap
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from pdserve.messages.memory_region import MemoryRegion
from pdserve.runtime.errors import StartupError
from pdserve.tests.deadline import DEADLINE_S
from pdserve.transfer.backends import create_backend, devices, mooncake, nixl, shm
from pdserve.transfer.backends.base import (
    FairQueue,
    TransferBackend,
    Write,
    WriteResult,
    WriteState,
)
from pdserve.transfer.backends.faulty import FaultPlan, FaultyBackend
from pdserve.transfer.copy_plan import Run
from pdserve.transfer.pool_memory import PoolMemory

pytestmark = pytest.mark.process

POOL_BYTES = 1 << 20
KINDS = [
    ("shm", "shm"),
    ("mooncake", "tcp"),
    ("mooncake", "rdma"),
    ("nixl", "tcp"),
    ("nixl", "rdma"),
    ("faulty:shm", "shm"),  # with no fault: the same
]
ASLEEP_OR_GONE = ("S", "I", "")  # of /proc: neither running, nor ready to, nor held by a device
DONE, FAILED, CANCELLED = WriteState.DONE, WriteState.FAILED, WriteState.CANCELLED


class DecodeProcess:
    def __init__(self, name: str, transport: str) -> None:
        script = Path(__file__).with_name("decode_process.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), name.removeprefix("faulty:"), transport, str(POOL_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.region = msgspec.json.decode(self.answer(), type=MemoryRegion)

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def read(self, offset: int, length: int) -> bytes:
        return bytes.fromhex(self.ask(f"read {offset} {length}"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        self.process.communicate(timeout=DEADLINE_S)


@dataclasses.dataclass
class Source:
    """The prefill side: a backend, its pool, and results awaited as the loop does."""

    backend: TransferBackend
    pool: memoryview
    handles: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))
    early: dict[int, WriteResult] = dataclasses.field(default_factory=dict)  # came before it was waited for

    def results(self, num: int) -> dict[int, WriteResult]:
        found: dict[int, WriteResult] = {}
        while len(found) < num:
            readable, _, _ = select.select([self.backend], [], [], 30)
            assert readable, f"{num - len(found)} results did not come"
            for result in self.backend.poll():
                assert result.handle not in found, "a result was given twice"
                found[result.handle] = result
        return found

    def meet(self, region: MemoryRegion) -> WriteResult:
        handle = next(self.handles)
        self.backend.first_contact(handle, region)
        return self.results(1)[handle]

    def write(self, region: MemoryRegion, *runs: Run) -> list[WriteResult]:
        handles = [next(self.handles) for _ in runs]
        for handle, run in zip(handles, runs, strict=True):
            self.backend.submit(handle, region, run)
        results = self.results(len(runs))
        return [results[handle] for handle in handles]


def has_nixl() -> bool:
    return any(importlib.util.find_spec(module.partition(".")[0]) for module in nixl.BINDINGS)


def start_source(name: str, transport: str) -> Source:
    backend: TransferBackend = create_backend(name.removeprefix("faulty:"), transport, "127.0.0.1")
    if name.startswith("faulty:"):
        backend = FaultyBackend(backend, FaultPlan(()))
    source = Source(backend, backend.allocate(POOL_BYTES))
    source.pool[:] = random.Random(0).randbytes(POOL_BYTES)
    backend.register()
    return source


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    name, transport = request.param
    if transport == "rdma" and not devices.rdma_devices():
        pytest.skip("no RDMA device here: scripts/dev softroce has one")
    if name == "nixl" and not has_nixl():
        pytest.skip("nixl is not installed: pip install 'pdserve[nixl]'")
    return name, transport


@pytest.fixture(scope="module")
def source(kind: tuple[str, str]) -> Iterator[Source]:
    source = start_source(*kind)
    yield source
    assert source.backend.num_outstanding == 0
    source.backend.close()


@pytest.fixture(scope="module")
def spawn(kind: tuple[str, str]) -> Iterator[Callable[[], DecodeProcess]]:
    with contextlib.ExitStack() as stack:

        def spawn() -> DecodeProcess:
            process = DecodeProcess(*kind)
            stack.callback(process.end)
            return process

        yield spawn


@pytest.fixture(scope="module")
def decode(source: Source, spawn: Callable[[], DecodeProcess]) -> DecodeProcess:
    process = spawn()
    assert source.meet(process.region).state is DONE
    return process


# ---- what every backend must do ---------------------------------------------------------------------


def test_it_is_what_was_asked_for(kind: tuple[str, str], source: Source) -> None:
    assert (source.backend.name, source.backend.transport) == (kind[0].removeprefix("faulty:"), kind[1])
    assert source.backend.settle_s == (0.0 if kind[1] == "shm" else 2.0)


def test_the_first_contact_touches_no_page(source: Source, spawn: Callable[[], DecodeProcess]) -> None:
    process = spawn()
    assert source.meet(process.region).state is DONE
    assert process.read(0, POOL_BYTES) == bytes(POOL_BYTES)


def test_bytes_are_in_place_when_a_write_is_done(source: Source, decode: DecodeProcess) -> None:
    (result,) = source.write(decode.region, Run(source=4096, dest=100, num_bytes=5001))
    assert result.state is DONE
    assert decode.read(100, 5001) == source.pool[4096 : 4096 + 5001]


def test_the_ends_of_the_pool_can_be_written(source: Source, decode: DecodeProcess) -> None:
    results = source.write(decode.region, Run(0, POOL_BYTES - 7, 7), Run(POOL_BYTES - 9, 0, 9))
    assert [result.state for result in results] == [DONE, DONE]
    assert decode.read(POOL_BYTES - 7, 7) == source.pool[:7]
    assert decode.read(0, 9) == source.pool[POOL_BYTES - 9 :]


def test_many_runs_in_any_order(source: Source, decode: DecodeProcess) -> None:
    size, rng = 1024, random.Random(1)
    dests = rng.sample(range(POOL_BYTES // size), 300)
    runs = [Run(index * size, dest * size, size) for index, dest in enumerate(dests)]
    results = source.write(decode.region, *runs)
    assert {result.state for result in results} == {DONE}
    received = decode.read(0, POOL_BYTES)
    for run in runs:
        assert received[run.dest : run.dest + size] == source.pool[run.source : run.source + size]


@pytest.mark.parametrize(
    "run",
    [
        Run(0, POOL_BYTES - 8, 16),  # into the scratch bytes
        Run(0, -8, 8),
        Run(0, 1 << 40, 8),
        Run(POOL_BYTES - 8, 0, 16),
        Run(-8, 0, 8),
        Run(0, 0, 0),
    ],
)
def test_a_run_outside_of_a_pool_fails_and_sends_nothing(
    source: Source, decode: DecodeProcess, run: Run
) -> None:
    before = decode.read(0, POOL_BYTES)
    (result,) = source.write(decode.region, run)
    assert result.state is FAILED
    assert result.reason
    assert decode.read(0, POOL_BYTES) == before


def test_no_result_means_not_readable(source: Source, decode: DecodeProcess) -> None:
    source.write(decode.region, Run(0, 0, 8))
    assert select.select([source.backend], [], [], 0) == ([], [], [])
    assert source.backend.poll() == []
    assert source.backend.num_outstanding == 0
    assert source.backend.stuck_s(time.monotonic()) == 0.0


def test_cancelling_ends_every_write_once(source: Source, decode: DecodeProcess) -> None:
    """Some had started and some had not, as luck has it. All end, and what is done is in place."""
    size = POOL_BYTES // 256
    runs = {next(source.handles): Run(index * size, index * size, size) for index in range(256)}
    for handle, run in runs.items():
        source.backend.submit(handle, decode.region, run)
    source.backend.cancel([*runs, 10**9])
    results = source.results(len(runs))
    assert {result.state for result in results.values()} <= {DONE, CANCELLED}
    received = decode.read(0, POOL_BYTES)
    for handle, result in results.items():
        if result.state is DONE:
            at = runs[handle].dest
            assert received[at : at + size] == source.pool[at : at + size]


def test_released_memory_is_empty_and_can_be_registered_and_written_from_again(
    kind: tuple[str, str], decode: DecodeProcess
) -> None:
    source = start_source(*kind)
    try:
        region = source.backend.register() if kind[0] == "shm" else None
        assert source.meet(decode.region).state is DONE
        source.backend.disconnect(decode.region)
        resident = resident_bytes(source.pool)
        assert resident >= POOL_BYTES
        source.backend.release()
        assert resident_bytes(source.pool) == 0
        assert bytes(source.pool[:4096]) == bytes(4096)
        again = source.backend.register()
        assert region is None or again == region, "at the same place"
        source.pool[:] = random.Random(1).randbytes(POOL_BYTES)
        assert source.meet(decode.region).state is DONE
        assert source.write(decode.region, Run(64, 128, 1000))[0].state is DONE
        assert decode.read(128, 1000) == source.pool[64:1064]
    finally:
        source.backend.close()


def resident_bytes(pool: memoryview) -> int:
    """Of exactly these addresses: the kernel may have merged the mapping with a neighbour."""
    first = ctypes.addressof(ctypes.c_char.from_buffer(pool)) // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        entries = os.pread(pagemap.fileno(), len(pool) // mmap.PAGESIZE * 8, first * 8)
    return sum(int(entry >> 63) for (entry,) in struct.iter_unpack("=Q", entries)) * mmap.PAGESIZE


def test_two_peers_at_once(source: Source, decode: DecodeProcess, spawn: Callable[[], DecodeProcess]) -> None:
    other = spawn()
    assert source.meet(other.region).state is DONE
    handles = [next(source.handles) for _ in range(100)]
    for index, handle in enumerate(handles):
        region = (decode, other)[index % 2].region
        source.backend.submit(handle, region, Run(index * 64, index * 64, 64))
    assert {result.state for result in source.results(100).values()} == {DONE}
    for index in range(100):
        assert (decode, other)[index % 2].read(index * 64, 64) == source.pool[index * 64 : index * 64 + 64]


def test_writes_to_a_dead_peer_fail_and_others_go_on(
    kind: tuple[str, str], source: Source, decode: DecodeProcess, spawn: Callable[[], DecodeProcess]
) -> None:
    if kind[1] == "rdma" and on_soft_roce():
        pytest.skip("Soft-RoCE retries for ever: see test_soft_roce_keeps_writes_to_a_dead_peer_pending")
    victim = spawn()
    assert source.meet(victim.region).state is DONE
    victim.kill()
    results = source.write(victim.region, Run(0, 0, 64), Run(64, 64, 64))
    assert [result.state for result in results] == [FAILED, FAILED]
    assert all(result.reason for result in results)
    assert source.write(decode.region, Run(0, 0, 64))[0].state is DONE
    source.backend.disconnect(victim.region)


def test_the_first_contact_with_a_dead_peer_fails(source: Source, spawn: Callable[[], DecodeProcess]) -> None:
    victim = spawn()
    victim.kill()
    result = source.meet(victim.region)
    assert result.state is FAILED
    assert result.reason


def test_a_closed_pool_takes_no_more_writes(source: Source, spawn: Callable[[], DecodeProcess]) -> None:
    leaving = spawn()
    assert source.meet(leaving.region).state is DONE
    assert leaving.ask("close") == "closed"
    assert source.write(leaving.region, Run(0, 0, 64))[0].state is FAILED


def test_a_peer_can_be_met_again(source: Source, decode: DecodeProcess) -> None:
    source.backend.disconnect(decode.region)
    assert source.meet(decode.region).state is DONE
    assert source.write(decode.region, Run(0, 0, 64))[0].state is DONE


def test_a_frozen_newcomer_of_one_engine_holds_up_no_other_engine_of_the_process(
    kind: tuple[str, str], source: Source, decode: DecodeProcess, spawn: Callable[[], DecodeProcess]
) -> None:
    """Weights have an engine of their own for this: meeting a frozen peer can hold one for a minute."""
    frozen = spawn()
    other = start_source(*kind)
    os.kill(frozen.process.pid, signal.SIGSTOP)
    other.backend.first_contact(1, frozen.region)
    try:
        for _ in range(3):
            source.backend.disconnect(decode.region)
            assert source.meet(decode.region).state is DONE
            assert source.write(decode.region, Run(0, 0, POOL_BYTES))[0].state is DONE
        if kind[0] == "mooncake":
            assert other.backend.num_outstanding == 1, "the frozen one was being met all the while"
    finally:
        os.kill(frozen.process.pid, signal.SIGCONT)
    assert other.results(1)[1].state is DONE
    other.backend.close()


def test_a_frozen_peer_fails_nothing_and_holds_nobody_up(
    source: Source, decode: DecodeProcess, spawn: Callable[[], DecodeProcess]
) -> None:
    """Its bytes are pending for as long as it takes, or in place where its host takes them without it."""
    frozen = spawn()
    assert source.meet(frozen.region).state is DONE
    os.kill(frozen.process.pid, signal.SIGSTOP)
    handle = next(source.handles)
    source.backend.submit(handle, frozen.region, Run(0, 0, POOL_BYTES))
    for _ in range(3):
        healthy = next(source.handles)
        source.backend.submit(healthy, decode.region, Run(64, 64, 64))
        results: dict[int, WriteResult] = {}
        while healthy not in results:
            results |= source.results(1)
        assert results.pop(healthy).state is DONE
        assert all(result.state is DONE for result in results.values())
        if results:
            source.early |= results
    os.kill(frozen.process.pid, signal.SIGCONT)
    assert (source.early.pop(handle, None) or source.results(1)[handle]).state is DONE
    assert frozen.read(0, POOL_BYTES) == source.pool


def test_nothing_lands_after_a_dead_sender_has_settled(
    source: Source, spawn: Callable[[], DecodeProcess]
) -> None:
    """The receiver is alive all the while: `settle_s` says for how long bytes may still come."""
    sender, receiver = spawn(), spawn()
    assert sender.ask(f"flood {msgspec.json.encode(receiver.region).decode()}") == "flooding"
    sender.kill()
    time.sleep(source.backend.settle_s)
    settled = receiver.read(0, POOL_BYTES)
    assert settled != bytes(POOL_BYTES)
    time.sleep(1.0)
    assert receiver.read(0, POOL_BYTES) == settled


def threads_of(pid: int) -> list[int]:
    return [int(folder.name) for folder in Path(f"/proc/{pid}/task").iterdir()]


def thread_state(pid: int, thread: int) -> str:
    """As in /proc: R runs, S sleeps; empty when it has ended."""
    try:
        stat = Path(f"/proc/{pid}/task/{thread}/stat").read_text()
    except FileNotFoundError:
        return ""
    return stat.rpartition(")")[2].split()[0]


def test_no_thread_spins_while_a_peer_that_was_met_is_idle(
    source: Source, spawn: Callable[[], DecodeProcess]
) -> None:
    """What spins never sleeps, on however fast or busy a machine: each thread is looked at until it does."""
    peer = spawn()
    assert source.meet(peer.region).state is DONE
    assert source.write(peer.region, Run(0, 0, POOL_BYTES))[0].state is DONE
    for pid in (os.getpid(), peer.process.pid):
        awake = set(threads_of(pid)) - {threading.get_native_id()}
        while awake := {thread for thread in awake if thread_state(pid, thread) not in ASLEEP_OR_GONE}:
            time.sleep(0.01)


# ---- shm --------------------------------------------------------------------------------------------


def shm_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob(f"{shm.PREFIX}*")}


def test_shm_removes_its_file_on_close() -> None:
    backend = shm.ShmBackend()
    pool = backend.allocate(4096)
    name = Path(backend.register().session).name
    assert name in shm_files()
    backend.close()
    assert name not in shm_files()
    pool[:] = b"x" * 4096  # the memory outlives the name


def test_shm_removes_what_a_killed_process_left_and_nothing_else() -> None:
    living, dead = DecodeProcess("shm", "shm"), DecodeProcess("shm", "shm")
    dead.kill()
    names = {Path(process.region.session).name for process in (living, dead)}
    assert names <= shm_files()
    shm.remove_abandoned(Path("/dev/shm"))
    assert names & shm_files() == {Path(living.region.session).name}
    living.end()


def test_shm_removes_pools_and_no_file_of_a_trainer(tmp_path: Path) -> None:
    pool, weights = tmp_path / f"{shm.PREFIX}1", tmp_path / "pdserve-step-5.safetensors"
    pool.touch()
    weights.touch()
    shm.remove_abandoned(tmp_path)
    assert (pool.exists(), weights.exists()) == (False, True)


def test_shm_says_when_memory_is_short() -> None:
    backend = shm.ShmBackend()
    with pytest.raises(StartupError, match=r"MiB free and \d+ MiB are needed: .* --shm-size"):
        backend.allocate(1 << 50)
    backend.close()


def test_shm_maps_only_pools(tmp_path: Path) -> None:
    source = start_source("shm", "shm")
    for name in ("secret", "../../dev/shm/secret", f"{shm.PREFIX}secret"):
        (tmp_path / Path(name).name).write_bytes(bytes(8192))
        region = MemoryRegion(session=str(tmp_path / name), address=0, num_bytes=8192, scratch_address=4096)
        assert source.meet(region).state is FAILED
        assert source.write(region, Run(0, 0, 8))[0].state is FAILED
    source.backend.close()


def test_shm_refuses_a_pool_smaller_than_announced() -> None:
    source, owner = start_source("shm", "shm"), shm.ShmBackend()
    owner.allocate(4096)
    region = msgspec.structs.replace(owner.register(), num_bytes=1 << 20, scratch_address=(1 << 20) - 8)
    result = source.meet(region)
    assert result.state is FAILED
    assert "were announced" in result.reason
    source.backend.close()
    owner.close()


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "empty", "\ud800"])
def test_shm_refuses_what_is_no_pool_and_goes_on(tmp_path: Path, name: str) -> None:
    backend = shm.ShmBackend(tmp_path)
    source, owner = Source(backend, backend.allocate(4096)), shm.ShmBackend(tmp_path)
    (tmp_path / f"{shm.PREFIX}empty").touch()
    owner.allocate(4096)
    good = owner.register()
    assert source.meet(good).state is DONE
    odd = msgspec.structs.replace(good, session=str(tmp_path / f"{shm.PREFIX}{name}"))
    assert source.meet(odd).state is FAILED
    assert source.write(good, Run(0, 0, 8))[0].state is DONE
    source.backend.close()
    owner.close()


def test_shm_writes_nothing_behind_what_it_has_met() -> None:
    """The region of a write may say more than that of the first contact did."""
    source, owner = start_source("shm", "shm"), shm.ShmBackend()
    owner.allocate(4096)
    region = owner.register()
    assert source.meet(region).state is DONE
    larger = msgspec.structs.replace(region, num_bytes=1 << 30, scratch_address=1 << 29)
    result = source.write(larger, Run(0, 1 << 20, 8))[0]
    assert (result.state, "bytes" in result.reason) == (FAILED, True)
    assert source.write(region, Run(0, 0, 8))[0].state is DONE
    source.backend.close()
    owner.close()


# ---- mooncake ---------------------------------------------------------------------------------------


class StuckEngine:
    """Holds its lock while it meets any session but `healthy`, and ends no write before `finish` is set."""

    def __init__(self) -> None:
        self.lock, self.thawed, self.finish = threading.Lock(), threading.Event(), threading.Event()
        self.num_submitted = 0

    def initialize(self, host: str, metadata: str, protocol: str, device: str, /) -> int:
        return 0

    def get_rpc_port(self) -> int:
        return 1

    def register_memory(self, address: int, num_bytes: int, /) -> int:
        return 0

    def unregister_memory(self, address: int, /) -> int:
        return 0

    def transfer_submit_write(self, session: str, local: int, peer: int, num_bytes: int, /) -> int:
        with self.lock:
            if session == "healthy":
                self.num_submitted += 1
                return self.num_submitted
            self.thawed.wait()
            return 0

    def transfer_check_status(self, batch_id: int, /) -> int:
        return int(self.finish.is_set())


def test_meeting_a_frozen_peer_holds_up_no_result_and_no_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StuckEngine()
    monkeypatch.setattr(mooncake, "start_engine", lambda *_: engine)
    backend = mooncake.MooncakeBackend("tcp", "127.0.0.1", "", settle_s=2.0)
    source = Source(backend, backend.allocate(4096))
    region = msgspec.structs.replace(backend.register(), session="healthy")
    backend.submit(1, region, Run(0, 0, 8))
    while not engine.num_submitted:
        time.sleep(0.001)
    backend.first_contact(2, msgspec.structs.replace(region, session="frozen"))
    began = time.monotonic()
    backend.submit(3, region, Run(0, 0, 8))  # returns at once, and waits
    backend.submit(4, region, Run(0, 0, 8))
    time.sleep(0.02)
    assert backend.stuck_s(began + 5) > 4
    engine.finish.set()
    assert source.results(1)[1].state is DONE
    backend.cancel([3])
    assert source.results(1)[3].state is CANCELLED
    engine.thawed.set()
    results = source.results(2)
    assert (results[2].state, results[4].state) == (FAILED, DONE)
    assert backend.stuck_s(time.monotonic()) == 0.0
    backend.close()


class OddEngine(StuckEngine):
    """Raises of any session but `healthy`, as bindings do of what they cannot convert."""

    def transfer_submit_write(self, session: str, local: int, peer: int, num_bytes: int, /) -> int:
        if session != "healthy":
            raise TypeError("incompatible function arguments")
        return super().transfer_submit_write(session, local, peer, num_bytes)


def test_a_region_that_an_engine_cannot_read_fails_its_write_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OddEngine()
    engine.finish.set()
    monkeypatch.setattr(mooncake, "start_engine", lambda *_: engine)
    backend = mooncake.MooncakeBackend("tcp", "127.0.0.1", "", settle_s=2.0)
    source = Source(backend, backend.allocate(4096))
    good = msgspec.structs.replace(backend.register(), session="healthy")
    odd = msgspec.structs.replace(good, session="odd")
    backend.first_contact(1, odd)
    backend.submit(2, odd, Run(0, 0, 8))
    failed = source.results(2)
    assert [failed[handle].state for handle in (1, 2)] == [FAILED, FAILED]
    assert "TypeError" in failed[1].reason
    backend.submit(3, good, Run(0, 0, 8))
    assert source.results(1)[3].state is DONE
    assert backend.num_outstanding == 0
    backend.close()


class NotingEngine(StuckEngine):
    """Ends every write at once, and keeps the addresses that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.finish.set()
        self.registered: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []

    def register_memory(self, address: int, num_bytes: int, /) -> int:
        self.registered.append((address, num_bytes))
        return 0

    def transfer_submit_write(self, session: str, local: int, peer: int, num_bytes: int, /) -> int:
        self.writes.append((local, peer, num_bytes))
        return 1


DEVICE_ADDRESS = 0x7F00_0000_0000


def device_memory(num_bytes: int = 8192) -> PoolMemory:
    """As a GPU's would be: an address that the host cannot read."""
    return PoolMemory(address=DEVICE_ADDRESS, num_bytes=num_bytes, give_back=lambda: None, view=None)


def test_mooncake_moves_the_memory_of_a_device_by_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = NotingEngine()
    monkeypatch.setattr(mooncake, "start_engine", lambda *_: engine)
    monkeypatch.setattr(mooncake, "supports_cuda", lambda: True)
    backend = mooncake.MooncakeBackend("tcp", "127.0.0.1", "", settle_s=2.0)
    backend.adopt(device_memory(), 4000)
    region = backend.register()
    assert engine.registered == [(DEVICE_ADDRESS, 8192)]
    assert (region.address, region.scratch_address) == (DEVICE_ADDRESS, DEVICE_ADDRESS + 4096)
    source = Source(backend, memoryview(b""))
    assert source.meet(region).state is DONE
    inside, outside = source.write(region, Run(16, 32, 8), Run(3996, 0, 8))
    assert (inside.state, outside.state) == (DONE, FAILED)
    scratch = DEVICE_ADDRESS + 4096
    assert engine.writes == [(scratch, scratch, 8), (DEVICE_ADDRESS + 16, DEVICE_ADDRESS + 32, 8)]
    backend.close()


def test_memory_without_room_for_the_first_contact_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake, "start_engine", lambda *_: NotingEngine())
    backend = mooncake.MooncakeBackend("tcp", "127.0.0.1", "", settle_s=2.0)
    with pytest.raises(ValueError, match="8191 bytes of memory for a pool that needs 8192"):
        backend.adopt(device_memory(8191), 4000)
    backend.close()


@pytest.mark.parametrize(
    ("has_cuda", "settings", "expected"),
    [
        (False, {}, "moves the host's memory only: pip install mooncake-transfer-engine-cuda13"),
        (True, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "PYTORCH_CUDA_ALLOC_CONF has"),
        (True, {"PYTORCH_ALLOC_CONF": "a:1, expandable_segments: true"}, "PYTORCH_ALLOC_CONF has"),
    ],
)
def test_mooncake_refuses_a_device_that_it_cannot_reach(
    has_cuda: bool, settings: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in mooncake.ALLOCATOR_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    engine = NotingEngine()
    monkeypatch.setattr(mooncake, "start_engine", lambda *_: engine)
    monkeypatch.setattr(mooncake, "supports_cuda", lambda: has_cuda)
    backend = mooncake.MooncakeBackend("tcp", "127.0.0.1", "", settle_s=2.0)
    backend.adopt(device_memory(), 4000)
    with pytest.raises(StartupError, match=expected):
        backend.register()
    assert not engine.registered
    backend.close()


def test_mooncake_says_whether_its_wheel_was_made_for_cuda() -> None:
    wheels = importlib.metadata.packages_distributions()["mooncake"]
    assert mooncake.supports_cuda() == ("mooncake-transfer-engine-non-cuda" not in wheels)


def test_nixl_refuses_the_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "import_bindings", lambda: None)
    monkeypatch.setattr(nixl, "start_agent", lambda *_: (None, 0))
    backend = nixl.NixlBackend("tcp", "", settle_s=2.0)
    backend.adopt(device_memory(), 4000)
    with pytest.raises(StartupError, match="nixl moves the host's memory only"):
        backend.register()
    backend.close()


def test_mooncake_is_stopped_and_goes_on(spawn_mooncake: DecodeProcess) -> None:
    """A write to a frozen peer is pending for as long as it takes: never failed by a timeout."""
    source = start_source("mooncake", "tcp")
    assert source.meet(spawn_mooncake.region).state is DONE
    os.kill(spawn_mooncake.process.pid, signal.SIGSTOP)
    source.backend.submit(500, spawn_mooncake.region, Run(0, 0, POOL_BYTES))
    assert select.select([source.backend], [], [], 0.5) == ([], [], [])
    os.kill(spawn_mooncake.process.pid, signal.SIGCONT)
    assert source.results(1)[500].state is DONE
    assert spawn_mooncake.read(0, POOL_BYTES) == source.pool
    source.backend.close()


def on_soft_roce() -> bool:
    return any(devices.INFINIBAND.glob("rxe*"))


def test_engines_of_one_process_start_side_by_side_and_leave_stderr_alone() -> None:
    """What each prints while it starts is read from the process's stderr."""
    before = os.fstat(2)
    backends: list[TransferBackend] = []
    for _ in range(3):
        threads = [
            threading.Thread(target=lambda: backends.append(create_backend("mooncake", "tcp", "127.0.0.1")))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(backends) == 6
    assert os.path.samestat(os.fstat(2), before)
    for backend in backends:
        backend.close()


@pytest.mark.skipif(not on_soft_roce(), reason="no Soft-RoCE device here: scripts/dev softroce has one")
def test_soft_roce_keeps_writes_to_a_dead_peer_pending_and_others_go_on() -> None:
    """Mooncake asks for 7 retries, which a network card counts and Linux's rxe takes for "without end"."""
    source = start_source("mooncake", "rdma")
    healthy, victim = DecodeProcess("mooncake", "rdma"), DecodeProcess("mooncake", "rdma")
    for process in (healthy, victim):
        assert source.meet(process.region).state is DONE
    victim.kill()
    source.backend.submit(500, victim.region, Run(0, 0, 64))
    assert source.write(healthy.region, Run(0, 0, 64))[0].state is DONE
    assert select.select([source.backend], [], [], 5) == ([], [], [])
    assert source.backend.num_outstanding == 1
    assert source.write(healthy.region, Run(64, 64, 64))[0].state is DONE
    source.backend.close()
    healthy.end()


@pytest.fixture
def spawn_mooncake() -> Iterator[DecodeProcess]:
    process = DecodeProcess("mooncake", "tcp")
    yield process
    process.end()


def test_rdma_is_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "INFINIBAND", tmp_path)
    with pytest.raises(StartupError, match="shows no RDMA device"):
        create_backend("mooncake", "rdma", "127.0.0.1")
    (tmp_path / "mlx5_0").mkdir()
    with pytest.raises(StartupError, match="no RDMA device mlx5_7 here; found mlx5_0"):
        create_backend("mooncake", "rdma", "127.0.0.1", "mlx5_7")


@pytest.mark.skipif(bool(devices.rdma_devices()), reason="a device is here, and is used")
def test_rdma_never_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mooncake reports success on TCP when a device is there but cannot be opened."""
    monkeypatch.setattr(devices, "INFINIBAND", tmp_path)
    (tmp_path / "mlx5_0").mkdir()
    with pytest.raises(StartupError, match="came up without them"):
        create_backend("mooncake", "rdma", "127.0.0.1")


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(StartupError, match="pip install mooncake-transfer-engine"):
        create_backend("mooncake", "tcp", "127.0.0.1")


@pytest.mark.skipif(not devices.rdma_devices(), reason="no RDMA device here")
def test_rdma_refuses_a_source_that_is_not_registered() -> None:
    """TCP takes any source, so that a registration that is forgotten shows on RDMA alone."""
    engine = mooncake.start_engine("rdma", "127.0.0.1", "")
    process = DecodeProcess("mooncake", "rdma")
    source = ctypes.create_string_buffer(4096)
    batch_id = engine.transfer_submit_write(
        process.region.session, ctypes.addressof(source), process.region.address, 8
    )
    if batch_id not in mooncake.INVALID_BATCH_IDS:
        while (status := engine.transfer_check_status(batch_id)) == 0:
            time.sleep(0.01)
        assert status == -1
    assert process.read(0, 8) == bytes(8)
    process.end()


@pytest.mark.parametrize(
    "log",
    [
        ["I1121 installTransport, type=tcp"],
        ["I1121 installTransport, type=rdma", "I1121 installTransport, type=tcp"],
        ["I1121 Topology discovery complete. Found 0 HCAs."],
    ],
)
def test_rdma_alone_must_be_what_the_engine_installed(log: list[str]) -> None:
    mooncake.check_verbs_in_use(["I1121 installTransport, type=rdma"], ["rxe0"])
    with pytest.raises(StartupError, match="devices rxe0 exist, and mooncake came up without"):
        mooncake.check_verbs_in_use(log, ["rxe0"])


@pytest.mark.skipif(not devices.rdma_devices(), reason="no RDMA device here")
def test_the_engine_names_the_transport_and_the_device(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger=mooncake.__name__):
        engine = mooncake.start_engine("rdma", "127.0.0.1", "")
    assert mooncake.INSTALLED_TRANSPORT.findall(caplog.text) == ["rdma"]
    found = devices.rdma_devices()
    assert {device for device, _ in mooncake.OPENED_DEVICE.findall(caplog.text)} <= {*found}
    assert any(device in engine.get_local_topology() for device in found)  # type: ignore[attr-defined]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(StartupError, match="no transfer backend 'nfs'; there are shm, mooncake"):
        create_backend("nfs", "tcp", "127.0.0.1")
    with pytest.raises(StartupError, match="shm has no transport 'rdma'"):
        create_backend("shm", "rdma", "127.0.0.1")


# ---- nixl -------------------------------------------------------------------------------------------

needs_nixl = pytest.mark.skipif(not has_nixl(), reason="nixl is not installed: pip install 'pdserve[nixl]'")


@needs_nixl
def test_nixl_uses_the_transport_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone, UCX would take shared memory between two processes of one host."""
    monkeypatch.setenv("UCX_TLS", "all")
    source, peer = start_source("nixl", "tcp"), DecodeProcess("nixl", "tcp")
    assert source.meet(peer.region).state is DONE
    peer_pid = peer.process.pid
    ours = {connection.laddr for connection in psutil.Process().net_connections("tcp")}
    theirs = {connection.raddr for connection in psutil.Process(peer_pid).net_connections("tcp")}
    assert ours & theirs
    maps = Path(f"/proc/{peer_pid}/maps").read_text()
    assert "ucx_shm" not in maps
    source.backend.close()
    peer.end()


@needs_nixl
def test_nixl_refuses_sessions_that_are_not_its_own(spawn_nixl: DecodeProcess) -> None:
    source, region = start_source("nixl", "tcp"), spawn_nixl.region
    _, _, metadata = region.session.partition(" ")
    for session in ("10.0.0.2:15001", "pdserve-x !", "pdserve-x AAAA", f"pdserve-another {metadata}"):
        result = source.meet(msgspec.structs.replace(region, session=session))
        assert result.state is FAILED
        assert result.reason
    assert source.meet(region).state is DONE
    source.backend.close()


@needs_nixl
def test_nixl_writes_only_where_the_peer_has_registered(spawn_nixl: DecodeProcess) -> None:
    source, region = start_source("nixl", "tcp"), spawn_nixl.region
    assert source.meet(region).state is DONE
    elsewhere = msgspec.structs.replace(region, address=region.address + 2 * region.num_bytes)
    elsewhere = msgspec.structs.replace(elsewhere, scratch_address=elsewhere.address + POOL_BYTES)
    assert source.write(elsewhere, Run(0, 0, 8))[0].state is FAILED
    source.backend.close()


@pytest.fixture
def spawn_nixl() -> Iterator[DecodeProcess]:
    process = DecodeProcess("nixl", "tcp")
    yield process
    process.end()


def test_nixl_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in nixl.BINDINGS:
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    with pytest.raises(StartupError, match=r"pip install 'pdserve\[nixl\]'"):
        create_backend("nixl", "tcp", "127.0.0.1")


def test_nixl_over_rdma_is_refused_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_nixl():
        pytest.skip("nixl is not installed: pip install 'pdserve[nixl]'")
    monkeypatch.setattr(devices, "INFINIBAND", tmp_path)
    with pytest.raises(StartupError, match="shows no RDMA device"):
        create_backend("nixl", "rdma", "127.0.0.1")


# ---- the parts they are made of ---------------------------------------------------------------------


def write(handle: int, session: str, num_bytes: int = 10) -> Write:
    region = MemoryRegion(session=session, address=0, num_bytes=1000, scratch_address=900)
    return Write(handle, region, Run(0, 0, num_bytes))


def take_all(queue: FairQueue) -> list[int]:
    return [taken.handle for taken in iter(queue.take, None)]


def test_peers_take_turns_and_each_keeps_its_order() -> None:
    queue = FairQueue(max_bytes_per_peer=1000)
    for handle, session in enumerate("aaabbc"):
        queue.put(write(handle, session))
    assert take_all(queue) == [0, 3, 5, 1, 4, 2]
    assert len(queue) == 0


def test_bytes_in_flight_are_bounded_for_each_peer() -> None:
    queue = FairQueue(max_bytes_per_peer=25)
    writes = [write(handle, "a") for handle in range(4)]
    for each in writes:
        queue.put(each)
    queue.put(write(9, "b"))
    assert take_all(queue) == [0, 9, 1]
    queue.finished(writes[0])
    assert take_all(queue) == [2]


def test_one_write_longer_than_the_bound_goes_alone() -> None:
    queue = FairQueue(max_bytes_per_peer=5)
    first, second = write(1, "a"), write(2, "a")
    queue.put(first)
    queue.put(second)
    assert take_all(queue) == [1]
    queue.finished(first)
    assert take_all(queue) == [2]


def test_only_what_is_queued_can_be_cancelled() -> None:
    queue = FairQueue(max_bytes_per_peer=10)
    queue.put(write(1, "a"))
    queue.put(write(2, "a"))
    assert take_all(queue) == [1]
    assert [queue.cancel(handle) for handle in (1, 2, 2, 3)] == [False, True, False, False]
    assert len(queue) == 0
