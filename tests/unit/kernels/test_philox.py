from __future__ import annotations

import numpy as np
import pytest
import torch

from pdserve.kernels.philox import group_words, philox
from pdserve.kernels.philox import reference as philox_reference

# Random123's kat_vectors, philox4x32 with 10 rounds.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    assert philox(torch.tensor(counter)[:, None], torch.tensor(key)[:, None])[:, 0].tolist() == words
    reference = philox_reference.philox(
        np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64)[:, None]
    )
    assert reference[:, 0].tolist() == words


@pytest.mark.parametrize("size", [1, 63, 500])
def test_same_integers_as_the_reference(size: int) -> None:
    counter, key = torch.randint(0, 1 << 32, (4, size)), torch.randint(0, 1 << 32, (2, size))
    expected = philox_reference.philox(counter.numpy().astype(np.uint64), key.numpy().astype(np.uint64))
    assert np.array_equal(philox(counter, key).numpy().astype(np.uint64), expected)


@pytest.mark.parametrize("seed", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0x123456789ABCDEF0])
def test_group_words_are_the_words_of_four_tokens(seed: int) -> None:
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    groups = torch.tensor([0, 7, 37983])
    seeds, choices, positions = (torch.full((3,), value) for value in (signed, 5, 1000))
    words = group_words(seeds, choices, positions, groups)
    assert words.tolist() == [
        [philox_reference.token_word(seed, 5, 1000, 4 * group + lane) for lane in range(4)]
        for group in groups.tolist()
    ]
