"""Proofs of the cluster secret over links that anybody can read: the secret itself is never sent.

Two questions are answered. Who registers or removes a node is asked by the router, with a nonce, and answers
with a MAC over that nonce and the whole request: so a proof is good for this one request, once. The node at a
URL that a router was told is asked with a nonce too, and answers with its entry and a MAC over both.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import struct
from typing import Literal, TypeAlias

from .cluster_secret import derived_key

_MAX_SPENT = 1 << 15  # nonces that are remembered: those of 30 s of a thousand nodes that renew each second
_NUM_RANDOM_BYTES = 16
_NONCE = re.compile(r"[A-Za-z0-9_=-]{16,256}")
_MADE = struct.Struct(">d")  # seconds of the clock of whoever made it
_MAC_BYTES = 32

Verdict: TypeAlias = Literal["proven", "stale", "wrong", "busy"]


def request_proof(secret: str, nonce: str, method: str, path: str, body: bytes) -> str:
    """`path`: decoded, and without what a proxy puts before it. Hexadecimal, as every proof is."""
    said = "\n".join((nonce, method, hashlib.sha256(body).hexdigest(), path))  # none but the last has a "\n"
    return hmac.digest(derived_key(secret, "request proof"), said.encode(), "sha256").hex()


def entry_proof(secret: str, nonce: str, entry: bytes) -> str:
    """`entry`: as it is sent."""
    said = f"{nonce}\n{hashlib.sha256(entry).hexdigest()}"
    return hmac.digest(derived_key(secret, "entry proof"), said.encode(), "sha256").hex()


def is_nonce(text: str) -> bool:
    """Whether it can be one: what is proven by it must not be read in two ways."""
    return _NONCE.fullmatch(text) is not None


def is_same(given: str, expected: str) -> bool:
    """In a time that tells nothing of where they differ."""
    return hmac.compare_digest(given.encode(), expected.encode())


class RequestProofs:
    """Asks for proofs and judges them. Of the nonces that it makes only those are remembered that were used:
    each carries the time it was made and a MAC of ours.
    """

    def __init__(self, secret: str, *, life_s: float, max_spent: int = _MAX_SPENT) -> None:
        self._secret = secret
        self._life_s = life_s
        self._max_spent = max_spent
        self._nonce_key = secrets.token_bytes(32)  # another process's nonces are none of ours
        self._spent: dict[str, float] = {}  # nonce -> when, in that order

    def nonce(self, now: float) -> str:
        """`now`: seconds, monotonic."""
        made = _MADE.pack(now) + secrets.token_bytes(_NUM_RANDOM_BYTES)
        return base64.urlsafe_b64encode(made + self._mac(made)).decode()

    def judge(self, nonce: str, proof: str, method: str, path: str, body: bytes, now: float) -> Verdict:
        """``proven`` spends the nonce. ``stale``: it was spent, is too old or none of ours; another will do.
        ``wrong``: of another secret, or of another request. ``busy``: too many were proven of late.
        """
        if not self._is_fresh(nonce, now):
            return "stale"
        if not is_same(proof, request_proof(self._secret, nonce, method, path, body)):
            return "wrong"
        if len(self._spent) >= self._max_spent:
            return "busy"
        self._spent[nonce] = now
        return "proven"

    def _is_fresh(self, nonce: str, now: float) -> bool:
        self._forget_expired(now)
        try:
            content = base64.b64decode(nonce, altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            return False
        made, mac = content[:-_MAC_BYTES], content[-_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(made)):
            return False
        (made_at,) = _MADE.unpack_from(made)
        # Base64 may write the same bytes in two ways: what was not written by us is not looked up as such.
        is_ours = base64.urlsafe_b64encode(content).decode() == nonce
        return is_ours and now - made_at <= self._life_s and nonce not in self._spent

    def _forget_expired(self, now: float) -> None:
        while self._spent:
            nonce = next(iter(self._spent))
            if now - self._spent[nonce] <= self._life_s:
                return
            del self._spent[nonce]

    def _mac(self, made: bytes) -> bytes:
        return hmac.digest(self._nonce_key, made, "sha256")
