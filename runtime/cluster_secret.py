"""The secret that the processes of a cluster share, and what is derived from it. It is never sent itself."""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

from .errors import StartupError

SECRET_VARIABLE = "PDSERVE_CLUSTER_SECRET"
_MIN_CHARACTERS = 32
_MAX_CHARACTERS = 4096
_HOW_TO_MAKE = "make one with `openssl rand -hex 32`"


def new_secret() -> str:
    return secrets.token_hex(32)


def given_secret(path: str) -> str:
    """What the file holds, or else the environment; empty when neither is given.

    Raises StartupError for a file that cannot be read and for a secret that could be guessed.
    """
    if path:
        where = f"--cluster-secret-file {path}"
        try:
            with Path(path).expanduser().open("rb") as file:
                content = file.read(_MAX_CHARACTERS + 1)
        except OSError as error:
            raise StartupError(f"{where}: {error.strerror}") from error
        try:
            secret = content.decode().strip()
        except UnicodeDecodeError as error:
            raise StartupError(f"{where}: this is no text; {_HOW_TO_MAKE}") from error
    else:
        where = SECRET_VARIABLE
        if where not in os.environ:
            return ""
        secret = os.environ[where].strip()
    if not _MIN_CHARACTERS <= len(secret) <= _MAX_CHARACTERS:
        raise StartupError(
            f"{where}: {_MIN_CHARACTERS} to {_MAX_CHARACTERS} characters are expected; {_HOW_TO_MAKE}"
        )
    return secret


def derived_key(secret: str, use: str) -> bytes:
    """32 bytes for one use; of another use's key, or of the secret, they tell nothing."""
    return hmac.digest(secret.encode(), f"pdserve {use}".encode(), "sha256")
