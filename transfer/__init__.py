"""The hand-off: room state machines, copy plans, peers and backends."""
