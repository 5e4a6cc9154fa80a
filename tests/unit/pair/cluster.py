"""A prefill and a decode node in one process: the real schedulers and parts, fakes at the edges only.

The nodes and the engine are those of `pdserve.simulation`. Forwards and writes end when a test says so,
never by themselves, so every order of events can be arranged. The backend verifies that what it writes is
exposed or in quarantine. `Pair.settle` checks the invariants of both nodes each time.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec

from pdserve.components.page_allocator import PageAllocator
from pdserve.decode.peer_links import LinkDown
from pdserve.messages.codec import Codec
from pdserve.messages.malformed import MalformedMessage, malformed
from pdserve.messages.memory_region import MemoryRegion
from pdserve.messages.node import (
    AttemptFailed,
    CancelRequest,
    ClientToNode,
    Finish,
    GenerateRequest,
    NodeToClient,
    Roster,
    TokenOutputs,
)
from pdserve.messages.peer import PeerToDecode, PeerToPrefill
from pdserve.messages.report import PromptReport
from pdserve.messages.sampling import SamplingParams, TokenLogprob
from pdserve.messages.timeline import Span
from pdserve.messages.work import Work
from pdserve.prefill.scheduler import ToPrefill
from pdserve.simulation import nodes
from pdserve.simulation.nodes import Place, Settings
from pdserve.simulation.tokens import (
    LAYOUT,
    PAGE_SIZE,
    Pool,
    expected_tokens,
    kv_of,
    prompt_of,
)
from pdserve.transfer.backends.base import WriteResult, WriteState
from pdserve.transfer.copy_plan import Run

__all__ = [
    "ADDRESS",
    "LAYOUT",
    "PAGE_SIZE",
    "ROUTER",
    "SETTLE_S",
    "DecodeNode",
    "Pair",
    "PrefillNode",
    "expected_tokens",
    "kv_of",
    "prompt_of",
    "read_stream",
]


@dataclass
class FakeClock:
    """Stands still but for a nanosecond at each look, so what is measured later ends later."""

    now: float = 100.0

    def tick(self) -> float:
        self.now += 1e-9
        return self.now

    def tick_of_engine(self) -> float:
        """A forward takes a hundred times longer than anything else that is measured."""
        self.now += 1e-7
        return self.now


ADDRESS = "tcp://prefill:1"
ROUTER = b"router"
SETTLE_S = 2.0
T = TypeVar("T")


# ---- the wire ---------------------------------------------------------------------------------------


@dataclass
class HeldWrite:
    handle: int
    copies: list[tuple[int, int]]  # source page, destination page


class FakeBackend:
    """Holds every write until told. With `has_started` a cancel comes too late for any of them."""

    name = "fake"
    transport = "fake"
    settle_s = SETTLE_S

    def __init__(
        self, source: Pool, destination: Pool, decode_allocator: PageAllocator, journal: list[str]
    ) -> None:
        self.source = source
        self.destination = destination
        self.decode_allocator = decode_allocator
        self.journal = journal
        self.held: list[HeldWrite] = []
        self.failed: list[HeldWrite] = []  # may land late
        self.results: list[WriteResult] = []
        self.num_bytes = 0  # that are in place
        self.num_pages_written = 0
        self.has_started = False
        self.connected: set[str] = set()

    @property
    def num_outstanding(self) -> int:
        return len(self.held)

    def first_contact(self, handle: int, region: MemoryRegion) -> None:
        self.connected.add(region.session)
        self.results.append(WriteResult(handle, WriteState.DONE))

    def submit(self, handle: int, region: MemoryRegion, run: Run) -> None:
        assert region.session in self.connected
        source, dest, num_pages = (
            bytes_ // LAYOUT.page_bytes for bytes_ in (run.source, run.dest, run.num_bytes)
        )
        copies = [(source + i, dest + i) for i in range(num_pages)]
        self.journal += [f"write page {page}" for page, _ in copies]
        self.held.append(HeldWrite(handle, copies))

    def cancel(self, handles: Iterable[int]) -> None:
        if self.has_started:
            return
        cancelled = set(handles)
        for write in [write for write in self.held if write.handle in cancelled]:
            self.held.remove(write)
            self.results.append(WriteResult(write.handle, WriteState.CANCELLED))

    def disconnect(self, region: MemoryRegion) -> None:
        assert not self.held
        self.connected.discard(region.session)

    def poll(self) -> list[WriteResult]:
        results, self.results = self.results, []
        return results

    def fileno(self) -> int:
        return -1

    def stuck_s(self, now: float) -> float:
        return 0.0

    def close(self) -> None:
        pass

    # ---- for tests ----

    def finish(self, count: int | None = None) -> bool:
        """The oldest writes are in place (all of them if no count is given); False if there is none."""
        done = self.held[:count]
        del self.held[: len(done)]
        for write in done:
            self._land(write)
            self.num_bytes += len(write.copies) * LAYOUT.page_bytes
            self.num_pages_written += len(write.copies)
            self.results.append(WriteResult(write.handle, WriteState.DONE))
        return bool(done)

    def fail(self, count: int | None = None) -> None:
        """The oldest writes fail. What was sent of them may land for a while: `land_late`."""
        failed = self.held[:count]
        del self.held[: len(failed)]
        self.failed += failed
        self.results += [WriteResult(write.handle, WriteState.FAILED, "the wire broke") for write in failed]

    def land_late(self) -> None:
        for write in self.failed:
            self._land(write)
        self.failed.clear()

    def _land(self, write: HeldWrite) -> None:
        for source, destination in write.copies:
            state = self.decode_allocator.describe(destination)
            assert state.startswith(("exposed", "quarantined")), f"a write lands on a page that is {state}"
            self.destination.pages[destination] = self.source.pages[source]


# ---- the sockets ------------------------------------------------------------------------------------


@dataclass
class Wire:
    """One epoch's connection."""

    epoch: int
    link: bytes
    is_down: bool = False
    to_prefill: deque[PeerToPrefill] = field(default_factory=deque)
    to_decode: deque[PeerToDecode] = field(default_factory=deque)


