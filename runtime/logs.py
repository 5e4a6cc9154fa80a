"""One log format for every process: text for people, JSON lines for machines."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Literal, TypeAlias, get_args

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
LogFormat: TypeAlias = Literal["text", "json"]
LEVELS: tuple[LogLevel, ...] = get_args(LogLevel)


class _TextFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d {process:<8} %(levelname).1s %(message)s", "%H:%M:%S")


class _JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class Complaints:
    """When to speak of what goes on being wrong: at once, when it is wrong in another way, and rarely."""

    def __init__(self, interval_s: float = 60.0) -> None:
        self._interval_s = interval_s
        self._said: dict[str, tuple[str, float]] = {}  # subject -> what was said of it, and when

    def is_due(self, subject: str, problem: str, now: float) -> bool:
        """Whether to say it now; True counts as said."""
        said, at = self._said.get(subject, ("", now))
        if said == problem and now - at < self._interval_s:
            return False
        self._said[subject] = (problem, now)
        return True

    def forget(self, subject: str) -> None:
        """It is well."""
        self._said.pop(subject, None)


class Throttle:
    """When to speak of what may come by thousands: of the first at once, then once in a while."""

    def __init__(self, interval_s: float = 5.0) -> None:
        self._interval_s = interval_s
        self._told_at = float("-inf")
        self._num_untold = 0

    def add(self, now: float) -> int:
        """One more. How many to speak of now, with those that were not spoken of before; 0: none, not yet."""
        self._num_untold += 1
        if now - self._told_at < self._interval_s:
            return 0
        num_untold, self._num_untold, self._told_at = self._num_untold, 0, now
        return num_untold


def configure_logging(process: str, level: str, log_format: str) -> None:
    """Send the log of this process to stderr. `process` names it in every line, e.g. "decode"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(process) if log_format == "json" else _TextFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    set_log_level(level)


def set_log_level(level: str) -> None:
    """The level of our own messages that are shown from now on: one of LEVELS."""
    logging.getLogger("pdserve").setLevel(level.upper())


def log_level() -> str:
    return logging.getLevelName(logging.getLogger("pdserve").getEffectiveLevel()).lower()
