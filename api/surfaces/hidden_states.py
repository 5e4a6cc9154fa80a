"""Hidden states as /generate shows them, in SGLang's shape."""

from __future__ import annotations

from array import array

from ..generation import GenerationInfo
from ..text.pieces import OutputDelta
from .native_types import NativeHiddenStates


def float_row(data: bytes) -> list[float]:
    return array("f", data).tolist()


def hidden_states(info: GenerationInfo, num_prompt: int, delta: OutputDelta) -> NativeHiddenStates:
    """One entry for each of the delta's tokens. The first token of an answer has the rows of the whole
    prompt, of which the last is what it was sampled from; each further token has that one row.
    """
    rows: NativeHiddenStates = [float_row(state) for state in delta.hidden_states]
    if not delta.is_first or not info.report.hidden_states:
        return rows
    width = len(info.report.hidden_states) // num_prompt
    prompt = [
        float_row(info.report.hidden_states[row * width : (row + 1) * width]) for row in range(num_prompt)
    ]
    return [prompt, *rows[1:]]
