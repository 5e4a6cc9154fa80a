"""The weights of a running node: loaded, replaced, saved, and read by other nodes."""
