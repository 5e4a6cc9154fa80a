"""Serves requests of the shipped model over this machine's RDMA device, and again over TCP.

    scripts/rdma_check                          # on a machine with an RDMA device
    scripts/softroce scripts/rdma_check         # on one without: inside a small virtual machine

Starts a router, a prefill and a decode node for each transport and asks the same greedy and sampled requests.
Passes when both nodes say that they use RDMA, the device itself counted at least as many packets as the pages
need, decode computed no prompt token, and every token is the same as over TCP.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pdserve.bench.local_cluster import LocalCluster

INFINIBAND = Path("/sys/class/infiniband")
PAGE_SIZE = 16
CHUNK = 64
LARGEST_MTU = 4096  # bytes of payload in one packet of RDMA
REQUESTS: tuple[dict[str, object], ...] = (
    {"temperature": 0},
    {"temperature": 1.0, "seed": 7},
)


@dataclass(frozen=True)
class Run:
    """What one cluster answered, and what was counted meanwhile."""

    token_ids: tuple[tuple[int, ...], ...]
    transports: dict[str, str]  # role -> what the node says is in use
    num_prompt_tokens_on_decode: int
    transferred_bytes: int
    num_packets: int  # that the RDMA devices received; 0: they do not count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-prompt-tokens", type=int, default=200, help="of each request [200]")
    parser.add_argument("--num-tokens", type=int, default=16, help="to generate for each request [16]")
    options = parser.parse_args()
    prompt = [int(token) for token in np.random.default_rng(3).integers(1, 4096, options.num_prompt_tokens)]

    devices = sorted(path.name for path in INFINIBAND.glob("*"))
    if not devices:
        print("no RDMA device here: scripts/softroce scripts/rdma_check", file=sys.stderr)
        return 1
    print(f"RDMA devices: {', '.join(devices)}", flush=True)
    rdma = serve("rdma", prompt, options.num_tokens)
    tcp = serve("tcp", prompt, options.num_tokens)

    failures = list(problems(rdma, tcp, options.num_prompt_tokens))
    for failure in failures:
        print(f"FAILED: {failure}")
    if not failures:
        print(f"OK: {len(REQUESTS)} requests over rdma, tokens equal to tcp's: {list(rdma.token_ids[0])}")
    return bool(failures)


def serve(transport: str, prompt: Sequence[int], num_tokens: int) -> Run:
    arguments = ["--dtype", "float32", "--page-size", str(PAGE_SIZE), "--chunked-prefill-size", str(CHUNK)]
    arguments += ["--disable-prefix-cache", "--kv-cache-gb", "0.05"]
    # Under emulation, beside other work, a node can be silent for longer than its peers put up with.
    arguments += ["--max-attempts", "20"]
    began = time.monotonic()
    with LocalCluster([*arguments, "--transfer-backend", "mooncake", "--transport", transport]) as cluster:
        print(f"{transport}: ready after {time.monotonic() - began:.1f} s", flush=True)
        nodes = {role: cluster.workers(role)[0]["url"] for role in ("prefill", "decode")}
        ask(cluster, prompt[:PAGE_SIZE], {"max_tokens": 2, "temperature": 0})  # first forwards are slow
        packets_before = received_packets()
        token_ids = []
        for fields in REQUESTS:
            began = time.monotonic()
            token_ids.append(ask(cluster, prompt, {"max_tokens": num_tokens, **fields}))
            print(f"{transport}: {fields} answered in {time.monotonic() - began:.2f} s", flush=True)
        return Run(
            token_ids=tuple(token_ids),
            transports={
                role: cluster.get("/server_info", base=url)["transport"] for role, url in nodes.items()
            },
            num_prompt_tokens_on_decode=metric(cluster, nodes["decode"], "pd_computed_prompt_tokens_total"),
            transferred_bytes=metric(cluster, nodes["prefill"], "pd_kv_transfer_bytes_total"),
            num_packets=received_packets() - packets_before,
        )


def ask(cluster: LocalCluster, prompt: Sequence[int], fields: dict[str, object]) -> tuple[int, ...]:
    body = {"prompt": list(prompt), "ignore_eos": True, "return_token_ids": True, **fields}
    answer = cluster.post("/v1/completions", body)
    return tuple(answer["choices"][0]["token_ids"])


def problems(rdma: Run, tcp: Run, num_prompt_tokens: int) -> list[str]:
    found = []
    for run, transport in ((rdma, "rdma"), (tcp, "tcp")):
        if set(run.transports.values()) != {transport}:
            found.append(f"{transport} was asked for and the nodes use {run.transports}")
        if run.num_prompt_tokens_on_decode:
            found.append(f"over {transport} decode computed {run.num_prompt_tokens_on_decode} prompt tokens")
    if not rdma.transferred_bytes:
        found.append("no byte was handed off")
    num_packets = rdma.transferred_bytes // LARGEST_MTU
    print(f"rdma: {rdma.transferred_bytes:,} bytes in {rdma.num_packets:,} packets of the device", flush=True)
    if rdma.num_packets < num_packets:
        found.append(f"the device received {rdma.num_packets} packets, and the pages need {num_packets}")
    if rdma.token_ids != tcp.token_ids:
        found.append(f"tokens differ: {rdma.token_ids} over rdma, {tcp.token_ids} over tcp")
    if not all(len(ids) == len(rdma.token_ids[0]) > 0 for ids in rdma.token_ids):
        found.append(f"an answer of {num_prompt_tokens} prompt tokens was cut: {rdma.token_ids}")
    return found


def received_packets() -> int:
    """Of every device on this machine, as the driver counts them: rxe's own name, then a network card's."""
    counters = (
        *INFINIBAND.glob("*/ports/*/hw_counters/rcvd_pkts"),
        *INFINIBAND.glob("*/ports/*/counters/port_rcv_packets"),
    )
    return sum(int(path.read_text()) for path in counters)


def metric(cluster: LocalCluster, url: str, name: str) -> int:
    found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", cluster.get("/metrics", base=url), re.MULTILINE)
    return int(sum(float(value) for value in found))


if __name__ == "__main__":
    raise SystemExit(main())
