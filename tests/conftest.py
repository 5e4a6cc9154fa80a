"""For all tests."""

from __future__ import annotations

import datetime
import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pdserve.tests.certificates import Certificates

# Tests run side by side, one a core: threads of torch's own in each would only wait for each other, and do it
# in a loop. Read when torch is imported; tests of more threads set their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Read when triton is imported: kernels run on the host, in its interpreter. `scripts/gpu_suite` says 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A deadline for an example is an assertion on the machine's speed. The examples are the same in each run,
# so that no change is blamed for what it did not do; --hypothesis-profile=explore looks for new ones.
settings.register_profile("pdserve", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("pdserve")

# Of the simulation: other seeds every day, the same for all who run it on that day.
FIRST_SEED_OF_TODAY = 1000 * datetime.datetime.now(datetime.UTC).date().toordinal()


def pytest_report_header() -> str:
    return f"simulation: today's seeds begin at {FIRST_SEED_OF_TODAY}"


# All that the tests import is a million objects: a full collection would look at them for a second or two,
# and to count them takes a tenth. So no test thaws what is frozen, and none counts it but to see it grow.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()


@pytest.fixture
def first_seed_of_today() -> int:
    return FIRST_SEED_OF_TODAY


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """Afterwards, for tests of what configures it."""
    root, ours = logging.getLogger(), logging.getLogger("pdserve")
    handlers, level, our_level = list(root.handlers), root.level, ours.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    ours.setLevel(our_level)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates.new(tmp_path / "certificates")
