"""For all tests."""

from __future__ import annotations

from hypothesis import settings

# A deadline for an example is an assertion on the machine's speed. The examples are the same in each run,
# so that no change is blamed for what it did not do; --hypothesis-profile=explore looks for new ones.
settings.register_profile("pdserve", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("pdserve")