class FakeServer(Generic[T]):
    """A node's bound socket. Messages go through the codec, as on the wire."""

    def __init__(self, receives: object) -> None:
        self._codec: Codec[T] = Codec(receives)
        self._to_client: Codec[NodeToClient] = Codec(NodeToClient)
        self._to_decode: Codec[PeerToDecode] = Codec(PeerToDecode)
        self.inbox: deque[tuple[bytes, T | MalformedMessage]] = deque()
        self.sent: dict[bytes, list[NodeToClient]] = {}
        self.gone: set[bytes] = set()
        self.deaf: set[bytes] = set()  # who reads no answer
        self.wires: dict[bytes, Wire] = {}

    def deliver(self, link: bytes, message: msgspec.Struct) -> None:
        self.deliver_raw(link, self._codec.encode(message))

    def deliver_raw(self, link: bytes, payload: bytes) -> None:
        try:
            self.inbox.append((link, self._codec.decode(payload)))
        except msgspec.DecodeError as error:
            self.inbox.append((link, malformed(payload, error)))

    def receive(self) -> Iterator[tuple[bytes, T | MalformedMessage]]:
        while self.inbox:
            yield self.inbox.popleft()

    def send(self, link: bytes, message: msgspec.Struct) -> bool:
        if link in self.gone:
            return False
        if link in self.deaf:
            return True
        if link in self.wires:
            wire = self.wires[link]
            if not wire.is_down:
                wire.to_decode.append(self._to_decode.decode(self._to_decode.encode(message)))
            return not wire.is_down
        decoded = self._to_client.decode(self._to_client.encode(message))
        self.sent.setdefault(link, []).append(decoded)
        return True


