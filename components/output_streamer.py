"""Every token that a node produced, until whoever asked for it surely has it.

Life of an attempt's record:

1. `open`, when the GenerateRequest is accepted.
2. `prompt_done` and `append` as results come; `flush_step`, once a loop turn, sends what is due, in one
   message per client. A cursor per choice says how far that is.
3. `finish` ends a choice, exactly once; `fail` ends an attempt, after the tokens that it has.
4. The record stays for a grace time after its last message, so that `resend` can close a gap; then it
   expires.

Sending never blocks and loses nothing: what the network drops is asked for again by position.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from ..messages.node import AttemptFailed, FailureCode, Finish, TokenOutput, TokenOutputs
from ..messages.report import PromptReport, SampledToken
from ..messages.sampling import TokenLogprob
from ..messages.timeline import Span
from ..runtime.errors import BrokenInvariantError

Send: TypeAlias = Callable[[bytes, "TokenOutputs | AttemptFailed"], None]


class StreamKey(NamedTuple):
    """One attempt as one client asked for it."""

    client: bytes  # the routing id of its socket
    request_id: str
    attempt: int


class StreamStateError(BrokenInvariantError):
    """An attempt or choice was not in the state that a call requires. Always a bug of ours."""


@dataclass(slots=True)
class _Choice:
    token_ids: list[int] = field(default_factory=list)  # produced in this attempt
    logprobs: list[TokenLogprob] = field(default_factory=list)  # as long as token_ids, or empty
    hidden_states: list[bytes] = field(default_factory=list)  # likewise
    num_sent: int = 0  # the cursor: tokens that were sent
    resend: bool = False  # the receiver waits for what is behind the cursor, whatever the interval
    finish: Finish | None = None
    finish_sent: bool = False


@dataclass(slots=True)
class _Attempt:
    base: int  # output ids kept from earlier attempts
    stream_interval: int
    weight_version: str
    choices: dict[int, _Choice]
    first_choice: int  # its opening message carries what is of the prompt
    report: PromptReport | None = None  # once the prompt is computed
    failure: AttemptFailed | None = None
    spans: list[Span] = field(default_factory=list)
    num_spans_sent: int = 0

    @property
    def is_closed(self) -> bool:
        return self.failure is not None or all(choice.finish is not None for choice in self.choices.values())


class OutputStreamer:
    """Records and sends the outputs of all attempts of one node.

    `send(client, message)` must neither block nor raise for a client that is gone. `grace_s` is how long a
    closed attempt can be asked for again.

    The first message of a choice (the one that starts at its base position) also carries the weight version;
    that of the attempt's first choice carries the report on the prompt. They go out once, then, unless that
    very message is asked for again.
    """

    def __init__(self, send: Send, *, grace_s: float) -> None:
        self._send = send
        self._grace_s = grace_s
        self._attempts: dict[StreamKey, _Attempt] = {}
        self._dirty: dict[StreamKey, None] = {}  # may have something to send, in order of arrival
        self._closed: OrderedDict[StreamKey, float] = OrderedDict()  # -> when it was sent last, ascending

    # ---- what there is ------------------------------------------------------------------------------

    def __contains__(self, key: StreamKey) -> bool:
        """Whether the attempt is on record: open, or closed and within its grace time."""
        return key in self._attempts

    @property
    def num_open(self) -> int:
        """Attempts that have not been closed and sent to their end."""
        num_resent = sum(key in self._closed for key in self._dirty)  # few are dirty, many closed
        return len(self._attempts) - len(self._closed) + num_resent

    @property
    def is_idle(self) -> bool:
        """Nothing is open, nothing is left to send."""
        return self.num_open == 0

    @property
    def next_expiry(self) -> float | None:
        """When the next closed record expires, on the clock of `now`; None if there is none."""
        return next(iter(self._closed.values())) + self._grace_s if self._closed else None

    # ---- the life of an attempt ---------------------------------------------------------------------

    def open(
        self,
        key: StreamKey,
        choices: Sequence[int],
        *,
        num_kept_tokens: int = 0,
        stream_interval: int = 1,
        weight_version: str = "",
    ) -> None:
        """Begin a record. `num_kept_tokens` is the number of output ids of earlier attempts: positions count
        on from there. A choice's first token goes out at once, then every `stream_interval` tokens; 0: all
        of them at the end."""
        if key in self._attempts:
            raise StreamStateError(f"{key} is open already")
        if not choices or stream_interval < 0:
            raise ValueError(f"choices {choices}, stream_interval {stream_interval}")
        self._attempts[key] = _Attempt(
            base=num_kept_tokens,
            stream_interval=stream_interval,
            weight_version=weight_version,
            choices={choice: _Choice() for choice in choices},
            first_choice=choices[0],
        )

    def prompt_done(self, key: StreamKey, report: PromptReport) -> None:
        """The prompt is computed. Call it before the first `append`."""
        self._open_attempt(key).report = report

    def append(self, key: StreamKey, token: SampledToken) -> None:
        """One token more of a choice. Either all of its tokens come with a logprob or none does, and with the
        hidden state either all or none."""
        choice, logprob, hidden_state = token.choice, token.logprob, token.hidden_state
        record = self._unfinished(key, choice)
        if bool(record.token_ids) and bool(record.logprobs) != (logprob is not None):
            raise StreamStateError(f"{key} choice {choice}: logprobs for some tokens only")
        if bool(record.token_ids) and bool(record.hidden_states) != bool(hidden_state):
            raise StreamStateError(f"{key} choice {choice}: hidden states for some tokens only")
        record.token_ids.append(token.token_id)
        if hidden_state:
            record.hidden_states.append(hidden_state)
        if logprob is not None:
            record.logprobs.append(logprob)
        self._dirty[key] = None

    def note(self, key: StreamKey, spans: Sequence[Span]) -> None:
        """Parts of the request's timeline. They ride on the next output, whichever choice it is of; when no
        more is to come, they are lost."""
        if (attempt := self._attempts.get(key)) is not None:
            attempt.spans += spans

    def finish(self, key: StreamKey, choice: int, finish: Finish) -> None:
        """The choice ends with the tokens that it has (none is fine). Once."""
        record = self._unfinished(key, choice)
        record.finish = finish
        self._dirty[key] = None

    def fail(self, key: StreamKey, code: FailureCode, reason: str, retriable: bool) -> None:
        """The attempt's unfinished choices end here. Their tokens so far are sent, then the failure."""
        attempt = self._open_attempt(key)
        attempt.failure = AttemptFailed(
            request_id=key.request_id, attempt=key.attempt, code=code, reason=reason, retriable=retriable
        )
        self._dirty[key] = None

    def discard(self, key: StreamKey, choices: Sequence[int] = ()) -> None:
        """Forget these choices (all of them if none is named): the client wants no more of them.

        What is not on record is no error: a cancel may come late, or twice.
        """
        attempt = self._attempts.get(key)
        if attempt is None:
            return
        for choice in choices or list(attempt.choices):
            attempt.choices.pop(choice, None)
        if not attempt.choices:
            self._forget(key)
        elif attempt.is_closed and key not in self._closed:
            self._dirty[key] = None

    def resend(self, key: StreamKey, choice: int, position: int) -> bool:
        """Move the choice's cursor back to `position`, as the receiver has nothing from there on.

        The next `flush_step` sends all there is, with the choice's finish or the attempt's failure again.
        False if that is not on record (any more): the caller answers with a failure of the attempt.
        """
        attempt = self._attempts.get(key)
        record = attempt.choices.get(choice) if attempt else None
        if attempt is None or record is None:
            return False
        if not attempt.base <= position <= attempt.base + len(record.token_ids):
            return False
        record.num_sent = min(record.num_sent, position - attempt.base)
        record.finish_sent = False
        record.resend = True
        attempt.num_spans_sent = 0  # which of them were lost is not known; the receiver takes each once
        self._dirty[key] = None
        return True

    def drop_client(self, client: bytes) -> list[StreamKey]:
        """Forget all that a client asked for; returns the attempts that were still open."""
        keys = [key for key in self._attempts if key.client == client]
        still_open = [key for key in keys if not self._attempts[key].is_closed]
        for key in keys:
            self._forget(key)
        return still_open

    # ---- sending ------------------------------------------------------------------------------------

    def flush_step(self, now: float) -> None:
        """Send what is due: for each client one TokenOutputs, then its failures. Let old records expire."""
        outputs: dict[bytes, list[TokenOutput]] = {}
        failures: list[tuple[bytes, AttemptFailed]] = []
        for key in self._dirty:
            attempt = self._attempts[key]
            for choice in attempt.choices:
                if (output := self._take_output(key, attempt, choice)) is not None:
                    outputs.setdefault(key.client, []).append(output)
            if attempt.failure is not None:
                failures.append((key.client, attempt.failure))
            if attempt.is_closed:
                self._closed[key] = now
                self._closed.move_to_end(key)
        self._dirty.clear()

        for client, of_client in outputs.items():
            self._send(client, TokenOutputs(outputs=tuple(of_client)))
        for client, failure in failures:
            self._send(client, failure)

        while self._closed and next(iter(self._closed.values())) + self._grace_s <= now:
            self._forget(next(iter(self._closed)))

    def _take_output(self, key: StreamKey, attempt: _Attempt, choice: int) -> TokenOutput | None:
        """What is due of one choice, with its cursor moved on; None if nothing is."""
        record = attempt.choices[choice]
        start = record.num_sent
        num_new = len(record.token_ids) - start
        finish = record.finish if not record.finish_sent else None
        if finish is None and not (num_new and self._is_due(attempt, record, num_new)):
            return None
        record.num_sent = len(record.token_ids)
        record.finish_sent = record.finish is not None
        record.resend = False
        is_opening = start == 0
        has_prompt = is_opening and choice == attempt.first_choice
        spans = tuple(attempt.spans[attempt.num_spans_sent :])
        attempt.num_spans_sent = len(attempt.spans)
        return TokenOutput(
            request_id=key.request_id,
            attempt=key.attempt,
            choice=choice,
            position=attempt.base + start,
            token_ids=tuple(record.token_ids[start:]),
            logprobs=tuple(record.logprobs[start:]),
            hidden_states=tuple(record.hidden_states[start:]),
            report=attempt.report if has_prompt else None,
            weight_version=attempt.weight_version if is_opening else "",
            finish=finish,
            spans=spans,
        )

    @staticmethod
    def _is_due(attempt: _Attempt, record: _Choice, num_new: int) -> bool:
        """Whether an unfinished choice's new tokens go out now."""
        if record.resend or attempt.failure is not None:
            return True
        if attempt.stream_interval == 0:
            return False
        return record.num_sent == 0 or num_new >= attempt.stream_interval

    # ---- checks -------------------------------------------------------------------------------------

    def violations(self) -> list[str]:
        """What is wrong between records, cursors and the orders of sending and expiry."""
        found = [f"{key} is to be sent but not on record" for key in self._dirty if key not in self._attempts]
        found += [
            f"{key} is to expire but not on record" for key in self._closed if key not in self._attempts
        ]
        if list(self._closed.values()) != sorted(self._closed.values()):
            found.append("closed records are not in order of time")
        for key, attempt in self._attempts.items():
            if attempt.is_closed != (key in self._closed) and key not in self._dirty:
                found.append(f"{key}: its record never expires, or expires while it is open")
            for choice, record in attempt.choices.items():
                if not 0 <= record.num_sent <= len(record.token_ids):
                    found.append(f"{key} choice {choice}: {record.num_sent} sent of {len(record.token_ids)}")
                if len(record.logprobs) not in (0, len(record.token_ids)):
                    found.append(f"{key} choice {choice}: logprobs for some tokens only")
                if len(record.hidden_states) not in (0, len(record.token_ids)):
                    found.append(f"{key} choice {choice}: hidden states for some tokens only")
                if record.finish_sent and (record.finish is None or record.num_sent < len(record.token_ids)):
                    found.append(f"{key} choice {choice}: its end was sent before its tokens")
        return found

    def check(self) -> None:
        """Raise StreamStateError, listing every violation, if there is any."""
        if found := self.violations():
            raise StreamStateError("; ".join(found))

    # ---- helpers ------------------------------------------------------------------------------------

    def _open_attempt(self, key: StreamKey) -> _Attempt:
        attempt = self._attempts.get(key)
        if attempt is None or attempt.is_closed:
            raise StreamStateError(f"{key} is not open")
        return attempt

    def _unfinished(self, key: StreamKey, choice: int) -> _Choice:
        record = self._open_attempt(key).choices.get(choice)
        if record is None or record.finish is not None:
            raise StreamStateError(f"{key} choice {choice} is not open")
        return record

    def _forget(self, key: StreamKey) -> None:
        del self._attempts[key]
        self._dirty.pop(key, None)
        self._closed.pop(key, None)
