"""JSON of any size, decoded a slice at a time.

`msgspec` decodes whole documents, and nothing else runs meanwhile: half a second for 30 MB of objects. Here
a long array or object is read a run of elements at a time: as many as lie whole in the next slice, found by
their brackets, commas and texts, and decoded by msgspec as one small document. An element that is
longer than a slice is read in the same way by itself. What is not JSON is so in some run, or between them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import msgspec

from ..slices import SLICE_BYTES

# Texts and brackets in a slice: each takes about a microsecond to look at.
_SLICE_MARKS = 1_000
# Containers longer than a slice within each other; what is shorter may nest as deep as msgspec reads.
_MAX_LONG_DEPTH = 32
_QUOTE, _COMMA, _COLON = b'",:'
_ARRAY, _OBJECT = b"[{"
_OPENING = b"[{"
_CLOSING = {_ARRAY: b"]"[0], _OBJECT: b"}"[0]}

_INSIDE = rb'[^"\\]*(?:\\.[^"\\]*)*'
# A text, whose closing quote is missing where it goes on behind the slice, or a bracket.
_MARK = re.compile(rb'"%b("?)|[\[\]{}]' % _INSIDE, re.DOTALL)
_TEXT_PART = re.compile(_INSIDE, re.DOTALL)
_KEY = re.compile(rb'"%b"' % _INSIDE, re.DOTALL)
_SCALAR = re.compile(rb"[-+.\w]+")
_BLANKS = re.compile(rb"[ \t\r\n]*")
_MSGSPEC_POSITION = re.compile(r"\(byte (\d+)\)")

# A value that takes several slices to read.
_Reading: TypeAlias = Generator[None, None, Any]


class JsonTooLargeError(Exception):
    """The document has too much in it. The message says of what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonBounds:
    """What a document may have; brackets and commas in its texts do not count."""

    max_values: int = 1_000_000  # at some 40 bytes of memory each
    max_parts: int = 200_000  # of them texts, names, lists and objects: some hundred bytes each
    max_text_bytes: int = 8 << 20  # of one text as it is spelled: it is decoded in one go, in 5 to 25 ms


JSON_BOUNDS = JsonBounds()


def decode_slices(document: bytes | bytearray, bounds: JsonBounds = JSON_BOUNDS) -> _Reading:
    """Yields between slices, and returns what `msgspec.json.decode` would.

    Raises msgspec.DecodeError, UnicodeDecodeError, RecursionError and JsonTooLargeError.
    """
    if len(document) <= min(
        SLICE_BYTES, bounds.max_parts, bounds.max_text_bytes
    ):  # within bounds, and a slice
        with contextlib.suppress(msgspec.DecodeError):  # which the reader tells in its own words
            return msgspec.json.decode(document)
    reader = _Reader(document, bounds)
    value = yield from reader.value(0)
    yield from reader.blanks()
    if reader.position < len(document):
        reader.fail("trailing characters")
    return value


