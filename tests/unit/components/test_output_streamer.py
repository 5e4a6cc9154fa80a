"""OutputStreamer: what goes out, when, and what can be asked for again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdserve.components.output_streamer import OutputStreamer, StreamKey, StreamStateError
from pdserve.messages.node import AttemptFailed, Finish, TokenOutput, TokenOutputs
from pdserve.messages.report import PromptReport, SampledToken
from pdserve.messages.sampling import TokenLogprob
from pdserve.messages.timeline import Span
from pdserve.tests.present import at_present

KEY = StreamKey(b"router", "request", 1)
OTHER = StreamKey(b"router", "other", 1)
STOP = Finish(reason="stop", matched=2)
GRACE_S = 10.0


class Wire:
    """Records what is sent, and lets a test take it."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, TokenOutputs | AttemptFailed]] = []

    def send(self, client: bytes, message: TokenOutputs | AttemptFailed) -> None:
        self.sent.append((client, message))

    def take(self) -> list[tuple[bytes, TokenOutputs | AttemptFailed]]:
        taken, self.sent = self.sent, []
        return taken

    def take_outputs(self) -> list[TokenOutput]:
        """All outputs sent since the last call, nothing else having been sent."""
        outputs: list[TokenOutput] = []
        for _, message in self.take():
            assert isinstance(message, TokenOutputs)
            outputs += message.outputs
        return outputs


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def streamer(wire: Wire) -> Iterator[OutputStreamer]:
    """A streamer, checked when the test is over."""
    streamer = OutputStreamer(wire.send, grace_s=GRACE_S)
    yield streamer
    streamer.check()


def step(streamer: OutputStreamer, wire: Wire, *token_ids: int, now: float = 0.0) -> list[TokenOutput]:
    """Append to choice 0, end the loop's turn, and return what was sent."""
    for token_id in token_ids:
        streamer.append(KEY, SampledToken(0, token_id))
    streamer.flush_step(now)
    return wire.take_outputs()


# ---- streaming --------------------------------------------------------------------------------------


def test_each_token_goes_out_once_in_its_step(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [0])
    assert step(streamer, wire) == []
    (output,) = step(streamer, wire, 11)
    assert (output.request_id, output.attempt, output.choice) == ("request", 1, 0)
    assert (output.position, output.token_ids, output.finish) == (0, (11,), None)
    assert (output.report, output.weight_version) == (None, "")
    (output,) = step(streamer, wire, 12, 13)
    assert (output.position, output.token_ids) == (1, (12, 13))
    assert step(streamer, wire) == []


def test_positions_count_on_from_the_kept_tokens(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [3], num_kept_tokens=40)
    streamer.append(KEY, SampledToken(3, 11))
    streamer.flush_step(0.0)
    streamer.append(KEY, SampledToken(3, 12))
    streamer.flush_step(0.0)
    assert [output.position for output in wire.take_outputs()] == [40, 41]


