"""Every control call, on every role, in every state: its status, and how long it held the node's loop.

    scripts/dev control_table            # writes the tables of docs/control_plane.md

A node's loop is where everything else waits meanwhile. What is measured is the handling of the call's own
messages, in wall time, by the node itself (`loop_times` of /get_internal_state).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeGuard
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file, save

from pdserve.bench.local_cluster import LocalCluster
from pdserve.docs.examples.trainer_group import TrainerGroup
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.tests.cluster.helpers import (
    GREEDY,
    Stream,
    all_paired,
    random_ids,
    request,
    wait_until,
)
from pdserve.tests.trainer import free_port

FLAGS = ["--dtype", "float32", "--num-threads", "1", "--chunked-prefill-size", "64", "--disable-prefix-cache"]
FLAGS += ["--faulty", "delay=1.0,delay_s=0.6"]  # so that a hand-off lasts
STATES = ("idle", "busy", "hand-off", "twice", "wrong")
ROLES = ("prefill", "decode", "router")
DOCS = Path(__file__).parents[2] / "docs" / "control_plane.md"
BEGIN, END = "<!-- scripts/dev control_table -->\n", "<!-- end -->\n"
NORM = "model.norm.weight"
_PERCENTILES = ("p50_s", "p99_s", "own_p99_s", "max_s")
_SERVING = ("ping", "roster", "generate", "cancel", "get_internal_state", "get_request_state", "turn")


@dataclass(frozen=True)
class Ask:
    """One HTTP request: GET without a body, POST otherwise."""

    path: str
    body: object = None


@dataclass(frozen=True)
class Call:
    right: Ask
    wrong: Ask | None  # None: nothing that could be wrong
    before: tuple[Ask, ...] = ()
    after: tuple[Ask, ...] = ()
    roles: tuple[str, ...] = ROLES
    trains: str = ""  # what a trainer does meanwhile: "join", "send"
    restores_weights: bool = False

    @property
    def name(self) -> str:
        body = self.right.body
        shown = next((f" {value}" for value in body.values()), "") if self.names_body(body) else ""
        return f"{urlsplit(self.right.path).path}{shown}"

    @staticmethod
    def names_body(body: object) -> TypeGuard[dict[str, object]]:
        return isinstance(body, dict) and next(iter(body), "") == "mode"


DISK: dict[str, object] = {"model_path": str(SHIPPED_MODEL), "weight_version": "default"}
ONE_NORM = Ask(
    "/update_weights_from_distributed",
    {
        "names": [NORM],
        "dtypes": ["bfloat16"],
        "shapes": [[256]],
        "group_name": "g",
        "timeout": 20.0,
        "force": True,
    },
)
INIT = Ask("/init_weights_update_group")  # its body names the trainer's port
LEAVE = Ask("/destroy_weights_update_group", {"group_name": "g"})
CONTINUE = Ask("/continue_generation", {})
RELEASE = Ask("/release_memory_occupation", {"tags": ["kv_cache"]})
RESUME = Ask("/resume_memory_occupation", {"tags": ["kv_cache"]})
STOP_PROFILE = Ask("/stop_profile", {})
PULL = Ask("/update_weights_from_peer")  # its body names the other node
SAVE = Ask("/save_sharded_model")  # the body of both names a new folder
SAVE_REMOTE = Ask("/save_remote_model")


def _pause(mode: str) -> Call:
    return Call(
        Ask("/pause_generation", {"mode": mode}), Ask("/pause_generation", {"mode": "nap"}), after=(CONTINUE,)
    )


CALLS = (
    Call(Ask("/server_info"), None),
    Call(Ask("/model_info"), None),
    Call(Ask("/get_load"), None),
    Call(Ask("/metrics"), None),
    Call(Ask("/requests/nobody"), None),
    Call(Ask("/get_internal_state"), None),
    Call(
        Ask("/set_internal_state", {"server_args": {"schedule_conservativeness": 1.0}}),
        Ask("/set_internal_state", {"server_args": {"page_size": 8}}),
        roles=("decode", "router"),
    ),
    Call(
        Ask("/set_internal_state", {"server_args": {"max_queued_prefills": 64}}),
        Ask("/set_internal_state", {"server_args": {"page_size": 8}}),
        roles=("prefill",),
    ),
    Call(Ask("/configure_logging", {"log_level": "info"}), Ask("/configure_logging", {"log_level": "loud"})),
    Call(
        Ask("/slow_down", {"forward_sleep_time": 0.0}),
        Ask("/slow_down", {"forward_sleep_time": 1e9}),
    ),
    Call(Ask("/freeze_gc", {}), None),
    Call(
        Ask("/start_profile", {"num_steps": 256, "activities": ["CPU"]}),
        Ask("/start_profile", {"num_steps": 0}),
        after=(STOP_PROFILE,),
    ),
    Call(STOP_PROFILE, None, before=(Ask("/start_profile", {"activities": ["CPU"]}),)),
    Call(Ask("/flush_cache?timeout=0"), Ask("/flush_cache?timeout=much")),
    Call(Ask("/abort_request", {"rid": "nobody"}), Ask("/abort_request", {"rid": 5})),
    Call(Ask("/abort_request", {"abort_all": True}), Ask("/abort_request", {"abort_all": "all"})),
    _pause("in_place"),
    _pause("retract"),
    _pause("abort"),
    Call(CONTINUE, None, before=(Ask("/pause_generation", {"mode": "in_place"}),)),
    Call(Ask("/assert_peer_death", {"incarnation": "nobody"}), Ask("/assert_peer_death", {})),
    Call(
        Ask("/update_weights_from_disk", {**DISK, "force": True}),
        Ask("/update_weights_from_disk", {"model_path": "/nowhere", "force": True}),
        restores_weights=True,
    ),
    Call(
        Ask("/update_weights_from_tensor?force=true&weight_version=t", b"norm"),
        Ask("/update_weights_from_tensor?force=true", b"\x80\x04pickle"),
        restores_weights=True,
    ),
    Call(
        Ask("/update_weights_from_ipc", {"name": "pdserve-control-table", "force": True}),
        Ask("/update_weights_from_ipc", {"name": "../etc/passwd", "force": True}),
        restores_weights=True,
    ),
    Call(PULL, Ask(PULL.path, {"peer": "nowhere", "force": True}), restores_weights=True),
    Call(
        Ask("/update_weight_version", {"new_version": "named", "force": True}),
        Ask("/update_weight_version", {"new_version": 5}),
        restores_weights=True,
    ),
    Call(SAVE, Ask(SAVE.path, {"path": "not/absolute"})),
    Call(SAVE_REMOTE, Ask(SAVE_REMOTE.path, {"url": "no-such-scheme://folder"})),
    Call(INIT, Ask(INIT.path, {"master_address": "nowhere"}), after=(LEAVE,), trains="join"),
    Call(
        ONE_NORM,
        Ask(ONE_NORM.path, {"names": [NORM], "dtypes": ["complex64"], "shapes": [[256]], "force": True}),
        before=(INIT,),
        after=(LEAVE,),
        trains="send",
        restores_weights=True,
    ),
    Call(LEAVE, Ask(LEAVE.path, {"group_name": 5}), before=(INIT,), trains="join"),
    Call(
        Ask("/get_weights_by_name", {"name": NORM, "truncate_size": 3}),
        Ask("/get_weights_by_name", {"name": "no.such.weight"}),
    ),
    Call(Ask("/check_weights", {}), Ask("/check_weights", {"action": "sum"})),
    Call(RELEASE, Ask(RELEASE.path, {"tags": ["everything"]}), after=(RESUME,)),
    Call(RESUME, Ask(RESUME.path, {"tags": ["everything"]}), before=(RELEASE,)),
)


@dataclass
class Row:
    statuses: dict[str, int] = field(default_factory=dict)  # by state
    held_s: float = 0.0  # the longest


class Bench:
    """A cluster, and a trainer that joins its groups."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.urls = {worker["role"]: worker["url"] for worker in cluster.workers()}
        self.urls["router"] = cluster.url
        self.tensors = {NORM: load_file(SHIPPED_MODEL / "model.safetensors")[NORM]}
        self._thread = ThreadPoolExecutor(1)
        self._trainer: Future[TrainerGroup] | None = None
        self._port = 0
        self._folder = TemporaryDirectory()
        self._num_saved = 0

    def run(self, call: Call, role: str, state: str, row: Row) -> None:
        url = self.urls[role]
        self._num_saved += 1
        with self._in_state(role, state):
            for ask in call.before if state != "wrong" else ():
                self.ask(url, ask, trains=ask is INIT)
            counts = self._counts(role)
            if state == "wrong":
                assert call.wrong is not None
                row.statuses[state] = self.ask(url, call.wrong)
            else:
                for _ in range(2 if state == "twice" else 1):
                    row.statuses[state] = self.ask(url, call.right, trains=bool(call.trains))
            row.held_s = max(row.held_s, self._held_s(role, counts))
        for ask in call.after:
            self.ask(url, ask)
        self._restore(weights=call.restores_weights)

    def ask(self, url: str, ask: Ask, *, trains: bool = False) -> int:
        """The status of the answer."""
        body: object = ask.body
        if ask is INIT:
            if trains and self._trainer is None:
                self._port = free_port()
                num_nodes = 2 if url == self.cluster.url else 1
                self._trainer = self._thread.submit(TrainerGroup, "g", self._port, 1 + num_nodes)
            num_nodes = 2 if url == self.cluster.url else 1
            body = {
                "master_address": "127.0.0.1",
                "master_port": self._port,
                "rank_offset": 1,
                "world_size": 1 + num_nodes,
                "group_name": "g",
                "timeout": 20.0,
            }
        elif ask is ONE_NORM and trains and self._trainer is not None:
            trainer = self._trainer
            self._thread.submit(lambda: trainer.result().send([self.tensors[NORM]]))
        elif ask is LEAVE and self._trainer is not None:
            trainer, self._trainer = self._trainer, None
            status = self._send(url, ask.path, body)
            self._thread.submit(lambda: trainer.result().close()).result(timeout=60)
            return status
        elif ask is PULL:
            other = "prefill" if url == self.urls["decode"] else "decode"
            body = {"peer": self.urls[other], "force": True}
        elif ask is SAVE:
            body = {"path": f"{self._folder.name}/{self._num_saved}"}
        elif ask is SAVE_REMOTE:
            body = {"url": f"file://{self._folder.name}/{self._num_saved}"}
        elif body == b"norm":
            body = save(self.tensors)
        return self._send(url, ask.path, body)

    @staticmethod
    def _send(url: str, path: str, body: object) -> int:
        if not isinstance(body, bytes):
            return request(url, path, body).status
        target = urlsplit(url)
        connection = HTTPConnection(target.hostname or "", target.port, timeout=60)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/octet-stream"})
            return connection.getresponse().status
        finally:
            connection.close()

    @contextmanager
    def _in_state(self, role: str, state: str) -> Iterator[None]:
        if state not in ("busy", "hand-off"):
            yield
            return
        url = self.cluster.url
        prefills = state == "hand-off" or role == "prefill"
        body = {
            "prompt": random_ids(1, 900 if state == "busy" and role == "prefill" else 100),
            # So few that the node is idle before those who wait for that give up, also on a loaded machine.
            "max_tokens": 2 if prefills else 60,
            "request_id": f"state-{time.monotonic_ns()}",
            **GREEDY,
        }
        wanted = "sending" if state == "hand-off" else "computing" if prefills else "running"
        request(url, "/slow_down", {"forward_sleep_time": 0.05})
        stream = Stream(url, body)
        name = body["request_id"]
        wait_until(lambda: wanted in self._states(str(name)), 30.0, f"a request that is {wanted}")
        try:
            yield
        finally:
            request(url, "/continue_generation", {})
            request(url, "/slow_down", {"forward_sleep_time": None})
            request(url, "/abort_request", {"rid": name})
            stream.answer()

    def _states(self, request_id: str) -> set[str]:
        reply = request(self.cluster.url, f"/requests/{request_id}")
        # It has none while it waits in the router.
        nodes = reply.json.get("nodes", {}) if reply.status == 200 else {}
        return {node["state"] for node in nodes.values()}

    def _restore(self, *, weights: bool) -> None:
        if weights:
            wait_until(
                lambda: request(self.cluster.url, "/update_weights_from_disk", DISK).status == 200,
                60.0,
                "the shipped weights on every node",
            )
        for role in ("prefill", "decode"):  # a flush waits for what is still being written
            request(self.urls[role], "/flush_cache?timeout=10")
        wait_until(lambda: self._is_known() and all_paired(self.cluster, 1, 1), 30.0, "a ready pair")

    def _is_known(self) -> bool:
        """Whether the router knows the nodes by the names that they have now."""
        return all(
            worker["incarnation"] == self.cluster.get("/server_info", worker["url"])["entry"]["incarnation"]
            for worker in self.cluster.workers()
        )

    def loop_times(self, role: str) -> dict[str, dict[str, Any]]:
        return dict(self.cluster.get("/get_internal_state", self.urls[role])["loop_times"])

    def _counts(self, role: str) -> dict[str, dict[str, int]]:
        nodes = ("prefill", "decode") if role == "router" else (role,)
        return {
            node: {kind: times["count"] for kind, times in self.loop_times(node).items()} for node in nodes
        }

    def _held_s(self, role: str, before: dict[str, dict[str, int]]) -> float:
        return max(
            (
                times["last_s"]
                for node, counts in before.items()
                for kind, times in self.loop_times(node).items()
                if kind not in _SERVING and times["count"] > counts.get(kind, 0)
            ),
            default=0.0,
        )


