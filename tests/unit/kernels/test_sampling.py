from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pdserve.kernels.philox.reference import token_word
from pdserve.kernels.sampling import (
    add_bias_,
    apply_penalties_,
    cpu,
    eager,
    forbid_,
    greedy,
    gumbel_argmax,
    log_probs,
    reference,
)
from pdserve.kernels.sampling.eager import GUMBEL_MAX, GUMBEL_MIN

EVERYTHING = torch.tensor([float("-inf")])


def int_rows(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def keep_threshold(
    scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Of both versions, which agree bit for bit."""
    largest, some = int(top_k.max()), bool((top_p < 1.0).any())
    by_version = [
        version(scaled, top_k, top_p, min_p, largest_top_k=largest, some_top_p=some)
        for version in (cpu.keep_threshold, eager.keep_threshold)
    ]
    assert torch.equal(*by_version)
    return by_version[0]


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert greedy(logits).tolist() == [1, 0]


@pytest.mark.parametrize("vocab_size", [1, 63, 501])
def test_log_probs(vocab_size: int) -> None:
    logits = torch.randn(3, vocab_size) * 5
    best = log_probs(logits, 5)
    expected = logits.log_softmax(dim=-1)
    count = min(5, vocab_size)
    assert best.top_ids.shape == best.top_values.shape == (3, count)
    torch.testing.assert_close(best.top_values, expected.topk(count, dim=-1).values)
    torch.testing.assert_close(expected.gather(1, best.top_ids), best.top_values)


@pytest.mark.parametrize(
    ("repetition", "frequency", "presence"), [(1.3, 0.0, 0.0), (1.0, 0.7, 0.0), (0.8, -0.2, 1.1)]
)
def test_penalties(repetition: float, frequency: float, presence: float) -> None:
    logits = torch.randn(3, 63)
    prompt, output = [5, 9, 9, 62], [9, 0, 0, 0, 17]
    penalties = {"repetition": repetition, "frequency": frequency, "presence": presence}
    expected = reference.penalize(logits[1].double().numpy(), prompt, output, **penalties)
    before = logits.clone()
    seen = {5: 0, 9: 1, 62: 0, 0: 3, 17: 1}
    apply_penalties_(
        logits,
        int_rows(*[1] * len(seen), 2),
        int_rows(*seen, 8),
        torch.tensor([*seen.values(), 0.0]),
        *(
            torch.tensor([asked] * len(seen) + [neutral])
            for asked, neutral in zip(penalties.values(), (1.0, 0.5, 0.5), strict=True)
        ),
    )
    np.testing.assert_allclose(logits[1].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits[[0, 2]], before[[0, 2]]), "token 8 of row 2 is in its prompt alone"


def test_bias_and_forbidden_tokens() -> None:
    logits = torch.zeros(2, 4)
    add_bias_(logits, int_rows(0, 1, 1), int_rows(2, 0, 3), torch.tensor([1.0, -2.0, 5.0]))
    assert logits.tolist() == [[0, 0, 1, 0], [-2, 0, 0, 5]]
    forbid_(logits, int_rows(1), int_rows(3))
    assert logits.tolist() == [[0, 0, 1, 0], [-2, 0, 0, -math.inf]]


FILTERS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (7, 1.0, 0.0),
    (10_000, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.9999, 0.0),
    (0, 1e-6, 0.0),
    (0, 0.0, 0.0),
    (0, 1.0, 0.1),
    (0, 1.0, 1.0),
    (20, 0.8, 0.0),
    (20, 0.8, 0.05),
    (3, 0.9, 0.3),
]


@pytest.mark.parametrize(("vocab_size", "spread"), [(1, 1.0), (63, 3.0), (1501, 0.5), (1501, 4.0)])
def test_kept_tokens(vocab_size: int, spread: float) -> None:
    scaled = torch.randn(len(FILTERS), vocab_size) * spread
    top_k, top_p, min_p = (torch.tensor(column) for column in zip(*FILTERS, strict=True))
    threshold = keep_threshold(scaled, top_k, top_p, min_p)
    for index, filters in enumerate(FILTERS):
        kept = set((scaled[index] >= threshold[index]).nonzero()[:, 0].tolist())
        assert kept == reference.kept_tokens(scaled[index].double().numpy(), *filters), filters
        alone = keep_threshold(scaled[[index]], top_k[[index]], top_p[[index]], min_p[[index]])
        assert alone.item() == threshold[index].item(), "a row's filters depend on its neighbours"


def test_ties_with_the_last_kept_token_are_kept() -> None:
    scaled = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for filters in ((2, 1.0, 0.0), (0, 0.6, 0.0), (2, 0.6, 0.0)):
        threshold = keep_threshold(scaled, *(torch.tensor([value]) for value in filters))
        assert (scaled >= threshold[:, None]).tolist() == [[True, True, True, True, False]]
        assert reference.kept_tokens(scaled[0].double().numpy(), *filters) == {0, 1, 2, 3}


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 500])
@pytest.mark.parametrize("spread", [0.1, 30.0])
def test_gumbel_argmax_is_the_references_draw(vocab_size: int, spread: float) -> None:
    """With all noise computed; so the pruned tokens could not have won."""
    scaled = torch.randn(4, vocab_size) * spread
    seeds, choices, positions = int_rows(0, 1, -1, 12345), int_rows(0, 1, 2, 3), int_rows(9, 8, 7, 100_000)
    threshold = torch.full((4,), float("-inf"))
    threshold[1] = scaled[1].median()
    drawn = gumbel_argmax(scaled, threshold, seeds, choices, positions).tolist()
    assert drawn == eager.gumbel_argmax(scaled, threshold, seeds, choices, positions).tolist()
    for row in range(4):
        kept = {t for t in range(vocab_size) if scaled[row, t] >= threshold[row]}
        expected = reference.draw(
            scaled[row].double().numpy(),
            kept,
            int(seeds[row]) % (1 << 64),
            int(choices[row]),
            int(positions[row]),
        )
        assert drawn[row] == expected


def test_noise_in_blocks_is_noise_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = torch.randn(3, 501)
    rows = (torch.full((3,), -0.5), *(torch.arange(3) + start for start in (0, 5, 9)))
    expected = cpu.gumbel_argmax(scaled, *rows)
    for num_groups in (1, 7, 126):
        monkeypatch.setattr(eager, "_NOISE_GROUPS", num_groups)
        assert torch.equal(eager.gumbel_argmax(scaled, *rows), expected)


def test_a_row_draws_the_same_in_any_company() -> None:
    scaled = torch.randn(5, 101)
    nothing = torch.full((5,), float("-inf"))
    seeds, zeros, positions = torch.arange(5), torch.zeros(5, dtype=torch.int64), torch.arange(5) + 70
    together = gumbel_argmax(scaled, nothing, seeds, zeros, positions)
    for row in range(5):
        only = slice(row, row + 1)
        alone = gumbel_argmax(scaled[only], nothing[only], seeds[only], zeros[only], positions[only])
        assert alone.item() == together[row].item()


@pytest.mark.parametrize("varying", ["seed", "choice", "position"])
def test_draws_follow_the_softmax(varying: str) -> None:
    """Chi-square over seeds, over choices and over positions: each makes draws independent."""
    num_draws = 4000
    logits = torch.tensor([2.0, 1.0, 0.0, 0.5, -1.0, 1.5, -0.5])
    counted, fixed = torch.arange(num_draws), torch.full((num_draws,), 3)
    seeds, choices, positions = (
        counted if varying == name else fixed for name in ("seed", "choice", "position")
    )
    drawn = gumbel_argmax(
        logits.expand(num_draws, -1), EVERYTHING.expand(num_draws), seeds, choices, positions
    )
    observed = torch.bincount(drawn, minlength=7).double()
    expected = logits.double().softmax(dim=0) * num_draws
    chi_square = ((observed - expected).square() / expected).sum().item()
    assert chi_square < 22.5  # 6 degrees of freedom, p = 0.001


def test_the_range_of_the_noise_is_what_pruning_assumes() -> None:
    extremes = [-math.log(-math.log((word + 0.5) / 2**32)) for word in (0, 2**32 - 1)]
    assert extremes == pytest.approx([GUMBEL_MIN, GUMBEL_MAX])
    assert token_word(0, 0, 0, 0) == 0x6627E8D5
