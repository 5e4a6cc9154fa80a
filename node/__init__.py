"""The process of a node: its loop, what both binaries start and answer alike, what an operator sees."""