class PrefillNode(nodes.PrefillNode):
    server: FakeServer[ToPrefill]  # what `Pair` gives it


class DecodeNode(nodes.DecodeNode):
    server: FakeServer[ClientToNode]  # what `Pair` gives it


class Network:
    """Decode's connections to prefill, in place of PeerLinks: in order, until they are cut."""

    def __init__(self, server: FakeServer[ToPrefill], journal: list[str]) -> None:
        self.server = server
        self.journal = journal
        self.wires: dict[str, Wire] = {}
        self.holds_to_prefill = False
        self.holds_to_decode = False

    def open(self, address: str, epoch: int) -> None:
        self.close(address)
        if address != ADDRESS:  # nobody is there: a link that goes down at once
            self.wires[address] = Wire(epoch, b"", is_down=True)
            return
        wire = self.wires[address] = Wire(epoch, f"epoch-{epoch}".encode())
        self.server.wires[wire.link] = wire

    def close(self, address: str) -> None:
        wire = self.wires.pop(address, None)
        if wire is not None:
            wire.is_down = True

    def send(self, address: str, message: PeerToPrefill) -> None:
        wire = self.wires.get(address)
        if wire is not None and not wire.is_down:
            wire.to_prefill.append(message)

    def receive(self) -> Iterator[tuple[str, PeerToDecode | LinkDown]]:
        for address, wire in list(self.wires.items()):
            while wire.to_decode and not self.holds_to_decode and self.wires.get(address) is wire:
                message = wire.to_decode.popleft()
                self.journal.append(f"{type(message).__name__} arrives")
                yield address, message
            if wire.is_down and self.wires.get(address) is wire:
                yield address, LinkDown(wire.epoch)

    # ---- for tests ----

    def cut(self) -> None:
        """The connection is lost, with all that was on it."""
        for wire in self.wires.values():
            wire.is_down = True
            wire.to_prefill.clear()
            wire.to_decode.clear()

    def deliver(self) -> None:
        for wire in self.wires.values():
            while wire.to_prefill and not self.holds_to_prefill:
                self.server.deliver(wire.link, wire.to_prefill.popleft())

    @property
    def is_quiet(self) -> bool:
        return all(
            not wire.is_down
            and (self.holds_to_prefill or not wire.to_prefill)
            and (self.holds_to_decode or not wire.to_decode)
            for wire in self.wires.values()
        )


# ---- the client -------------------------------------------------------------------------------------


@dataclass
class Stream:
    """What a client has of one attempt."""

    tokens: dict[int, list[int]] = field(default_factory=dict)  # by choice
    finishes: dict[int, Finish] = field(default_factory=dict)
    failure: AttemptFailed | None = None
    num_cached_tokens: int = 0
    weight_version: str = ""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)  # by choice
    hidden_states: list[list[float]] = field(default_factory=list)  # of all choices' tokens
    prompt_hidden_states: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    message_sizes: list[int] = field(default_factory=list)  # tokens in each output

    @property
    def span_names(self) -> list[str]:
        return [span.name for span in self.spans]

    @property
    def reasons(self) -> dict[int, str]:
        return {choice: finish.reason for choice, finish in self.finishes.items()}


