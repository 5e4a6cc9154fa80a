"""Whether two nodes may form a pair, and if not, why, in words that a person can act on."""

from __future__ import annotations

from collections.abc import Iterator

from ..messages.kv_layout import heads_divide
from ..messages.peer import PeerHello, PeerIdentity


def refusal(prefill: PeerIdentity, hello: PeerHello) -> str | None:
    """Why `prefill` cannot hand off to the decode node that sent `hello`; None when it can."""
    for what, ours, theirs, mend in _compared(prefill, hello.identity):
        if ours != theirs:
            return f"{what} differs: prefill has {ours!r}, decode has {theirs!r}; {mend}"
    decode = hello.identity
    for side, tp_size in (("prefill", prefill.tp_size), ("decode", decode.tp_size)):
        if tp_size < 1 or not heads_divide(decode.layout.num_kv_heads, tp_size):
            heads = decode.layout.num_kv_heads
            return f"{side} splits {heads} KV heads over {tp_size} ranks: they do not divide"
    if decode.verifies_pages and max(prefill.tp_size, decode.tp_size) > 1:
        return "--verify-pages compares whole pages, and ranks hold parts; leave it out on decode"
    if len(hello.regions) != decode.tp_size:
        return f"decode has {decode.tp_size} ranks and announces the memory of {len(hello.regions)}"
    needed_bytes = hello.num_pages * decode.layout.of_rank(decode.tp_size).stride_bytes
    for region in hello.regions:
        pool_bytes = region.scratch_address - region.address
        if needed_bytes > pool_bytes:
            return f"decode announces {hello.num_pages} pages of {needed_bytes} bytes in {pool_bytes} bytes"
    return None


def _compared(prefill: PeerIdentity, decode: PeerIdentity) -> Iterator[tuple[str, str | int, str | int, str]]:
    """What must be equal: its name, prefill's value, decode's value, and the mend."""
    same_flag = "start both with the same"
    same_model = "load the same checkpoint on both"
    ours, theirs = prefill.layout, decode.layout
    yield "protocol version", prefill.protocol_version, decode.protocol_version, "install one pdserve on both"
    # Before the model: a node that was started again has the weights it starts with, and needs the update.
    yield "weight version", prefill.weight_version, decode.weight_version, "update the weights of the cluster"
    yield "model", prefill.model_fingerprint, decode.model_fingerprint, f"{same_model}, in the same dtype"
    both_deterministic = bool(prefill.arithmetic and decode.arithmetic)
    same_bits = (
        f"use equal processors, and {same_flag} --num-threads and --tensor-parallel-size, or leave "
        "--deterministic out on both"
    )
    yield (
        "deterministic mode's arithmetic",
        prefill.arithmetic or "none",
        decode.arithmetic or "none",
        same_bits if both_deterministic else "give --deterministic to both or to neither",
    )
    yield "KV dtype", ours.dtype, theirs.dtype, f"{same_flag} --kv-cache-dtype"
    yield "page size", ours.page_size, theirs.page_size, f"{same_flag} --page-size"
    yield "number of KV heads", ours.num_kv_heads, theirs.num_kv_heads, same_model
    yield "number of layers", ours.num_layers, theirs.num_layers, same_model
    yield "head dimension", ours.head_dim, theirs.head_dim, same_model
    yield "page stride in bytes", ours.stride_bytes, theirs.stride_bytes, "give both pools the same padding"
    yield "transfer backend", prefill.backend, decode.backend, f"{same_flag} --transfer-backend"
    yield "transport", prefill.transport, decode.transport, f"{same_flag} --transport"
