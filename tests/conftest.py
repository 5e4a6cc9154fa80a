"""For all tests."""

from __future__ import annotations

from hypothesis import settings

# A deadline for an example is an assertion on the machine's speed.
settings.register_profile("pdserve", deadline=None)
settings.load_profile("pdserve")