class _Reader:
    def __init__(self, document: bytes | bytearray, bounds: JsonBounds) -> None:
        self._document = document
        self._bounds = bounds
        self._num_values = 0
        self._num_parts = 0
        self.position = 0

    def fail(self, what: str) -> NoReturn:
        raise msgspec.DecodeError(f"JSON is malformed: {what} (byte {self.position})")

    def value(self, depth: int) -> _Reading:
        yield from self.blanks()
        self._count(0, 1)
        match self._next_byte():
            case byte if byte in _CLOSING:
                if depth == _MAX_LONG_DEPTH:
                    raise RecursionError("large lists and objects are nested too deep")
                self.position += 1
                return (yield from self._container(byte, depth + 1))
            case byte if byte == _QUOTE:
                return (yield from self._text())
            case _:
                scalar = _SCALAR.match(self._document, self.position, self.position + SLICE_BYTES)
                return self._decode_to(self.position if scalar is None else scalar.end())

    def blanks(self) -> Generator[None, None, None]:
        while True:
            end = self._end(_BLANKS)
            is_whole = end < self.position + SLICE_BYTES
            self.position = end
            if is_whole:
                return
            yield

    def _container(self, opening: int, depth: int) -> _Reading:
        """An array or an object, behind its opening bracket."""
        items: list[Any] = []
        members: dict[str, Any] = {}
        is_closed, is_empty = False, True
        while not is_closed:
            end, is_closed = self._run()
            yield
            if end is None:  # the first element goes on behind the slice
                if opening == _ARRAY:
                    items.append((yield from self.value(depth)))
                else:
                    name = yield from self._name()
                    members[name] = yield from self.value(depth)
                yield from self.blanks()
                is_closed = self._next_byte() == _CLOSING[opening]
                if not is_closed and self._next_byte() != _COMMA:
                    self.fail("expected a comma or a closing bracket")
            else:
                run = self._decode_to(end, opening)
                if not run and not (is_closed and is_empty):
                    self.fail("expected a value")
                if opening == _ARRAY:
                    items += run
                else:
                    members |= run
                if is_closed and self._next_byte() != _CLOSING[opening]:
                    self.fail("unexpected closing bracket")
            is_empty = False
            self.position += 1
        return items if opening == _ARRAY else members

    def _run(self) -> tuple[int | None, bool]:
        """Where the elements end that lie whole in the next slice (None: not one does), and whether their
        container ends there."""
        document = self._document
        at = self.position
        stop = min(at + SLICE_BYTES, len(document))
        end: int | None = None
        depth = num_commas = num_parts = 0
        for num_marks, mark in enumerate(_MARK.finditer(document, at, stop)):
            if num_marks == _SLICE_MARKS:
                return end, False
            begin = mark.start()
            if begin > at and (commas := document.count(b",", at, begin)):
                num_commas += commas
                if depth == 0:
                    end = document.rfind(b",", at, begin)
                    self._count(num_commas, num_parts)
                    num_commas = num_parts = 0
            at = mark.end()
            byte = document[begin]
            if byte == _QUOTE:
                if not mark[1]:
                    return end, False
                num_parts += 1
            elif byte in _OPENING:
                depth += 1
                num_parts += 1
            elif depth:
                depth -= 1
            else:
                self._count(num_commas, num_parts)
                return begin, True
        if depth == 0 and (last := document.rfind(b",", at, stop)) >= 0:
            self._count(num_commas + document.count(b",", at, stop), num_parts)
            end = last
        return end, False

    def _name(self) -> Generator[None, None, str]:
        yield from self.blanks()
        found = _KEY.match(self._document, self.position, self.position + SLICE_BYTES)
        if found is None:
            self.fail("expected a name of less than 64 KiB")
        name: str = self._decode_to(found.end())
        yield from self.blanks()
        if self._next_byte() != _COLON:
            self.fail("expected a colon")
        self.position += 1
        return name

    def _text(self) -> _Reading:
        start = self.position
        self.position += 1
        while (self.position == len(self._document)) or self._document[self.position] != _QUOTE:
            end = self._end(_TEXT_PART)
            if end == self.position:
                self.fail("a text without an end")
            if end - start > self._bounds.max_text_bytes:
                raise JsonTooLargeError(f"a text of more than {self._bounds.max_text_bytes} bytes")
            self.position = end
            yield
        end, self.position = self.position + 1, start
        return self._decode_to(end)

    def _end(self, pattern: re.Pattern[bytes]) -> int:
        """Of what matches here, as far as the slice goes; the pattern matches nothing as well."""
        found = pattern.match(self._document, self.position, self.position + SLICE_BYTES)
        return self.position if found is None else found.end()

    def _next_byte(self) -> int:
        """The next one; -1 at the document's end."""
        return self._document[self.position] if self.position < len(self._document) else -1

    def _decode_to(self, end: int, opening: int = 0) -> Any:  # noqa: ANN401 (any JSON)
        """What lies before `end`, which is the new position; with `opening`, as in a container of its own."""
        part = self._document[self.position : end]
        if opening:
            part = b"".join((bytes((opening,)), part, bytes((_CLOSING[opening],))))
        try:
            value = msgspec.json.decode(part)
        except msgspec.DecodeError as error:
            start = self.position - bool(opening)
            message = _MSGSPEC_POSITION.sub(lambda byte: f"(byte {start + int(byte[1])})", str(error))
            raise msgspec.DecodeError(message) from None
        self.position = end
        return value

    def _count(self, num_commas: int, num_parts: int) -> None:
        self._num_values += num_commas
        self._num_parts += num_parts
        if self._num_values > self._bounds.max_values:
            raise JsonTooLargeError(f"more than {self._bounds.max_values} values")
        if self._num_parts > self._bounds.max_parts:
            raise JsonTooLargeError(f"more than {self._bounds.max_parts} texts, lists and objects")