def read_stream(
    messages: Iterable[NodeToClient], request_id: str, attempt: int = 1, *, base: int = 0
) -> Stream:
    """Puts an attempt's messages together; anything but the next token, or a second end, is an error."""
    stream = Stream()
    for message in messages:
        if isinstance(message, AttemptFailed) and (message.request_id, message.attempt) == (
            request_id,
            attempt,
        ):
            assert stream.failure is None, "an attempt failed twice"
            stream.failure = message
        elif isinstance(message, TokenOutputs):
            for output in message.outputs:
                if (output.request_id, output.attempt) != (request_id, attempt):
                    continue
                assert stream.failure is None, "a token after the failure"
                assert output.choice not in stream.finishes, "a token after the end"
                tokens = stream.tokens.setdefault(output.choice, [])
                assert output.position == base + len(tokens), "a gap or a repeat"
                tokens += output.token_ids
                report = output.report or PromptReport()
                stream.message_sizes.append(len(output.token_ids))
                stream.num_cached_tokens = report.num_cached_tokens or stream.num_cached_tokens
                stream.weight_version = output.weight_version or stream.weight_version
                stream.prompt_logprobs = report.logprobs or stream.prompt_logprobs
                stream.logprobs.setdefault(output.choice, []).extend(output.logprobs)
                stream.hidden_states += [array("f", state).tolist() for state in output.hidden_states]
                stream.prompt_hidden_states += array("f", report.hidden_states).tolist()
                stream.spans += output.spans
                if output.finish is not None:
                    stream.finishes[output.choice] = output.finish
    return stream


# ---- the pair ---------------------------------------------------------------------------------------


