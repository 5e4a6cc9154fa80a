"""What becomes of sampled tokens: streamed, and perhaps the last of their choice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import msgspec

from ..components.output_streamer import OutputStreamer, StreamKey
from ..components.stop_conditions import check_finish
from ..messages.node import AttemptFailed, FailureCode, Finish, GenerateRequest, ResendFrom
from ..messages.report import PromptReport, SampledToken
from .sequence import DecodeRequest, Sequence
from .timeline import Timeline


class Outputs:
    """Ends on streams and marks on choices are made here together. Pages are not known here: whoever holds a
    choice's frees them when it `is_finished`.

    `gone_clients`: found out by sending to them.
    """

    def __init__(
        self,
        streamer: OutputStreamer,
        timeline: Timeline,
        send: Callable[[bytes, msgspec.Struct], bool],
        gone_clients: set[bytes],
        *,
        eos_token_ids: Iterable[int],
        max_model_len: int,
    ) -> None:
        self._streamer = streamer
        self._timeline = timeline
        self._send = send
        self._gone_clients = gone_clients
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_model_len = max_model_len

    def __contains__(self, key: StreamKey) -> bool:
        """Whether this attempt is on record: open, or over for no long time."""
        return key in self._streamer

    @property
    def is_idle(self) -> bool:
        """Nothing is open, nothing is left to send."""
        return self._streamer.is_idle

    @property
    def next_expiry(self) -> float | None:
        return self._streamer.next_expiry

    # ---- the life of an attempt ---------------------------------------------------------------------

    def refuse(self, link: bytes, message: GenerateRequest | ResendFrom, code: FailureCode, why: str) -> None:
        """Ends an attempt that has no record."""
        failed = AttemptFailed(
            request_id=message.request_id,
            attempt=message.attempt,
            code=code,
            reason=why,
            retriable=code != "invalid",
        )
        self._send(link, failed)

    def open(self, request: DecodeRequest, weight_version: str) -> None:
        message = request.message
        self._streamer.open(
            request.key,
            request.work.choices,
            num_kept_tokens=len(request.work.output_ids),
            stream_interval=message.stream_interval,
            weight_version=weight_version,
        )

    def prompt_done(self, request: DecodeRequest, report: PromptReport) -> None:
        """What is known once the prompt is computed, before its first token."""
        self._streamer.prompt_done(request.key, report)

    def take(self, request: DecodeRequest, sequence: Sequence, sampled: SampledToken) -> None:
        """One token more of one choice: recorded, streamed, and perhaps its last."""
        token_id = sampled.token_id
        if not request.has_first_token:
            request.has_first_token = True
            self._timeline.relays(request)
        sequence.token_ids.append(token_id)
        self._streamer.append(request.key, sampled)
        finish = check_finish(
            token_id,
            sequence.num_output_tokens,
            request.work.sampling,
            self._eos_token_ids,
            self._max_model_len,
            len(sequence.token_ids),
        )
        if finish is not None:
            self._streamer.finish(request.key, sequence.choice, finish)
            sequence.is_finished = True

    def abort(self, request: DecodeRequest) -> list[Sequence]:
        """Its choices end with what they have. Returns those that had not ended before."""
        ended = request.live_sequences
        for sequence in ended:
            self._streamer.finish(request.key, sequence.choice, Finish(reason="abort"))
            sequence.is_finished = True
        return ended

    def fail(
        self, request: DecodeRequest, code: FailureCode, reason: str, *, retriable: bool
    ) -> list[Sequence]:
        """The attempt ends. Returns the choices that had not ended before."""
        self._streamer.fail(request.key, code, reason, retriable)
        ended = request.live_sequences
        for sequence in ended:
            sequence.is_finished = True
        return ended

    def discard(self, request: DecodeRequest, choices: tuple[int, ...]) -> list[Sequence]:
        """The client wants no more of these choices (of all, when none is named). Returns those that had not
        ended before."""
        self._streamer.discard(request.key, choices)
        ended = [each for each in request.live_sequences if not choices or each.choice in choices]
        for sequence in ended:
            sequence.is_finished = True
        return ended

    def forget(self, key: StreamKey, choices: tuple[int, ...]) -> None:
        """The client wants no more of an attempt that is over, or never was."""
        self._streamer.discard(key, choices)

    def resend(self, key: StreamKey, choice: int, position: int) -> bool:
        """False: this output is not on record any more."""
        return self._streamer.resend(key, choice, position)

    # ---- sending ------------------------------------------------------------------------------------

    def flush(self, now: float) -> None:
        self._timeline.sent()
        self._streamer.flush_step(now)

    def keys_of_gone_clients(self) -> Iterator[StreamKey]:
        """What clients had open that are gone; it is forgotten."""
        gone = sorted(self._gone_clients)
        self._gone_clients.clear()
        return itertools.chain.from_iterable(map(self._streamer.drop_client, gone))
