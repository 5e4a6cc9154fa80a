"""What the next forward on a decode node computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..engine.schedule_batch import ScheduledRow
from . import sequence as seq


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One token more of one choice."""

    request: seq.DecodeRequest
    sequence: seq.Sequence
    row: ScheduledRow


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A chunk of a prompt that this node computes itself; it samples every choice when it is the last one."""

    request: seq.DecodeRequest
    row: ScheduledRow


Row = DecodeRow | PrefillRow


def decode_row(request: seq.DecodeRequest, sequence: seq.Sequence) -> DecodeRow:
    row = ScheduledRow(
        row_id=sequence.key.request_id,
        token_ids=sequence.token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens,
        start=len(sequence.token_ids) - 1,
        num_tokens=1,
        pages=sequence.pages,
        sampling=request.message.sampling,
        choices=(sequence.choice,),
        num_output_tokens=sequence.num_output_tokens,
    )
    return DecodeRow(request, sequence, row)


def prefill_rows(requests: Iterable[seq.DecodeRequest], budget: int) -> list[PrefillRow]:
    """Oldest prompts first, each as far as the token budget goes."""
    rows: list[PrefillRow] = []
    for request in requests:
        num_tokens = min(budget, request.num_prefill_tokens - request.num_prefilled)
        if num_tokens <= 0:
            continue
        rows.append(_prefill_row(request, num_tokens))
        budget -= num_tokens
    return rows


def _prefill_row(request: seq.DecodeRequest, num_tokens: int) -> PrefillRow:
    message, sampling = request.message, request.message.sampling
    end = request.num_prefilled + num_tokens
    wants_prompt_logprobs = sampling.num_prompt_logprobs is not None and not message.output_ids
    row = ScheduledRow(
        row_id=message.request_id,
        token_ids=(*message.prompt_ids, *message.output_ids),
        num_prompt_tokens=len(message.prompt_ids),
        start=request.num_prefilled,
        num_tokens=num_tokens,
        pages=request.sequences[0].pages,
        sampling=sampling,
        choices=request.choices if end == request.num_prefill_tokens else (),
        num_output_tokens=len(message.output_ids),
        prompt_logprobs_from=sampling.prompt_logprobs_start if wants_prompt_logprobs else None,
    )
    return PrefillRow(request, row)
