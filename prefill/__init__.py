"""What only a prefill node does: its jobs, their batches, its end of the wire."""
