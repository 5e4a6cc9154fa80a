"""The process of a node: its loop."""
