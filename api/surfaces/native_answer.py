"""An answer as /generate writes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, assert_never

import msgspec
from msgspec import UNSET

from ..slices import HOLE, filled
from ..text.pieces import OutputDelta
from ..text.pipeline import TextRun
from .hidden_states import hidden_states
from .logprobs import native_logprobs
from .metrics import RequestMeter
from .native_types import MetaInfo, NativeFinish, NativeOutput, NativeRequest
from .openai_types import CachedTokensDetails
from .serving import Serving


class NativeRenderer:
    """`is_list`: the answer is a list of outputs, and a stream says which one each event is of."""

    def __init__(
        self, serving: Serving, body: NativeRequest, run: TextRun, meter: RequestMeter, *, is_list: bool
    ) -> None:
        self._tokenizer = serving.tokenizer
        self._body = body
        self._run = run
        self._meter = meter
        self._is_list = is_list

    async def chunks(self, delta: OutputDelta) -> list[bytes]:
        output = await self._output(delta)
        if self._is_list:
            output = msgspec.structs.replace(output, index=delta.output.index)
        return [msgspec.json.encode(output)]

    async def last_chunks(self) -> list[bytes]:
        return []

    async def output(self, delta: OutputDelta) -> bytes:
        return msgspec.json.encode(await self._output(delta))

    async def whole(self, outputs: Sequence[bytes]) -> list[bytes]:
        return filled(msgspec.json.encode([HOLE]), outputs) if self._is_list else [*outputs]

    async def _output(self, delta: OutputDelta) -> NativeOutput:
        """The first of an output tells of its prompt, too."""
        prompt = delta.output.prompt
        spec = self._run.spec(prompt)
        info = self._run.info(prompt)
        sampling = spec.work.sampling
        told = partial(native_logprobs, self._tokenizer, with_text=self._body.return_text_in_logprobs)
        logprobs: dict[str, Any] = {}
        if (asked := sampling.asked_logprobs) is not None:
            logprobs |= await told("output", delta.token_ids, delta.logprobs, asked)
            logprobs |= await told("input", (), (), asked)
        if delta.is_first and (asked := sampling.asked_prompt_logprobs) is not None:
            scored_ids = spec.work.prompt_ids[sampling.prompt_logprobs_start :]
            logprobs |= await told("input", scored_ids, info.report.logprobs, asked)
        return NativeOutput(
            text=delta.content,
            output_ids=delta.token_ids,
            meta_info=MetaInfo(
                id=spec.request_id,
                finish_reason=_finish(delta),
                prompt_tokens=len(spec.work.prompt_ids),
                completion_tokens=delta.num_tokens,
                cached_tokens=info.report.num_cached_tokens,
                cached_tokens_details=CachedTokensDetails(device=info.report.num_cached_tokens),
                weight_version=info.weight_version or self._run.weight_version,
                weight_versions=self._run.weight_versions(delta.output) or UNSET,
                e2e_latency=UNSET if delta.finish_reason is None else self._meter.elapsed_s(),
                hidden_states=(
                    hidden_states(info, len(spec.work.prompt_ids), delta)
                    if self._body.return_hidden_states
                    else UNSET
                ),
                **logprobs,
            ),
        )


def _finish(delta: OutputDelta) -> NativeFinish | None:
    match delta.finish_reason:
        case None:
            return None
        case "stop":
            return NativeFinish(type="stop", matched=UNSET if delta.matched is None else delta.matched)
        case "length":
            return NativeFinish(type="length", length=delta.num_tokens)
        case "abort":
            return NativeFinish(type="abort", message="Aborted.", status_code=None, err_type=None)
        case _:
            assert_never(delta.finish_reason)