def run(
    bench: Bench,
    wanted: Callable[[Call, str, str], bool],
    progress: Callable[[str], None] = lambda _: None,
) -> dict[tuple[str, str], Row]:
    """By role and call."""
    rows: dict[tuple[str, str], Row] = {}
    ipc = Path("/dev/shm/pdserve-control-table")
    ipc.write_bytes(save(bench.tensors))
    try:
        for role in ROLES:
            for call in CALLS:
                for state in STATES:
                    if role not in call.roles or (state == "wrong" and call.wrong is None):
                        continue
                    if wanted(call, role, state):
                        progress(f"{role} {call.name} {state}")
                        bench.run(call, role, state, rows.setdefault((role, call.name), Row()))
    finally:
        ipc.unlink()
    return rows


def statuses_in_docs() -> dict[tuple[str, str], dict[str, int]]:
    """By role and call, as docs/control_plane.md says."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    role = ""
    for line in DOCS.read_text().split(BEGIN)[1].split(END)[0].splitlines():
        if line.startswith("**"):
            role = line.strip("*").split()[0].lower()
        elif line.startswith("| `"):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            found[role, name.strip("`")] = {
                state: int(cell) for state, cell in zip(STATES, cells, strict=False) if cell.isdigit()
            }
    return found


def tables(bench: Bench, rows: dict[tuple[str, str], Row]) -> Iterator[str]:
    for role in ROLES:
        node = "on both nodes" if role == "router" else "on the node"
        yield f"**{role.capitalize()}**\n"
        yield f"| call | {' | '.join(STATES)} | held the loop {node}, ms |"
        yield "|---|" + "---|" * (len(STATES) + 1)
        for (row_role, name), row in rows.items():
            if row_role == role:
                cells = [str(row.statuses.get(state, "")) for state in STATES]
                held = f"{row.held_s * 1e3:.2f}" if row.held_s else ""
                yield f"| `{name}` | {' | '.join(cells)} | {held} |"
        yield ""
    yield "**Messages**, by the tag in `loop_times`; `turn` is a whole step of the loop:\n"
    columns = [f"{role}: count | p50, ms | p99 | own p99 | longest" for role in ("prefill", "decode")]
    yield f"| message | {' | '.join(columns)} |"
    yield "|---|" + "---|" * 10
    times = {role: bench.loop_times(role) for role in ("prefill", "decode")}
    for kind in sorted(set(times["prefill"]) | set(times["decode"])):
        cells = []
        for role in ("prefill", "decode"):
            found = times[role].get(kind)
            cells += (
                [str(found["count"]), *(f"{found[name] * 1e3:.2f}" for name in _PERCENTILES)]
                if found
                else [""] * 5
            )
        yield f"| `{kind}` | {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> int:
    if arguments:
        print("usage: scripts/dev control_table", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    with LocalCluster([str(SHIPPED_MODEL), *FLAGS]) as cluster:
        bench = Bench(cluster)
        rows = run(bench, lambda call, role, state: True, lambda text: print(text, file=sys.stderr))
        text = "\n".join(tables(bench, rows))
    docs = DOCS.read_text()
    head, _, rest = docs.partition(BEGIN)
    _, _, tail = rest.partition(END)
    DOCS.write_text(f"{head}{BEGIN}\n{text}\n\n{END}{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
