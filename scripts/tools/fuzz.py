"""Sends a process each message of its union, with values at their edges and beyond, and looks how it fares.

    scripts/dev fuzz --process prefill|decode|router --minutes N [--seed S] [MODEL]

A cluster of real processes is started on this machine, and serves requests all the while. Messages are made
of the types that the process decodes; one in two gets a value that is out of bounds, of another type, or
missing, and one in two texts names something that is there: a request that runs, a node, an address. To a
router they come from a node that has registered with it, as answers to what it asks and unasked; odd HTTP
bodies come too.

After each burst the process must answer, and no process of the cluster may have ended. After every tenth,
what an operator can set is set back, and a generation must give the right tokens. Prints the seed, how many
messages of each kind were sent, and how many were answered. The last line is `SENT n CHECKED c WRONG w DEATHS
d`; the exit code is 1 unless the last two are 0.
"""

from __future__ import annotations

import abc
import argparse
import asyncio
import contextlib
import http.client
import itertools
import os
import random
import re
import sys
import tempfile
import threading
import time
import typing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import zmq
from msgspec import inspect

from pdserve.bench.local_cluster import LocalCluster
from pdserve.front.member_calls import MemberCalls
from pdserve.messages.channel import ServerChannel
from pdserve.messages.link_guard import LinkKeys
from pdserve.messages.node import (
    ClientToNode,
    GenerateRequest,
    NodeEntry,
    NodeLoad,
    NodeToClient,
    Ping,
    Pong,
    is_same_process,
)
from pdserve.messages.operation import (
    ConfigureLogging,
    ContinueGeneration,
    SetInternalState,
    SlowDown,
    StopProfile,
)
from pdserve.messages.peer import PeerToPrefill
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.weights import MEMORY_TAGS, ResumeMemory
from pdserve.messages.work import Work
from pdserve.runtime.cluster_secret import SECRET_VARIABLE, new_secret
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.process import AccessKeys