class Pair:
    """Both nodes, connected and ready. `settle` lets everything happen that needs no forward and no write."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401, the fields of Settings
        self.settings = Settings(**settings)
        self.clock = FakeClock()
        self.journal: list[str] = []
        no_pool, no_allocator = Pool(1), PageAllocator(1)
        self.backend = FakeBackend(no_pool, no_pool, no_allocator, self.journal)
        to_prefill: FakeServer[ToPrefill] = FakeServer(ToPrefill)
        self.prefill = PrefillNode(
            Place(name="prefill", incarnation="prefill-1"),
            to_prefill,
            self.backend,
            self.settings,
            clock=self.clock.tick,
            journal=self.journal,
        )
        self.backend.source = self.prefill.pool
        self.network = Network(to_prefill, self.journal)
        self.decode = DecodeNode(
            Place(name="decode", incarnation="decode-1"),
            FakeServer(ClientToNode),
            self.network,
            self.settings,
            clock=self.clock.tick,
            journal=self.journal,
        )
        for node in (self.prefill, self.decode):
            node.engine.clock = self.clock.tick_of_engine
        self.backend.destination = self.decode.pool
        self.backend.decode_allocator = self.decode.allocator
        if not self.settings.is_colocated:
            self.connect()

    @property
    def now(self) -> float:
        return self.clock.now

    @now.setter
    def now(self, now: float) -> None:
        self.clock.now = now

    def connect(self) -> None:
        self.to_decode(Roster(router_id="router", nodes=(self.prefill.status.entry,)))
        assert self.decode.rooms.ready_peers() == {"prefill-1": ADDRESS}
        self.journal.clear()

    # ---- time ----

    def step(self) -> None:
        """One turn of each loop."""
        self.network.deliver()
        self.prefill.loop.step(self.now)
        self.decode.loop.step(self.now)

    def settle(self) -> None:
        for _ in range(1000):
            self.step()
            if self._is_quiet:
                self.prefill.check()
                self.decode.check()
                return
        raise AssertionError("the loops do not come to rest")

    @property
    def _is_quiet(self) -> bool:
        nodes_are_quiet = not (
            self.prefill.server.inbox
            or any(node.digests.jobs and not node.digests.is_held for node in (self.prefill, self.decode))
            or self.decode.server.inbox
            or any(node.engine.results or node.engine.jobs.results for node in (self.prefill, self.decode))
            or self.backend.results
        )
        return nodes_are_quiet and self.network.is_quiet

    def advance(self, seconds: float) -> None:
        """Time passes while both loops run well."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 0.1)
            self.settle()

    # ---- work ----

    def compute(self, *nodes: PrefillNode | DecodeNode) -> None:
        """One forward of each of these nodes (of both if none is named) is done."""
        for node in nodes or (self.prefill, self.decode):
            node.engine.finish()
        self.settle()

    def write(self, count: int | None = None) -> None:
        """The oldest writes are in place."""
        self.backend.finish(count)
        self.settle()

    def run(self, max_turns: int = 2000) -> None:
        """Forwards and writes end as fast as they come, until both nodes are at rest."""
        self.settle()
        for _ in range(max_turns):
            worked = [self.prefill.engine.finish(), self.backend.finish(), self.decode.engine.finish()]
            if not any(worked):
                return
            self.settle()
        raise AssertionError("the work does not end")

    def finish(self) -> None:
        """To the end of all work and all quarantine; both nodes must then be empty."""
        self.run()
        self.advance(5.0)
        self.run()
        self.prefill.check_idle()
        self.decode.check_idle()

    # ---- messages ----

    def generate(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        max_tokens: int = 4,
        attempt: int = 1,
        output_ids: Sequence[int] = (),
        choices: tuple[int, ...] = (0,),
        deadline_s: float = 1000.0,
        stream_interval: int = 1,
        client: bytes = ROUTER,
        prefill: str = "prefill-1",
        num_prefill_tokens_ahead: int = 0,
        was_retracted: bool = False,
        weight_version: str = "",
        session_id: str = "",
        session_timeout_s: float = 0.0,
        cache_salt: str = "",
        **sampling: Any,  # noqa: ANN401, the fields of SamplingParams
    ) -> None:
        """Send a request to decode; nothing moves until the loops do."""
        message = GenerateRequest(
            request_id=request_id,
            attempt=attempt,
            work=Work(
                prompt_ids=tuple(prompt),
                output_ids=tuple(output_ids),
                choices=choices,
                sampling=SamplingParams(max_tokens=max_tokens, **sampling),
                cache_salt=cache_salt,
            ),
            prefill_incarnation="" if self.settings.is_colocated else prefill,
            deadline_s=deadline_s,
            stream_interval=stream_interval,
            num_prefill_tokens_ahead=num_prefill_tokens_ahead,
            was_retracted=was_retracted,
            weight_version=weight_version,
            session_id=session_id,
            session_timeout_s=session_timeout_s,
        )
        self.decode.server.deliver(client, message)

    def start(self, request_id: str, prompt: Sequence[int], **options: Any) -> None:  # noqa: ANN401
        self.generate(request_id, prompt, **options)
        self.settle()

    def cancel(self, request_id: str, *choices: int) -> None:
        self.to_decode(CancelRequest(request_id=request_id, attempt=1, choices=choices))

    def to_decode(self, message: ClientToNode, client: bytes = ROUTER) -> None:
        self.decode.server.deliver(client, message)
        self.settle()

    def to_prefill(self, message: ClientToNode, client: bytes = ROUTER) -> None:
        self.prefill.server.deliver(client, message)
        self.settle()

    def stream(self, request_id: str, attempt: int = 1, *, client: bytes = ROUTER, base: int = 0) -> Stream:
        return read_stream(self.decode.server.sent.get(client, ()), request_id, attempt, base=base)

    def tokens(self, request_id: str, choice: int = 0) -> list[int]:
        return self.stream(request_id).tokens.get(choice, [])

    def last_reply(self, node: PrefillNode | DecodeNode, client: bytes = ROUTER) -> NodeToClient:
        return node.server.sent[client][-1]

    def state(self, request_id: str) -> str:
        """The state that a request is in on decode; empty: it is gone."""
        return next(
            (
                state
                for state, keys in self.decode.states.items()
                if any(key.request_id == request_id for key in keys)
            ),
            "",
        )

    def check_answer(self, request_id: str, prompt: Sequence[int], max_tokens: int, choice: int = 0) -> None:
        """The whole answer came, ended by its length."""
        stream = self.stream(request_id)
        assert stream.failure is None, stream.failure
        assert stream.tokens[choice] == expected_tokens(prompt, max_tokens, choice)
        assert stream.finishes[choice] == Finish(reason="length")
