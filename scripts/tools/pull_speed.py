"""How fast a node takes over another node's weights, over the transfer engines and over the control link.

    scripts/dev pull_speed MODEL --repeats 7

Starts two clusters, one over shm and one over Mooncake TCP. The prefill node of each pulls from the decode
node of its own cluster, over the engines, and from that of the other one, over the link; the four take turns.
A pull is timed by the node that pulls (`pd_weight_pull_seconds_total`): without loading what has come. Also
told: for how long messages of the pulls held the loops of the nodes that were pulled from.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.direct_http import open_url

FLAGS = ("--num-threads", "1", "--kv-cache-gb", "0.1", "--max-model-len", "2048")
SAMPLE = re.compile(r'pd_weight_pull_(bytes|seconds)_total\{.*over="([^"]+)".*\} (\S+)')
HELD = ("open_weights", "read_weights", "write_weights", "turn")


def pulled(url: str) -> dict[tuple[str, str], float]:
    """("bytes" or "seconds", what it came over) -> since the node's start."""
    with open_url(f"{url}/metrics", timeout_s=60.0) as response:
        return {(what, over): float(value) for what, over, value in SAMPLE.findall(response.read().decode())}


def pull(cluster: LocalCluster, url: str, peer: str) -> tuple[str, float, float]:
    """What it came over, bytes, seconds."""
    before = pulled(url)
    cluster.post("/update_weights_from_peer", {"peer": peer, "force": True}, base=url)
    after = pulled(url)
    (over,) = {key[1] for key, value in after.items() if value != before.get(key)}
    num_bytes, seconds = (after[what, over] - before.get((what, over), 0.0) for what in ("bytes", "seconds"))
    return over, num_bytes, seconds


def held(cluster: LocalCluster, url: str) -> str:
    state: dict[str, Any] = cluster.get("/get_internal_state", base=url)
    times = state["loop_times"]
    return ", ".join(
        f"{kind} {times[kind]['count']} x p50 {1000 * times[kind]['p50_s']:.2f} p99 "
        f"{1000 * times[kind]['p99_s']:.2f} longest {1000 * times[kind]['max_s']:.2f} ms"
        for kind in HELD
        if kind in times
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="of each (default: 7)")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = defaultdict(list)
    num_bytes = 0.0
    with (
        tempfile.TemporaryDirectory() as work_dir,
        LocalCluster([options.model, *FLAGS, "--transfer-backend", "shm"], Path(work_dir) / "shm") as shm,
        LocalCluster([options.model, *FLAGS], Path(work_dir) / "mooncake") as mooncake,
    ):
        pairs = [(puller, peer) for puller in (shm, mooncake) for peer in (shm, mooncake)]
        for repeat in range(options.repeats + 1):
            for puller, peer in pairs:
                url, peer_url = puller.workers("prefill")[0]["url"], peer.workers("decode")[0]["url"]
                over, num_bytes, took_s = pull(puller, url, peer_url)
                if repeat:  # the first one starts the engines
                    seconds[over].append(took_s)
        for name, cluster in (("shm", shm), ("mooncake", mooncake)):
            print(f"held the loop of {name}'s peer:", held(cluster, cluster.workers("decode")[0]["url"]))
    print(f"{num_bytes / 2**20:.0f} MiB")
    for over, all_s in seconds.items():
        shown = ", ".join(f"{one_s:.3f}" for one_s in sorted(all_s))
        median_s = statistics.median(all_s)
        print(f"{over:<14} median {median_s:.3f} s, {num_bytes / 2**30 / median_s:.2f} GiB/s ({shown})")


if __name__ == "__main__":
    main()