def test_one_message_a_client_a_step(streamer: OutputStreamer, wire: Wire) -> None:
    elsewhere = StreamKey(b"another router", "request", 1)
    for key in (KEY, OTHER, elsewhere):
        streamer.open(key, [0, 1])
        streamer.append(key, SampledToken(0, 1))
        streamer.append(key, SampledToken(1, 2))
    streamer.flush_step(0.0)
    sent = wire.take()
    assert [client for client, _ in sent] == [b"router", b"another router"]
    outputs = [message.outputs for _, message in sent if isinstance(message, TokenOutputs)]
    assert [len(of_client) for of_client in outputs] == [4, 2]
    assert [(output.request_id, output.choice) for output in outputs[0]] == [
        ("request", 0),
        ("request", 1),
        ("other", 0),
        ("other", 1),
    ]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (1, [[1], [2], [3], [4], [5], [6], [7]]),
        (2, [[1], [2, 3], [4, 5], [6, 7]]),
        (3, [[1], [2, 3, 4], [5, 6, 7]]),
        (5, [[1], [2, 3, 4, 5, 6], [7]]),
        (0, [[1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_stream_interval(
    streamer: OutputStreamer, wire: Wire, interval: int, expected: list[list[int]]
) -> None:
    """The first token never waits, the end flushes whatever is left."""
    streamer.open(KEY, [0], stream_interval=interval)
    outputs = []
    for token_id in range(1, 8):
        if token_id == 7:
            streamer.append(KEY, SampledToken(0, token_id))
            streamer.finish(KEY, 0, STOP)
            outputs += step(streamer, wire)
        else:
            outputs += step(streamer, wire, token_id)
    assert [list(output.token_ids) for output in outputs] == expected
    assert [output.finish for output in outputs] == [None] * (len(expected) - 1) + [STOP]


def test_a_choice_finishes_exactly_once(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [0])
    span = Span("decode", 1.0, 0.5)
    streamer.append(KEY, SampledToken(0, 11))
    streamer.note(KEY, [span])
    streamer.finish(KEY, 0, STOP)
    (output,) = step(streamer, wire)
    assert (output.token_ids, output.finish, output.spans) == ((11,), STOP, (span,))
    assert step(streamer, wire) == []
    with pytest.raises(StreamStateError):
        streamer.finish(KEY, 0, STOP)
    with pytest.raises(StreamStateError):
        streamer.append(KEY, SampledToken(0, 12))
    assert streamer.is_idle


def test_an_end_without_tokens_is_sent(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [0], num_kept_tokens=5)
    streamer.prompt_done(KEY, PromptReport(logprobs=(None, TokenLogprob(4, -1.0))))
    streamer.finish(KEY, 0, Finish(reason="length"))
    (output,) = step(streamer, wire)
    assert (output.position, output.token_ids, output.finish) == (5, (), Finish(reason="length"))
    assert output.report == PromptReport(logprobs=(None, TokenLogprob(4, -1.0)))


def test_choices_end_alone(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [0, 1])
    streamer.finish(KEY, 0, STOP)
    streamer.flush_step(0.0)
    assert not streamer.is_idle
    with pytest.raises(StreamStateError):
        streamer.append(KEY, SampledToken(0, 1))
    streamer.append(KEY, SampledToken(1, 7))
    streamer.finish(KEY, 1, STOP)
    assert not streamer.is_idle
    streamer.flush_step(0.0)
    assert [(output.choice, output.finish) for output in wire.take_outputs()] == [(0, STOP), (1, STOP)]
    assert streamer.is_idle


def test_logprobs_travel_with_their_tokens(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [0])
    logprobs = [TokenLogprob(token_id, -0.5 * token_id) for token_id in (1, 2, 3)]
    streamer.append(KEY, SampledToken(0, 1, logprobs[0]))
    streamer.flush_step(0.0)
    streamer.append(KEY, SampledToken(0, 2, logprobs[1]))
    streamer.append(KEY, SampledToken(0, 3, logprobs[2]))
    streamer.flush_step(0.0)
    assert [output.logprobs for output in wire.take_outputs()] == [(logprobs[0],), tuple(logprobs[1:])]
    with pytest.raises(StreamStateError, match="some tokens only"):
        streamer.append(KEY, SampledToken(0, 4))


def test_hidden_states_travel_with_their_tokens(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [0, 1])
    report = PromptReport(hidden_states=b"prompt")
    streamer.prompt_done(KEY, report)
    for choice in (0, 1):
        streamer.append(KEY, SampledToken(choice, 1, hidden_state=b"one "))
    streamer.flush_step(0.0)
    streamer.append(KEY, SampledToken(0, 2, hidden_state=b"two "))
    streamer.append(KEY, SampledToken(0, 3, hidden_state=b"thre"))
    streamer.flush_step(0.0)
    outputs = wire.take_outputs()
    assert [output.hidden_states for output in outputs] == [(b"one ",), (b"one ",), (b"two ", b"thre")]
    assert [output.report for output in outputs] == [report, None, None]
    streamer.resend(KEY, 0, 0)
    streamer.flush_step(0.0)
    (again,) = wire.take_outputs()
    assert again.hidden_states == (b"one ", b"two ", b"thre")
    assert again.report == report
    with pytest.raises(StreamStateError, match="hidden states for some tokens only"):
        streamer.append(KEY, SampledToken(0, 4))


# ---- what the first message carries -----------------------------------------------------------------


def test_the_report_on_the_prompt_is_sent_once(streamer: OutputStreamer, wire: Wire) -> None:
    report = PromptReport(logprobs=(None, TokenLogprob(9, -2.0)), num_cached_tokens=32)
    streamer.open(KEY, [4, 5], weight_version="step-7")
    streamer.prompt_done(KEY, report)
    for _ in range(2):
        streamer.append(KEY, SampledToken(4, 1))
        streamer.append(KEY, SampledToken(5, 2))
        streamer.flush_step(0.0)
    outputs = wire.take_outputs()
    assert [output.report for output in outputs] == [report, None, None, None]
    assert [output.weight_version for output in outputs] == ["step-7", "step-7", "", ""]

    streamer.resend(KEY, 4, 1)
    streamer.flush_step(0.0)
    assert wire.take_outputs()[0].report is None
    streamer.resend(KEY, 4, 0)
    streamer.flush_step(0.0)
    assert wire.take_outputs()[0].report == report  # that very message was lost


# ---- gaps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", range(20, 25))
@pytest.mark.parametrize("finished", [False, True])
def test_a_gap_is_sent_again_from_any_position(
    streamer: OutputStreamer, wire: Wire, position: int, finished: bool
) -> None:
    streamer.open(KEY, [0], num_kept_tokens=20, stream_interval=3)
    step(streamer, wire, 1, 2, 3, 4)
    if finished:
        streamer.finish(KEY, 0, STOP)
        step(streamer, wire)
    assert streamer.resend(KEY, 0, position)
    outputs = step(streamer, wire)
    if position == 24 and not finished:
        assert outputs == []  # nothing is missing
    else:
        (output,) = outputs
        assert output.position == position
        assert output.token_ids == (1, 2, 3, 4)[position - 20 :]
        assert output.finish == (STOP if finished else None)
    assert step(streamer, wire) == []


def test_a_gap_includes_what_the_interval_held_back(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [0], stream_interval=0)
    assert step(streamer, wire, 1, 2) == []
    assert streamer.resend(KEY, 0, 1)
    (output,) = step(streamer, wire)
    assert (output.position, output.token_ids) == (0, (1, 2))  # nothing had been sent: the cursor stays
    assert step(streamer, wire, 3) == []  # the gap is closed: the interval holds again


def test_what_is_not_on_record_cannot_be_sent_again(streamer: OutputStreamer, wire: Wire) -> None:
    assert not streamer.resend(KEY, 0, 0)
    streamer.open(KEY, [0], num_kept_tokens=5)
    step(streamer, wire, 1)
    for choice, position in [(1, 5), (0, 4), (0, 7)]:
        assert not streamer.resend(KEY, choice, position)
    assert step(streamer, wire) == []


def test_records_stay_for_the_grace_time(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [0])
    assert at_present(streamer.next_expiry) is None
    streamer.finish(KEY, 0, STOP)
    step(streamer, wire, now=100.0)
    assert streamer.next_expiry == 110.0
    step(streamer, wire, now=109.0)
    assert KEY in streamer
    assert streamer.resend(KEY, 0, 0)
    assert len(step(streamer, wire, now=109.0)) == 1  # which starts the time again
    step(streamer, wire, now=118.9)
    assert KEY in streamer
    step(streamer, wire, now=119.0)
    assert KEY not in streamer
    assert not streamer.resend(KEY, 0, 0)


def test_open_records_never_expire(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [0])
    step(streamer, wire, 1, now=0.0)
    step(streamer, wire, now=1e6)
    assert KEY in streamer
    assert streamer.num_open == 1


# ---- failures ---------------------------------------------------------------------------------------


def test_a_failure_follows_the_tokens_that_are_there(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [0, 1], stream_interval=0)
    streamer.append(KEY, SampledToken(0, 1))
    streamer.finish(KEY, 1, STOP)
    streamer.fail(KEY, "peer_lost", "prefill-1 is gone", retriable=True)
    assert not at_present(streamer.is_idle)
    streamer.flush_step(0.0)
    (_, tokens), (client, failure) = wire.take()
    assert isinstance(tokens, TokenOutputs)
    outputs = [(output.choice, output.token_ids, output.finish) for output in tokens.outputs]
    assert outputs == [(0, (1,), None), (1, (), STOP)]
    assert client == b"router"
    assert failure == AttemptFailed(
        request_id="request", attempt=1, code="peer_lost", reason="prefill-1 is gone", retriable=True
    )
    assert streamer.is_idle
    refused: list[Callable[[], object]] = [
        lambda: streamer.append(KEY, SampledToken(0, 2)),
        lambda: streamer.finish(KEY, 0, STOP),
        lambda: streamer.prompt_done(KEY, PromptReport()),
        lambda: streamer.fail(KEY, "peer_lost", "again", retriable=True),
    ]
    for call in refused:
        with pytest.raises(StreamStateError):
            call()


def test_a_failure_is_repeated_with_the_gap_before_it(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [0])
    streamer.append(KEY, SampledToken(0, 1))
    streamer.fail(KEY, "deadline", "too late", retriable=False)
    streamer.flush_step(0.0)
    first = wire.take()
    assert streamer.resend(KEY, 0, 0)
    streamer.flush_step(1.0)
    assert wire.take() == first


def test_an_attempt_can_fail_before_it_has_anything(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [0])
    streamer.fail(KEY, "busy", "queue full", retriable=True)
    streamer.flush_step(0.0)
    ((_, failure),) = wire.take()
    assert isinstance(failure, AttemptFailed)


# ---- leaving ----------------------------------------------------------------------------------------


def test_discarded_choices_send_nothing_more(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [0, 1, 2])
    for choice in range(3):
        streamer.append(KEY, SampledToken(choice, 1))
    streamer.discard(KEY, [1])
    streamer.flush_step(0.0)
    assert [output.choice for output in wire.take_outputs()] == [0, 2]
    streamer.finish(KEY, 0, STOP)
    streamer.flush_step(0.0)
    streamer.discard(KEY, [2])  # the last open one: now the attempt is closed
    streamer.flush_step(0.0)
    assert streamer.is_idle
    assert streamer.next_expiry == GRACE_S
    streamer.discard(KEY)
    assert KEY not in streamer
    streamer.discard(KEY)  # late or twice: no error


def test_discarding_drops_what_was_not_sent(streamer: OutputStreamer, wire: Wire) -> None:
    streamer.open(KEY, [0])
    streamer.append(KEY, SampledToken(0, 1))
    streamer.discard(KEY, [0])
    assert step(streamer, wire) == []
    assert streamer.is_idle


def test_a_dropped_client_leaves_nothing(streamer: OutputStreamer, wire: Wire) -> None:
    gone = [StreamKey(b"gone", name, 1) for name in ("a", "b", "c")]
    for key in (*gone, KEY):
        streamer.open(key, [0])
        streamer.append(key, SampledToken(0, 1))
    streamer.finish(gone[1], 0, STOP)
    assert streamer.drop_client(b"gone") == [gone[0], gone[2]]
    assert streamer.drop_client(b"gone") == []
    streamer.flush_step(0.0)
    assert [client for client, _ in wire.take()] == [b"router"]
    assert streamer.num_open == 1


def test_opening_twice_and_badly(streamer: OutputStreamer) -> None:
    streamer.open(KEY, [0])
    with pytest.raises(StreamStateError, match="open already"):
        streamer.open(KEY, [0])
    with pytest.raises(ValueError, match="choices"):
        streamer.open(OTHER, [])
    with pytest.raises(ValueError, match="stream_interval -1"):
        streamer.open(OTHER, [0], stream_interval=-1)
    refused: list[Callable[[], object]] = [
        lambda: streamer.append(OTHER, SampledToken(0, 1)),
        lambda: streamer.append(KEY, SampledToken(1, 1)),
        lambda: streamer.finish(KEY, 1, STOP),
        lambda: streamer.fail(OTHER, "busy", "", retriable=True),
    ]
    for call in refused:
        with pytest.raises(StreamStateError):
            call()


# ---- against a receiver that loses messages ---------------------------------------------------------


class LossyMachine(RuleBasedStateMachine):
    """A router at the end of a wire that loses messages. It takes exactly the next position, asks for gaps,
    and must end with every token, in order, and one finish a choice."""

    KEYS = (StreamKey(b"r1", "a", 1), StreamKey(b"r1", "b", 2), StreamKey(b"r2", "a", 1))

    @initialize(interval=st.integers(0, 3), num_choices=st.integers(1, 2), base=st.integers(0, 3))
    def start(self, interval: int, num_choices: int, base: int) -> None:
        self.lose = False
        self.now = 0.0
        self.base = base
        self.streamer = OutputStreamer(self.deliver, grace_s=5.0)
        self.streams = [(key, choice) for key in self.KEYS for choice in range(num_choices)]
        self.produced: dict[tuple[StreamKey, int], list[int]] = {stream: [] for stream in self.streams}
        self.ended: set[tuple[StreamKey, int]] = set()
        self.received: dict[tuple[StreamKey, int], list[int]] = {stream: [] for stream in self.streams}
        self.finishes: dict[tuple[StreamKey, int], int] = dict.fromkeys(self.streams, 0)
        for key in self.KEYS:
            self.streamer.open(
                key, range(num_choices), num_kept_tokens=base, stream_interval=interval, weight_version="w"
            )

    def deliver(self, client: bytes, message: TokenOutputs | AttemptFailed) -> None:
        assert isinstance(message, TokenOutputs)
        named = [(output.request_id, output.choice) for output in message.outputs]
        assert len(set(named)) == len(named)
        if self.lose:
            return
        for output in message.outputs:
            stream = (StreamKey(client, output.request_id, output.attempt), output.choice)
            assert (output.weight_version == "w") == (output.position == self.base)
            if output.position != self.base + len(self.received[stream]):
                continue
            if self.finishes[stream]:
                assert not output.token_ids
                continue
            self.received[stream] += output.token_ids
            self.finishes[stream] += output.finish is not None

    @precondition(lambda self: len(self.ended) < len(self.streams))
    @rule(data=st.data(), num_tokens=st.integers(0, 3), ends=st.booleans())
    def produce(self, data: st.DataObject, num_tokens: int, ends: bool) -> None:
        stream = data.draw(st.sampled_from([each for each in self.streams if each not in self.ended]))
        for _ in range(num_tokens):
            token_id = len(self.produced[stream])
            self.produced[stream].append(token_id)
            key, choice = stream
            self.streamer.append(key, SampledToken(choice, token_id))
        if ends:
            self.streamer.finish(*stream, STOP)
            self.ended.add(stream)

    @rule(lose=st.booleans())
    def flush(self, lose: bool) -> None:
        self.lose = lose
        self.now += 0.01
        self.streamer.flush_step(self.now)

    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.streams))
        assert self.streamer.resend(*stream, self.base + len(self.received[stream]))

    @invariant()
    def nothing_repeats(self) -> None:
        self.streamer.check()
        for stream in self.streams:
            assert self.received[stream] == self.produced[stream][: len(self.received[stream])]
            assert self.finishes[stream] <= 1
            if self.finishes[stream]:
                assert self.received[stream] == self.produced[stream]

    def teardown(self) -> None:
        if not hasattr(self, "streamer"):
            return
        for stream in self.streams:
            if stream not in self.ended:
                self.streamer.finish(*stream, STOP)
        self.flush(lose=False)
        for stream in self.streams:
            assert self.streamer.resend(*stream, self.base + len(self.received[stream]))
        self.flush(lose=False)
        assert self.received == self.produced
        assert set(self.finishes.values()) == {1}
        assert self.streamer.is_idle
        self.now += 5.0
        self.flush(lose=False)
        assert not any(key in self.streamer for key in self.KEYS)
        self.streamer.check()


LossyMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLossyMachine = LossyMachine.TestCase


def test_check_lists_every_violation() -> None:
    streamer = OutputStreamer(Wire().send, grace_s=GRACE_S)
    streamer.open(KEY, [0, 1, 2])
    streamer.open(OTHER, [0])
    streamer._closed[OTHER] = 5.0
    streamer._closed[StreamKey(b"", "unknown", 1)] = 4.0
    streamer._dirty[StreamKey(b"", "missing", 1)] = None
    choices = streamer._attempts[KEY].choices
    choices[0].num_sent = 1
    choices[1].token_ids = [1, 2]
    choices[1].logprobs = [TokenLogprob(1, 0.0)]
    choices[2].finish_sent = True
    found = "; ".join(streamer.violations())
    for expected in (
        "to be sent but not on record",
        "to expire but not on record",
        "not in order of time",
        "its record never expires, or expires while it is open",
        "1 sent of 0",
        "logprobs for some tokens only",
        "its end was sent before its tokens",
    ):
        assert expected in found
    with pytest.raises(StreamStateError, match="1 sent of 0"):
        streamer.check()
