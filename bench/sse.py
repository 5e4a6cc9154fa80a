"""Server-sent events: bytes in any split to the data of whole events."""

from __future__ import annotations


class SseParser:
    """Collects the `data` of each event; comments and other fields are dropped.

    Lines end with LF, CRLF or CR. An event counts once its blank line has come, so a stream cut inside
    an event never yields half of one.
    """

    def __init__(self) -> None:
        self._partial_line = b""
        self._data_lines: list[bytes] = []
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """The events that `data` completes."""
        if not data:
            return []
        if self._after_cr:
            data = data.removeprefix(b"\n")
        self._after_cr = data.endswith(b"\r")
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data_lines.append(line[5:].removeprefix(b" "))
            elif not line and self._data_lines:
                events.append(b"\n".join(self._data_lines))
                self._data_lines = []
        return events
