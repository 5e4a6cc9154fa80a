"""Configuration, logs, metrics, errors, process supervision and the clock."""
