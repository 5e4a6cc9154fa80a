"""The paper's round, in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)


def philox(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """``counter [4, N]``, ``key [2, N]`` → ``[4, N]``, words in the low halves of uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = M0 * c0, M1 * c2
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ k0,
            product1 & LOW,
            (product0 >> np.uint64(32)) ^ c3 ^ k1,
            product0 & LOW,
        )
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return np.stack((c0, c1, c2, c3))


def token_word(seed: int, choice: int, position: int, token: int) -> int:
    """The 32 random bits of one token."""
    counter = np.array([[token // 4], [position], [choice], [0]], dtype=np.uint64)
    key = np.array([[seed & 0xFFFFFFFF], [seed >> 32]], dtype=np.uint64)
    return int(philox(counter, key)[token % 4, 0])
