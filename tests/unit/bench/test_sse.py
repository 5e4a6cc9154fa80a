from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.bench.sse import SseParser

EVENTS = [b'{"a": 1}', "é ünïcode 你好".encode(), b"[DONE]", b"two\nlines", b"", b" leading space"]


def render(events: list[bytes], newline: bytes) -> bytes:
    out = b": a comment" + newline * 2 + b"event: message" + newline
    for event in events:
        out += b"".join(b"data: " + line + newline for line in event.split(b"\n")) + newline
        out += b": ping" + newline * 2
    return out


def feed_split(data: bytes, cuts: list[int]) -> list[bytes]:
    parser = SseParser()
    bounds = [0, *sorted(cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(bounds)]
    return [event for piece in pieces for event in parser.feed(piece)]


@given(data=st.data(), newline=st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_events_do_not_depend_on_the_split(data: st.DataObject, newline: bytes) -> None:
    events = data.draw(st.lists(st.sampled_from(EVENTS), max_size=6))
    stream = render(events, newline)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=20))
    assert feed_split(stream, cuts) == events


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_events_byte_by_byte(newline: bytes) -> None:
    stream = render(EVENTS, newline)
    assert feed_split(stream, list(range(len(stream)))) == EVENTS


def test_an_event_without_its_blank_line_does_not_count() -> None:
    assert SseParser().feed(b"data: whole\n\ndata: cut\n") == [b"whole"]


def test_space_after_the_colon_is_optional_and_other_fields_are_dropped() -> None:
    assert SseParser().feed(b"id: 7\nretry: 10\ndata:x\n\nevent: ping\n\n") == [b"x"]
