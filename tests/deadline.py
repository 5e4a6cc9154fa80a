"""How long a test waits for what must come."""

from __future__ import annotations

# Seconds. It ends a test that fails, and no test that passes depends on it: what takes a moment takes many
# seconds where others use the machine.
DEADLINE_S = 60
