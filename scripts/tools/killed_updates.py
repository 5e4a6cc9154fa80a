"""Whether a cluster ends on one weight version when somebody dies in the middle of an update.

    scripts/dev killed_updates --times 50 --seed 0

One prefill and two decode nodes, requests all the time, and updates with every tensor, each from a folder,
from the bytes of a file or from a trainer's broadcast. At a random moment of each, SIGKILL for one of: the
router (the coordinator), a prefill or a decode node, the trainer. `pdserve up` starts the first three again.

Then

* whoever asked for the update, and every request, must get an answer or an error: else it hangs;
* all nodes must come to serve one version, the old or the new one, with the same checksum, and a request must
  be answered under it. A killed node starts with other weights and reads those of the others by itself;
* the next update must bring every node to its version, and likewise.

Exit code 1 when anything of this does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request

import torch
from safetensors.torch import load_file, save_file

from pdserve.bench.local_cluster import LocalCluster
from pdserve.docs.examples.trainer_group import TrainerGroup
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.direct_http import open_url
from pdserve.tests.cluster.helpers import (
    all_paired,
    in_background,
    kill_nodes,
    random_ids,
    request,
    router_process,
    wait_until,
)
from pdserve.tests.trainer import free_port

Victim: TypeAlias = Literal["router", "prefill", "decode", "trainer"]
Source: TypeAlias = Literal["disk", "tensor", "distributed"]

NUM_PREFILL, NUM_DECODE = 1, 2
FLAGS = ("--dtype", "float32", "--num-threads", "1", "--kv-cache-gb", "0.2", "--log-level", "warning")
KILLS_PER_CLUSTER = 5  # `pdserve up` pauses ever longer before it starts a process that keeps dying
BOUND_S = 120.0  # for anything to end: a node that is started again on a busy machine takes longest
GROUP = "trainer"


@dataclass
class Tally:
    num_kills: int = 0
    num_one_version: int = 0
    num_hangs: int = 0
    ends: Counter[str] = field(default_factory=Counter)  # (victim, version in the end)
    failures: list[str] = field(default_factory=list)


@dataclass
class State:
    version: str  # that all nodes serve
    typical_s: float  # what an update took last


class Traffic:
    """One request after the other, so that an update has something to wait for. Nodes may fail them, not keep
    them."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._url = cluster.url
        self._is_over = False
        self.num_hanging = 0
        self.num_answered = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._is_over:
            number += 1
            body = {"prompt": random_ids(number, 40), "max_tokens": 200, "ignore_eos": True}
            try:
                reply = request(self._url, "/v1/completions", body, timeout_s=BOUND_S)
            except TimeoutError:
                self.num_hanging += 1
            except (OSError, HTTPException):  # the router was killed
                pass
            else:
                self.num_answered += reply.status == 200

    def end(self) -> None:
        self._is_over = True
        self._thread.join()


class Updates:
    """Asks for updates of every tensor, of two checkpoints in turn."""

    def __init__(self, cluster: LocalCluster, folders: tuple[Path, Path]) -> None:
        self._cluster = cluster
        self._folders = folders
        self._num_updates = 0
        self.trainer: subprocess.Popen[bytes] | None = None

    def begin(self, source: Source, version: str) -> tuple[Callable[[], bool], Callable[[], str]]:
        """In the background: whether it has an answer, and the answer, empty if it was a yes."""
        folder = self._folders[self._num_updates % 2]
        self._num_updates += 1
        file = folder / "model.safetensors"
        url = self._cluster.url
        match source:
            case "disk":
                body = {"model_path": str(folder), "weight_version": version}
                return in_background(lambda: asked(url, "/update_weights_from_disk", body))
            case "tensor":
                path = f"/update_weights_from_tensor?weight_version={quote(version)}"
                return in_background(lambda: asked(url, path, file.read_bytes()))
            case "distributed":
                told = self._join(file) | {"group_name": GROUP, "weight_version": version, "timeout": 60}
                assert self.trainer is not None
                assert self.trainer.stdin is not None
                result = in_background(lambda: asked(url, "/update_weights_from_distributed", told))
                self.trainer.stdin.write(b"send\n")
                self.trainer.stdin.flush()
                return result

    def _join(self, file: Path) -> dict[str, Any]:
        """A new trainer in a new group, as the old one is broken when any of its ranks was killed."""
        self.end_trainer()
        asked(self._cluster.url, "/destroy_weights_update_group", {"group_name": GROUP})
        port, world_size = free_port(), 1 + NUM_PREFILL + NUM_DECODE
        command = [sys.executable, "-P", __file__, "--trainer", str(port), str(world_size), str(file)]
        self.trainer = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        body = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1}
        answer = asked(
            self._cluster.url,
            "/init_weights_update_group",
            {**body, "world_size": world_size, "group_name": GROUP},
        )
        if answer:
            raise AssertionError(f"the trainer's group did not come together: {answer}")
        tensors = load_file(file)
        return {
            "names": list(tensors),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
        }

    def end_trainer(self) -> None:
        if self.trainer is not None:
            self.trainer.kill()
            self.trainer.communicate()
            self.trainer = None


