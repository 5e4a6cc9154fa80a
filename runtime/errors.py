"""The kinds of failure, and who catches each.

    PdserveError
    ├── RequestError      ends one request with a clear HTTP error        caught by the HTTP surface
    ├── UnexpectedError   ends one job                                    caught by who asked for it
    ├── UnreachableError  a cluster does not answer, or no longer         caught by who uses `Engine`
    └── StartupError      one line that says what to mend, exit code 1    caught by the command line

A `BrokenInvariantError`, or an assertion that fails, says that our own state is wrong: it ends the process
loudly, and the supervisor says why. Anything else that one message or one job raises ends that one alone,
see `containment.py`; outside of both it ends the process too.
"""

from __future__ import annotations


class PdserveError(Exception):
    """Base of every error that pdserve raises on purpose."""


class RequestError(PdserveError):
    """A client's mistake, or a state that ends one request. Becomes an HTTP error body."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        error_type: str = "invalid_request_error",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.error_type = error_type
        self.retry_after_s = retry_after_s


class UnreachableError(PdserveError):
    """The cluster that an `Engine` speaks to has ended, was shut down, or cannot be reached."""


class BrokenInvariantError(RuntimeError):
    """What must hold between our own parts does not: a bug of ours, whatever a message said."""


class UnexpectedError(PdserveError):
    """A job raised what it says it never does. The message names it; the log has the traceback."""


class StartupError(PdserveError):
    """The process cannot start. The message is one line: what is wrong, and the mend."""


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust has panicked. Its bindings (PyO3) raise that as no Exception, of a class that
    cannot be imported."""
    return type(error).__name__ == "PanicException"
