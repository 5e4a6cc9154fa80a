"""Sends a node every message of its union, with values at their edges and beyond, and asks whether it lives.

    scripts/fuzz --process prefill|decode --minutes N [--seed S] [MODEL]

A cluster of real processes is started on this machine. Messages are made of the types that the node decodes;
one in two gets a value that is out of bounds, of another type, or missing. Every 50 messages the node must
answer a ping. Prints the seed, how many messages of each kind were sent, and how many were answered. The last
line is `SENT n DEATHS d`; the exit code is 1 unless d is 0.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import tempfile
import time
import typing
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import zmq
from msgspec import inspect

from pdserve.bench.local_cluster import LocalCluster
from pdserve.messages.link_guard import LinkKeys
from pdserve.messages.node import ClientToNode, Ping
from pdserve.messages.operation import SlowDown
from pdserve.messages.peer import PeerToPrefill
from pdserve.runtime.cluster_secret import SECRET_VARIABLE, new_secret
from pdserve.runtime.config import SHIPPED_MODEL

UNIONS = {
    "decode": typing.get_args(ClientToNode),
    "prefill": (*typing.get_args(ClientToNode), *typing.get_args(PeerToPrefill)),
}
ANSWER_S = 90.0  # a node may be loading weights, or sleeping before a forward, and answers all the same
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
        self.texts = ["", "a", "é", "x" * 255, "tcp://127.0.0.1:1", "/tmp", "float32", "..", *known]

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
                fitting = [text for text in self.texts if pattern is None or re.search(pattern, text)]
                return rng.choice(fitting)
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


class Fuzzer:
    def __init__(self, cluster: LocalCluster, role: str, seed: int) -> None:
        row = cluster.workers(role)[0]
        info = cluster.get("/server_info", base=row["url"])
        self.incarnation, self.address = info["incarnation"], info["zmq_address"]
        self.values = Values(random.Random(seed), [self.incarnation, self.address, info["weight_version"]])
        self.kinds = [inspect.type_info(message) for message in UNIONS[role]]
        self.sent: Counter[str] = Counter()
        self.num_answers = 0
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        keys = LinkKeys.of(os.environ[SECRET_VARIABLE])
        assert keys is not None
        keys.secure_client(self.socket)
        self.socket.connect(self.address)

    def send_some(self) -> None:
        for _ in range(50):
            kind = self.values.rng.choice(self.kinds)
            assert isinstance(kind, inspect.StructType)
            body = self.values.of(kind)
            if self.values.rng.random() < 0.5 and len(body) > 1:
                self.values.spoil(body)
            self.socket.send(msgspec.msgpack.encode(body))
            self.sent[str(kind.tag)] += 1
        self.socket.send(msgspec.msgpack.encode(SlowDown(forward_sleep_s=0.0)))

    def lives(self) -> bool:
        """Whether the same process answers."""
        call_id = 2**62 + sum(self.sent.values())
        self.socket.send(msgspec.msgpack.encode(Ping(call_id=call_id)))
        until = time.monotonic() + ANSWER_S
        while (left := until - time.monotonic()) > 0:
            if not self.socket.poll(int(1000 * left) + 1):
                return False
            answer = msgspec.msgpack.decode(self.socket.recv())
            self.num_answers += 1
            if answer.get("call_id") == call_id:
                incarnation: str = answer["entry"]["incarnation"]
                return str(incarnation.partition("~")[0]) == str(self.incarnation)
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--process", choices=sorted(UNIONS), default="decode")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    model = options.model.resolve()
    with tempfile.TemporaryDirectory(prefix="pdserve-fuzz-") as folder:
        os.chdir(folder)  # a checkpoint that is saved under a relative path goes with it
        log = Path(folder) / "log"
        os.environ[SECRET_VARIABLE] = new_secret()  # what is to be shown is how a message of a peer is taken
        with LocalCluster([str(model), "--kv-cache-gb", "0.05"], log) as cluster:
            fuzzer, deaths = Fuzzer(cluster, options.process, options.seed), 0
            until = time.monotonic() + 60 * options.minutes
            while time.monotonic() < until and not deaths:
                fuzzer.send_some()
                deaths += not fuzzer.lives()
        text = log.read_text(errors="replace")
    num_contained = text.count("failed, and nothing else with it")
    for tag, count in sorted(fuzzer.sent.items()):
        print(f"{count:8} {tag}")
    print(f"{fuzzer.num_answers} answers, {num_contained} faults contained")
    if deaths or num_contained:
        print("\n".join(line for line in text.splitlines() if " E " in line or "Error" in line)[-6000:])
    print(f"SENT {fuzzer.sent.total()} DEATHS {deaths}")
    return 1 if deaths else 0


if __name__ == "__main__":
    sys.exit(main())