def asked(url: str, path: str, body: object) -> str:
    """Why the answer is a no; empty if it is a yes. Raises TimeoutError."""
    data, kind = (body, "octet-stream") if isinstance(body, bytes) else (json.dumps(body).encode(), "json")
    try:
        with open_url(Request(f"{url}{path}", data, {"Content-Type": f"application/{kind}"}), BOUND_S):
            return ""
    except HTTPError as error:
        return f"{error.code} {error.read().decode()}"
    except TimeoutError:
        raise
    except (OSError, HTTPException) as error:
        return f"none: {error!r}"


def trainer_main(port: int, world_size: int, file: Path) -> None:
    torch.set_num_threads(1)
    tensors = list(load_file(file).values())
    group = TrainerGroup(GROUP, port, world_size)
    for _ in sys.stdin:
        group.send(tensors)


# ---- one kill ---------------------------------------------------------------------------------------


def kill(cluster: LocalCluster, updates: Updates, victim: Victim, rng: random.Random) -> str:
    """Returns the incarnation of a node that was killed, else nothing."""
    match victim:
        case "router":
            router_process(cluster).send_signal(signal.SIGKILL)
        case "trainer":
            updates.end_trainer()
        case "prefill" | "decode":
            node = rng.choice(cluster.workers(victim))
            kill_nodes(cluster, [node["url"]], with_fronts=True)
            return str(node["incarnation"])
    return ""


def versions(cluster: LocalCluster) -> dict[str, str]:
    return {worker["incarnation"]: worker["weight_version"] for worker in cluster.workers()}


def settled(cluster: LocalCluster, allowed: set[str], killed: str = "") -> str:
    """The one version of all nodes, when all are there and the router knows who died; else nothing."""
    with suppress(OSError, HTTPException):
        serving = versions(cluster)
        if (
            killed not in serving
            and len(serving) == NUM_PREFILL + NUM_DECODE
            and len(set(serving.values())) == 1
        ):
            version = next(iter(serving.values()))
            if version in allowed and all_paired(cluster, NUM_PREFILL, NUM_DECODE):
                return version
    return ""


def disturb(
    cluster: LocalCluster,
    updates: Updates,
    tally: Tally,
    rng: random.Random,
    state: State,
    victim: Victim,
    source: Source,
) -> None:
    """One update with a kill in its middle, and the one behind it."""
    tally.num_kills += 1
    new, last = f"killed-{tally.num_kills}", f"whole-{tally.num_kills}"
    what = f"kill {tally.num_kills} ({victim}, update from {source})"
    is_over, answer = updates.begin(source, new)
    delay_s = rng.uniform(0.0, state.typical_s)
    time.sleep(delay_s)
    while is_over():  # too late: it must have worked, and the next one may take longer
        accept(answer(), f"{what}: an update without a kill")
        state.version, new = new, f"{new}-again"
        is_over, answer = updates.begin(source, new)
        delay_s *= rng.random()
        time.sleep(delay_s)
    killed = kill(cluster, updates, victim, rng)
    wait_until(is_over, BOUND_S, f"{what}: an answer to the update")
    updates.end_trainer()
    allowed = {state.version, new}
    version = check_settled(cluster, allowed, f"{what}: one version", killed)
    said, says = answer(), "new" if version == new else "old"
    tally.ends[f"{victim}: {says}"] += 1
    after = f"{what} after {delay_s:.2f} s"
    print(f"{after}: the {says} version serves; the answer was {said[:200] or 'yes'!r}", flush=True)

    state.typical_s = update(updates, what, last)
    state.version = last
    check_settled(cluster, {last}, f"{what}: all nodes on the next version")
    tally.num_one_version += 1


def update(updates: Updates, what: str, version: str) -> float:
    """Undisturbed; returns how long it took."""
    started_s = time.monotonic()
    is_over, answer = updates.begin("tensor", version)
    wait_until(is_over, BOUND_S, f"{what}: an answer to the next update")
    accept(answer(), f"{what}: the next update")
    return time.monotonic() - started_s


