"""A front registers with the router that the tests of the API have."""

from pdserve.tests.unit.api.conftest import (
    allow_pickled_tensors,
    allowed_origins,
    api,
    card,
    is_loopback,
    is_open_cluster,
    keys,
    limits,
    root_path,
    seed,
    tokenizer,
)

__all__ = [
    "allow_pickled_tensors",
    "allowed_origins",
    "api",
    "card",
    "is_loopback",
    "is_open_cluster",
    "keys",
    "limits",
    "root_path",
    "seed",
    "tokenizer",
]
