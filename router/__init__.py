"""The router: pairing, admission, attempts and node health."""