def accept(reason: str, what: str) -> None:
    if reason:
        raise AssertionError(f"{what} failed: {reason}")


def check_settled(cluster: LocalCluster, allowed: set[str], what: str, killed: str = "") -> str:
    """Waits for all nodes to serve one of these versions, and returns which."""
    version = wait_until(lambda: settled(cluster, allowed, killed), BOUND_S, what)
    reply = request(cluster.url, "/check_weights", {}, timeout_s=BOUND_S)
    accept("" if reply.status == 200 else reply.text, what)
    body = {"prompt": random_ids(0, 40), "max_tokens": 4, "ignore_eos": True}
    reply = request(cluster.url, "/v1/completions", body, timeout_s=BOUND_S)
    if reply.status != 200 or reply.json["weight_version"] != version:
        raise AssertionError(f"{what}: nodes serve {version}, but the answer is {reply.text[:500]}")
    return version


# ---- the run ----------------------------------------------------------------------------------------


@contextmanager
def two_checkpoints() -> Iterator[tuple[Path, Path]]:
    """The shipped one, and one whose last norm is another."""
    with tempfile.TemporaryDirectory() as temporary:
        other = Path(temporary)
        for file in SHIPPED_MODEL.glob("*.json"):
            (other / file.name).write_bytes(file.read_bytes())
        tensors = load_file(SHIPPED_MODEL / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.25
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        yield other, SHIPPED_MODEL


def make_plan(times: int, seed: int) -> list[tuple[Victim, Source]]:
    rng, plan = random.Random(seed), list[tuple[Victim, Source]]()
    for _ in range(times):
        victim: Victim = rng.choice(get_args(Victim))
        plan.append((victim, "distributed" if victim == "trainer" else rng.choice(get_args(Source))))
    return plan


def run_cluster(
    plan: Sequence[tuple[Victim, Source]], tally: Tally, rng: random.Random, log_path: Path
) -> None:
    """These kills in one cluster, fewer when one ends badly."""
    arguments = [str(SHIPPED_MODEL), *FLAGS]
    arguments += ["--num-prefill", str(NUM_PREFILL), "--num-decode", str(NUM_DECODE)]
    with two_checkpoints() as folders, LocalCluster(arguments, log_path=log_path) as cluster:
        updates, traffic = Updates(cluster, folders), Traffic(cluster)
        try:
            # An update goes without a node that has not joined.
            wait_until(lambda: all_paired(cluster, NUM_PREFILL, NUM_DECODE), BOUND_S, "all nodes, all paired")
            state = State("first", update(updates, "before any kill", "first"))
            for victim, source in plan:
                disturb(cluster, updates, tally, rng, state, victim, source)
        except (AssertionError, TimeoutError) as error:
            tally.num_hangs += "not within" in str(error) or isinstance(error, TimeoutError)
            tally.failures.append(f"{error}; {versions(cluster)}")
        finally:
            traffic.end()
            updates.end_trainer()
        tally.num_hangs += traffic.num_hanging
        if not traffic.num_answered:
            tally.failures.append("no request of the traffic was answered")
    if "Traceback" in log_path.read_text():
        tally.failures.append(f"a traceback in {log_path}")


def run(times: int, seed: int, log_dir: Path) -> Tally:
    rng, tally, plan = random.Random(seed), Tally(), make_plan(times, seed)
    for start in range(0, times, KILLS_PER_CLUSTER):
        log_path = log_dir / f"cluster-{start}.log"
        run_cluster(plan[start : start + KILLS_PER_CLUSTER], tally, rng, log_path)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=50, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", default="", metavar="DIR", help="where the clusters' logs are kept")
    parser.add_argument("--trainer", nargs=3, default=(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer:
        port, world_size, file = options.trainer
        trainer_main(int(port), int(world_size), Path(file))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        log_dir = Path(options.log_dir or temporary)
        log_dir.mkdir(parents=True, exist_ok=True)
        tally = run(options.times, options.seed, log_dir)
    for failure in tally.failures[:20]:
        print(failure[:1000], file=sys.stderr)
    print(", ".join(f"{end} {count}" for end, count in sorted(tally.ends.items())))
    print(f"KILLS {tally.num_kills} ONE_VERSION {tally.num_one_version} HANGS {tally.num_hangs}")
    return 1 if tally.failures or tally.num_hangs or tally.num_one_version < options.times else 0


if __name__ == "__main__":
    raise SystemExit(main())
