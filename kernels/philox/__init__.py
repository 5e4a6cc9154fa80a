"""Philox4x32-10: four random 32-bit words from a 128-bit counter and a 64-bit key, with no state.

Ten rounds of  (c0, c1, c2, c3) → (hi(M1·c2) ^ c1 ^ k0, lo(M1·c2), hi(M0·c0) ^ c3 ^ k1, lo(M0·c0)),
the key bumped by the Weyl constants between rounds.

Shapes: ``counter [4, N]``, ``key [2, N]``, every word an int64 in [0, 2³²) → ``[4, N]`` int64. (torch has no
arithmetic on uint32; a 64-bit product that wraps has the right bits.)

The noise of token t at position p of choice c with seed s is lane ``t % 4`` of counter ``(t // 4, p, c, 0)``
under key ``(s mod 2³², s div 2³²)``: `group_words`. It depends on nothing else, so who samples, in which
batch and at which attempt changes nothing.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011; Random123 for the test vectors.
"""

from .eager import group_words, philox

__all__ = ["group_words", "philox"]
