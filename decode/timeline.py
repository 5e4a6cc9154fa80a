"""What happened to a request on decode and how long it took, as spans on its stream."""

from __future__ import annotations

from ..components.output_streamer import OutputStreamer
from ..engine.forward_batch import ForwardOutput
from ..messages.timeline import Span, SpanClock, moved, span_between
from ..runtime.peer_clock import PeerClocks
from .batching import ChunkRow
from .sequence import DecodeRequest


class Timeline:
    """Spans follow on each other: each begins where the request's timeline ended so far (`reached_s`)."""

    def __init__(self, clock: SpanClock, streamer: OutputStreamer, peer_clocks: PeerClocks) -> None:
        self._clock = clock
        self._streamer = streamer
        self._peer_clocks = peer_clocks  # by address
        # Their first token is sent at the end of this turn; and since when it is here.
        self._relayed: list[tuple[DecodeRequest, float]] = []

    def note(self, request: DecodeRequest, name: str, end: float | None = None) -> None:
        """The span until now, or until `end`."""
        until = self._clock.now() if end is None else end
        self._streamer.note(request.key, (self._clock.span(name, request.reached_s, until),))
        request.reached_s = until

    def chunk(self, request: DecodeRequest, row: ChunkRow, output: ForwardOutput) -> None:
        self.note(request, "engine_queue", output.started)
        chunk = self._clock.span(
            "prefill_chunk", output.started, output.finished, num_tokens=row.row.num_tokens
        )
        self._streamer.note(request.key, (chunk,))
        request.reached_s = output.finished

    def prefilled(self, request: DecodeRequest, spans: tuple[Span, ...], peer_address: str) -> None:
        """What prefill measured, and the two ways there and back: from our clock's stamps to its own."""
        arrived = self._clock.now()
        ours = self._on_our_clock(spans, peer_address)
        if ours:
            sent_unix_s = self._clock.unix_s(request.reached_s)
            there = span_between("to_prefill", sent_unix_s, ours[0].start_unix_s)
            back = span_between("from_prefill", ours[-1].end_unix_s, self._clock.unix_s(arrived))
            self._streamer.note(request.key, (there, *ours, back))
        request.reached_s = arrived

    def handed_off(self, request: DecodeRequest, spans: tuple[Span, ...], peer_address: str) -> None:
        self._streamer.note(request.key, self._on_our_clock(spans, peer_address))
        self.note(request, "last_pages")

    def relays(self, request: DecodeRequest) -> None:
        """Its first token is here."""
        self._relayed.append((request, request.reached_s))

    def sent(self) -> None:
        """Right before the tokens are, so that the span is on the message that it ends with."""
        now = self._clock.now()
        for request, arrived in self._relayed:
            self._streamer.note(request.key, (self._clock.span("relay", arrived, now),))
        self._relayed.clear()

    def first_step(self, request: DecodeRequest, output: ForwardOutput) -> None:
        """If this was it; before the step's token is recorded: it may be the last."""
        if not request.has_decoded:
            request.has_decoded = True
            self.note(request, "decode_wait", output.started)
            self.note(request, "first_decode_step", output.finished)

    def _on_our_clock(self, spans: tuple[Span, ...], peer_address: str) -> tuple[Span, ...]:
        return moved(spans, -self._peer_clocks.lead_s(peer_address))
