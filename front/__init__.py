"""A node's own HTTP: a process beside its scheduler."""