UNIONS = {
    "decode": typing.get_args(ClientToNode),
    "prefill": (*typing.get_args(ClientToNode), *typing.get_args(PeerToPrefill)),
    "router": typing.get_args(NodeToClient),
}
ANSWER_S = 90.0  # a node may be loading weights, or sleeping before a forward, and answers all the same
BURST = 50
BURSTS_A_CHECK = 10
NUM_LIVE = 4  # requests that run at a time
NOT_SENT = {"assert_peer_death"}  # it does what it says: that peer is not spoken to any more
# What an operator may ask a node to wait for: it would do nothing else for so long.
WAITS = {"join_update_group": ("timeout_s", 0.05), "slow_down": ("forward_sleep_s", 0.01)}
QUESTION = {"input_ids": [5, 6, 7, 8], "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
BEYOND: tuple[Any, ...] = (
    -1,
    2**63,
    2**64 - 1,
    -5000,
    float("nan"),
    float("inf"),
    None,
    "",
    "\0",
    "x" * 5000,
)


class Values:
    """Values of a type, as plain data: those at its edges, and those that the cluster knows."""

    def __init__(self, rng: random.Random, known: list[str]) -> None:
        self.rng = rng
        self.known = known
        self.texts = ["", "a", "é", "x" * 255, "tcp://127.0.0.1:1", "/tmp", "float32", ".."]

    def of(self, kind: inspect.Type) -> Any:  # noqa: ANN401
        rng = self.rng
        match kind:
            case inspect.IntType():
                least, most = kind.ge or 0, 2**64 - 1 if kind.le is None else kind.le
                most = kind.lt - 1 if kind.lt is not None else most
                return rng.choice([least, most, min(most, 1), min(most, rng.randrange(300))])
            case inspect.FloatType():
                edges = [kind.le, kind.ge, 1e-7, 0.5, 1.0]
                return rng.choice([edge for edge in edges if edge is not None])
            case inspect.BoolType():
                return rng.random() < 0.5
            case inspect.StrType(pattern=pattern):
                texts = self.known if rng.random() < 0.5 else self.texts
                fitting = [text for text in texts if pattern is None or re.search(pattern, text)]
                return rng.choice(fitting or self.texts)
            case inspect.BytesType():
                return rng.randbytes(kind.min_length or rng.choice([0, 1, 4096]))
            case inspect.NoneType():
                return None
            case inspect.LiteralType():
                return rng.choice(kind.values)
            case inspect.UnionType():
                return self.of(rng.choice(kind.types))
            case inspect.VarTupleType() | inspect.ListType():
                most = min(kind.max_length or 40, 40)
                return [self.of(kind.item_type) for _ in range(rng.randrange(most + 1))]
            case inspect.TupleType():
                return [self.of(part) for part in kind.item_types]
            case inspect.DictType():
                return {self.of(kind.key_type): self.of(kind.value_type) for _ in range(rng.randrange(4))}
            case inspect.StructType():
                values = {field.encode_name: self.of(field.type) for field in kind.fields}
                if kind.array_like:
                    return list(values.values())
                return {**({} if kind.tag is None else {"type": kind.tag}), **values}
        raise AssertionError(f"no values for {kind}: teach them to this script")

    def spoil(self, body: dict[str, Any]) -> None:
        """One field, at any depth, becomes what its type does not hold; or is gone."""
        field = self.rng.choice([name for name in body if name != "type"])
        if isinstance(body[field], dict) and len(body[field]) > 1 and self.rng.random() < 0.7:
            self.spoil(body[field])
        elif isinstance(body[field], list) and body[field] and self.rng.random() < 0.7:
            body[field][self.rng.randrange(len(body[field]))] = self.rng.choice(BEYOND)
        elif self.rng.random() < 0.1:
            del body[field]
        else:
            body[field] = self.rng.choice(BEYOND)


class Traffic:
    """Requests that run meanwhile, on threads of their own. What becomes of them is not looked at."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(NUM_LIVE)]
        self.rids = [f"live-{number}" for number in range(NUM_LIVE)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        sampling = {"max_new_tokens": 100, "n": 1 + number % 2, "ignore_eos": True}
        while not self._is_over.wait(0.05):
            body = {"rid": self.rids[number], "input_ids": [number + 1] * 40, "sampling_params": sampling}
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                self._cluster.post("/generate", body, timeout_s=10.0)

    def close(self) -> None:
        self._is_over.set()


class Target(abc.ABC):
    """A process that is fuzzed, and how it is reached."""

    def __init__(self, cluster: LocalCluster, values: Values, kinds: Sequence[inspect.StructType]) -> None:
        self.cluster = cluster
        self.values = values
        self.kinds = kinds
        self.sent: Counter[str] = Counter()
        self.num_answers = 0

    @abc.abstractmethod
    def send_some(self) -> None: ...

    @abc.abstractmethod
    def answers(self) -> bool:
        """Whether the process does what it is asked."""

    @abc.abstractmethod
    def set_back(self) -> None:
        """What was changed that changes answers, or holds them up."""

    def made(self) -> dict[str, Any]:
        """The next message."""
        kind = self.values.rng.choice(self.kinds)
        body: dict[str, Any] = self.values.of(kind)
        if kind.tag in WAITS:
            name, most = WAITS[kind.tag]
            body[name] = most
        if self.values.rng.random() < 0.5 and len(body) > 1:
            self.values.spoil(body)
        self.sent[str(kind.tag)] += 1
        return body


class NodeTarget(Target):
    """A scheduler, spoken to as a router, a front and a decode node speak to it."""

    def __init__(
        self, cluster: LocalCluster, values: Values, kinds: Sequence[inspect.StructType], role: str
    ) -> None:
        super().__init__(cluster, values, kinds)
        self.url = cluster.workers(role)[0]["url"]
        info = cluster.get("/server_info", base=self.url)
        self.incarnation, self.role = info["incarnation"], role
        self.model_path = info["model"]["model_path"]
        self.prefill = cluster.workers("prefill")[0]["incarnation"]
        self.settings = cluster.get("/get_internal_state", base=self.url)["settings"]
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        keys = LinkKeys.of(os.environ[SECRET_VARIABLE])
        assert keys is not None
        keys.secure_client(self.socket)
        self.socket.connect(info["zmq_address"])

    def send_some(self) -> None:
        for number in range(4):  # that live, on this link
            attempt = sum(self.sent.values()) + number
            self.send(self._request(f"own-{number}", attempt))
        for _ in range(BURST):
            body = self.made()
            if "attempt" in body and self.values.rng.random() < 0.5:
                body["attempt"] = sum(self.sent.values()) // BURST * BURST + self.values.rng.randrange(4)
            self.socket.send(msgspec.msgpack.encode(body))
        self.send(SlowDown(forward_sleep_s=0.0))

    def send(self, message: msgspec.Struct) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def _request(self, request_id: str, attempt: int) -> GenerateRequest:
        return GenerateRequest(
            request_id=request_id,
            attempt=attempt,
            work=Work(
                prompt_ids=tuple(range(1, 20)),
                choices=(0, 1),
                sampling=SamplingParams(max_tokens=20, ignore_eos=True),
            ),
            prefill_incarnation=self.prefill,
            deadline_s=5.0,
        )

    def answers(self) -> bool:
        call_id = 2**62 + sum(self.sent.values())
        self.send(Ping(call_id=call_id))
        until = time.monotonic() + ANSWER_S
        while (left := until - time.monotonic()) > 0:
            if not self.socket.poll(int(1000 * left) + 1):
                return False
            answer = msgspec.msgpack.decode(self.socket.recv())
            self.num_answers += 1
            if answer.get("call_id") == call_id:
                return is_same_process(answer["entry"]["incarnation"], self.incarnation)
        return False

    def set_back(self) -> None:
        self.send(StopProfile())
        self.send(ConfigureLogging(log_level="info"))
        self.send(SetInternalState(settings=self.settings))
        self.send(ContinueGeneration())
        self.send(ResumeMemory(call_id=0, tags=MEMORY_TAGS, if_released=True))
        self.cluster.get("/health", base=self.url)
        if len({row["weight_version"] for row in self.cluster.workers()}) > 1:
            # An update happened to be well-formed, of this node alone: an operator has to say which goes.
            self.cluster.post("/update_weights_from_disk", {"model_path": self.model_path}, timeout_s=20.0)


class RouterTarget(Target):
    """A router, as a decode node that has registered with it, and as its clients."""

    URL = "http://127.0.0.1:9"

    def __init__(self, cluster: LocalCluster, values: Values, kinds: Sequence[inspect.StructType]) -> None:
        super().__init__(cluster, values, kinds)
        self.keys = AccessKeys(cluster_secret=os.environ[SECRET_VARIABLE])
        keys = LinkKeys.of(self.keys.cluster_secret)
        self.channel: ServerChannel[ClientToNode] = ServerChannel(
            zmq.Context.instance(), "127.0.0.1", 0, ClientToNode, keys=keys
        )
        row = cluster.workers("decode")[0]
        self.entry = msgspec.convert(
            {
                **{name: row[name] for name in NodeEntry.__struct_fields__ if name in row},
                "url": self.URL,
                "incarnation": "fuzz",
                "zmq_address": f"tcp://127.0.0.1:{self.channel.port}",
                "colocated": True,
            },
            NodeEntry,
        )
        self.load = msgspec.convert(row["load"], NodeLoad)
        self.values.known.append("fuzz")
        self.links: set[bytes] = set()
        self.paths = [path for path in cluster.get("/openapi.json")["paths"] if "{" not in path]

    def send_some(self) -> None:
        self.register()
        rng = self.values.rng
        for _ in range(BURST):
            for link, message in itertools.islice(self.channel.receive(), 20):
                self.links.add(link)
                self._answer(link, message)
            if self.links and rng.random() < 0.7:
                self._send(rng.choice([*self.links]), self.made())
        self._ask_oddly()

    def _answer(self, link: bytes, message: object) -> None:
        """Rightly, or with whatever comes; of a request that runs here, so that its ids are met."""
        rng = self.values.rng
        self.num_answers += 1
        if isinstance(message, Ping) and rng.random() < 0.7:
            pong = Pong(
                call_id=message.call_id, entry=self.entry, load=self.load, ready_peers=(), refused_peers={}
            )
            self._send(link, msgspec.to_builtins(pong))
            return
        for _ in range(rng.randrange(4)):
            body = self.made()
            if (call_id := getattr(message, "call_id", None)) is not None:
                body["call_id"] = call_id
            if isinstance(message, GenerateRequest):
                ids = {"request_id": message.request_id, "attempt": message.attempt}
                body |= ids
                for output in body.get("outputs") or ():
                    if isinstance(output, dict):
                        output |= ids | {
                            "choice": rng.choice(message.work.choices),
                            "position": rng.randrange(3),
                        }
            self._send(link, body)

    def _send(self, link: bytes, body: object) -> None:
        with contextlib.suppress(zmq.ZMQError):  # that link is gone
            self.channel.socket.send_multipart([link, msgspec.msgpack.encode(body)], zmq.NOBLOCK)

    def _ask_oddly(self) -> None:
        rng = self.values.rng
        path, kind = rng.choice(self.paths), rng.choice(self.kinds)
        if "weights" in path or "memory" in path or path in ("/sleep", "/pause_generation", "/workers"):
            return  # they hold up everybody on purpose, or leave
        body = {
            rng.choice(
                ["prompt", "text", "input", "rid", "tokens", "messages", "sampling_params", "n"]
            ): value
            for value in self.values.of(kind).values()
        }
        self.sent[f"HTTP {path}"] += 1
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, TypeError):
            self.cluster.post(path, body, timeout_s=2.0)

    def register(self) -> None:
        body = {"url": self.URL, "entry": msgspec.to_builtins(self.entry)}
        self._ask_as_member("POST", "/workers", msgspec.json.encode(body))

    def _ask_as_member(self, method: str, path: str, body: bytes = b"") -> None:
        """With a proof of the cluster secret. A no is none of ours to judge."""

        async def ask() -> None:
            async with aiohttp.ClientSession() as session:
                await MemberCalls(session, self.cluster.url, self.keys).ask(method, path, body)

        asyncio.run(ask())

    def answers(self) -> bool:
        return bool(self.cluster.get("/live")["status"] == "ok")

    def set_back(self) -> None:
        """The made-up node leaves: what it answers is not to be looked at."""
        self._ask_as_member("DELETE", f"/workers/{self.URL}")
        self.links.clear()


def is_right(cluster: LocalCluster, target: Target, right: object) -> bool:
    """Whether the cluster gives the right tokens, once it is as it was."""
    until, told = time.monotonic() + ANSWER_S, ""
    while time.monotonic() < until:
        try:
            target.set_back()
            answer = cluster.post("/generate", QUESTION, timeout_s=20.0)["output_ids"]
        except (OSError, http.client.HTTPException) as error:  # it may take a moment
            told = str(error)
            time.sleep(0.2)
        else:
            if answer != right:
                print(f"WRONG: {answer} is not {right}", flush=True)
            return bool(answer == right)
    print(f"no generation within {ANSWER_S:g} s: {told}", flush=True)
    return False


def processes_of(cluster: LocalCluster) -> set[int]:
    return {child.pid for child in psutil.Process(cluster.pid).children(recursive=True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--process", choices=sorted(UNIONS), default="decode")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    model = options.model.resolve()
    kinds = [inspect.type_info(message) for message in UNIONS[options.process]]
    structs = [kind for kind in kinds if isinstance(kind, inspect.StructType) and kind.tag not in NOT_SENT]
    with tempfile.TemporaryDirectory(prefix="pdserve-fuzz-") as folder:
        os.chdir(folder)  # a checkpoint that is saved under a relative path goes with it
        log = Path(folder) / "log"
        os.environ[SECRET_VARIABLE] = new_secret()  # what is to be shown is how a message of a peer is taken
        arguments = [str(model), "--kv-cache-gb", "0.05", "--deterministic"]
        num_checked = num_wrong = deaths = 0
        with LocalCluster(arguments, log) as cluster:
            right = cluster.post("/generate", QUESTION)["output_ids"]
            processes = processes_of(cluster)
            traffic = Traffic(cluster)
            known = [*traffic.rids, "own-0", "own-1", "own-2", "own-3"]
            known += [row["incarnation"] for row in cluster.workers()]
            known += [row["zmq_address"] for row in cluster.workers()]
            values = Values(random.Random(options.seed), known)
            target: Target = (
                RouterTarget(cluster, values, structs)
                if options.process == "router"
                else NodeTarget(cluster, values, structs, options.process)
            )
            until = time.monotonic() + 60 * options.minutes
            while time.monotonic() < until and not deaths:
                for _ in range(BURSTS_A_CHECK):
                    target.send_some()
                    if not target.answers() or processes - processes_of(cluster):
                        deaths = 1
                        break
                else:
                    num_checked += 1
                    num_wrong += not is_right(cluster, target, right)
            traffic.close()
        text = log.read_text(errors="replace")
    num_contained = text.count("failed, and nothing else with it")
    for tag, count in sorted(target.sent.items()):
        print(f"{count:8} {tag}")
    print(f"{target.num_answers} answers, {num_contained} lines of faults contained")
    if deaths or num_contained or num_wrong:
        print("\n".join(line for line in text.splitlines() if " E " in line or "Error" in line)[-6000:])
    print(f"SENT {target.sent.total()} CHECKED {num_checked} WRONG {num_wrong} DEATHS {deaths}")
    return 1 if deaths or num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
