"""Writes down every call of a function of pdserve in this process.

The interpreter imports a module of this name at its start, before any program: `scripts/dev trace` puts this
folder on the PYTHONPATH of a cluster's processes, and names the folder where each of them writes a file. A
line an event, with tabs: nanoseconds of the monotonic clock, which all processes of a host share; the
thread; `call` or `return`; the file within pdserve; the function. A coroutine that goes on is called again.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
import time
from pathlib import Path
from types import CodeType, FrameType

FOLDER_VARIABLE = "PDSERVE_TRACE_FOLDER"
ROLES = ("router", "prefill", "decode")  # a node's front is not on the way of a request
ROOT = f"{Path(__file__).resolve().parents[3]}/"
ASIDE = (".venv/", "scripts/", "tests/")
EXPRESSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")  # parts of the function that they are in


def described(code: CodeType) -> bytes | None:
    """File and function; None for what is no function of pdserve."""
    file = code.co_filename.removeprefix(ROOT)
    if file == code.co_filename or file.startswith(ASIDE):
        return None
    if code.co_name in EXPRESSIONS or not code.co_flags & inspect.CO_NEWLOCALS:  # modules, bodies of classes
        return None
    return f"{file}\t{code.co_qualname}\n".encode()


def record(path: Path) -> None:
    """From now on, in this thread and in those that start later. Each event is written at once: a node may
    end without a farewell."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    known: dict[CodeType, bytes | None] = {}

    def note(frame: FrameType, event: str, argument: object) -> None:
        del argument
        if event not in ("call", "return"):  # of C functions
            return
        code = frame.f_code
        try:
            what = known[code]
        except KeyError:
            what = known[code] = described(code)
        if what is not None:
            head = f"{time.monotonic_ns()}\t{threading.get_ident()}\t{event}\t"
            os.write(fd, head.encode() + what)

    threading.setprofile(note)
    sys.setprofile(note)


def main() -> None:
    """`python -m pdserve ROLE …` is recorded."""
    _, _, arguments = " ".join(sys.orig_argv).partition(" -m pdserve ")
    role = arguments.partition(" ")[0]
    if FOLDER_VARIABLE in os.environ and role in ROLES:
        record(Path(os.environ[FOLDER_VARIABLE]) / f"{role}-{os.getpid()}.tsv")


main()
