"""The decode binary: its scheduler loop and the queues that only it has."""
