"""The scheduler parts that the prefill and decode binaries share."""
