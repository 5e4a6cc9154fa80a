from __future__ import annotations

import argparse

import pytest

from pdserve.bench import page_runs


def test_what_fits_into_one_free_run_travels_as_one() -> None:
    found = page_runs.churn(num_pages=1024, max_pages=32, fill=0.5, num_handoffs=200, seed=1)
    assert found.num_handoffs == 200
    assert found.share_whole > 0.95
    assert 1.0 <= found.runs < 1.1


def test_full_pools_are_scattered_and_still_served() -> None:
    half, full = (
        page_runs.churn(num_pages=256, max_pages=32, fill=fill, num_handoffs=200, seed=1)
        for fill in (0.5, 0.97)
    )
    assert half.runs < full.runs < full.pages


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    page_runs.add_arguments(parser)
    words = ["--pages", "256", "--max-prompt-pages", "8", "--handoffs", "20", "--fill", "0.5", "0.9"]
    assert page_runs.main(parser.parse_args(words)) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.count("|") for row in rows] == [header.count("|")] * 2
