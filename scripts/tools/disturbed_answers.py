"""Whether clients that stay get the answers of an undisturbed run, while others leave and writes go wrong.

    scripts/dev disturbed_answers --clients 2000 --leave 0.3
    scripts/dev disturbed_answers --clients 400 --faulty fail=0.1,late=0.05,half=0.05,delay=0.02
    scripts/dev disturbed_answers --clients 16 --concurrency 16 --tokens 1900 --kills 3 --restarts 5

Asks every request once of a cluster that nothing disturbs. Then starts another one, with `--faulty` if given,
and as many clients as are wanted; a share of them leaves at a random moment: before the first byte, or after
some tokens. Whoever stays must get the same tokens, text and finish reasons. With `--kills` the decode node
is killed (SIGKILL) so many times while they are answered, and with `--restarts` every node is told to end
(SIGTERM), one after the other, in so many rounds; each time the cluster is whole again before the next, and
clients ask from the first request on again until the last one is back. No node may be lost while nothing is
being answered. Afterwards no page of any node may be locked, reserved, exposed or in quarantine, and all must
be free after a flush. Further arguments go to `pdserve up`. Exit code 1 when anything of this does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL

FLAGS = (
    "--dtype",
    "float32",
    "--poison-reserved-pages",
    "--num-threads",
    "1",
    "--max-attempts",
    "8",
    # Who waits is answered, however slow the machine is.
    "--max-queue-wait",
    "0",
)
NUM_BODIES = 64  # distinct requests; every one is asked by many clients
VOCAB_SIZE = 4096  # of the shipped model
REQUEST_TIMEOUT_S = 600.0  # an answer may meet every loss
IDLE_TIMEOUT_S = 40.0
BETWEEN_LOSSES_S = 2.0  # the cluster is whole again, and works on what it got back
REJOIN_TIMEOUT_S = 90.0
_FAULT = re.compile(r"write \d+ of \d+ bytes: (\w+)")


@dataclass
class Answer:
    """All that one client saw, by choice."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)

    def take(self, chunk: dict[str, Any]) -> None:
        for choice in chunk.get("choices", ()):
            index = choice["index"]
            self.token_ids.setdefault(index, []).extend(choice["token_ids"])
            self.texts[index] = self.texts.get(index, "") + choice["text"]
            if choice["finish_reason"] is not None:
                self.finish_reasons[index] = choice["finish_reason"]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids.values()))


@dataclass(frozen=True)
class Leaving:
    """When a client leaves: after so many tokens, or after so many seconds, whichever comes first."""

    num_tokens: int
    after_s: float


@dataclass(frozen=True)
class Asked:
    """A request, and what came of it."""

    client: int
    answer: Answer
    end: str  # "done", "left", or what was wrong
    began_s: float  # of time.monotonic()
    ended_s: float


@dataclass
class Tally:
    num_asked: int = 0
    num_equal: int = 0
    num_left: int = 0
    num_early: int = 0  # of those that left: before the first token
    duration_s: float = 0.0
    under_way: list[int] = field(default_factory=list)  # answers, at each loss of a node
    most_outlived: int = 0  # losses, by one answer
    attempts: Counter[str] = field(default_factory=Counter)  # by how they ended
    faults: Counter[str] = field(default_factory=Counter)
    rooms: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Loss:
    """What happens to a node of this role."""

    role: str
    number: signal.Signals


def planned_losses(num_kills: int, num_restarts: int) -> list[Loss]:
    kills = [Loss("decode", signal.SIGKILL)] * num_kills
    return kills + [Loss(role, signal.SIGTERM) for role in ("prefill", "decode")] * num_restarts


def make_bodies(seed: int, num_tokens: int = 0) -> list[dict[str, Any]]:
    """Prompts of one to some thirty pages, a third with a common beginning; greedy or sampled; n 1 or 2.

    With `num_tokens` every answer has so many, and prompts are short.
    """
    rng = random.Random(seed)
    common = [rng.randrange(1, VOCAB_SIZE) for _ in range(20 if num_tokens else 100)]
    bodies = []
    for number in range(NUM_BODIES):
        own = [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randrange(3, 100 if num_tokens else 400))]
        bodies.append(
            {
                "prompt": common + own if number % 3 == 0 else own,
                "max_tokens": num_tokens or rng.randrange(2, 40),
                "temperature": 0.0 if number % 2 else 0.8,
                "seed": number,
                "n": 2 if number % 5 == 0 else 1,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
            }
        )
    return bodies


async def ask(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], leaving: Leaving | None
) -> tuple[Answer, str]:
    """The answer and how it ended, as in `Asked`."""
    answer = Answer()
    try:
        async with asyncio.timeout(leaving.after_s if leaving else REQUEST_TIMEOUT_S):
            async with session.post(f"{url}/v1/completions", json=body) as response:
                if response.status != 200:
                    return answer, f"status {response.status}: {(await response.text())[:200]}"
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    data = line.removeprefix(b"data: ").strip()
                    if data == b"[DONE]":
                        return answer, "done"
                    chunk = json.loads(data)
                    if "error" in chunk:
                        return answer, f"error in mid-stream: {chunk['error']}"
                    answer.take(chunk)
                    if leaving is not None and answer.num_tokens >= leaving.num_tokens:
                        return answer, "left"
    except TimeoutError:
        return answer, "left" if leaving else f"no end within {REQUEST_TIMEOUT_S:g} s"
    except aiohttp.ClientError as error:
        return answer, f"{type(error).__name__}: {error}"
    return answer, "the stream ended without [DONE]"


async def ask_all(
    url: str,
    bodies: Sequence[dict[str, Any]],
    leaving: Sequence[Leaving | None],
    concurrency: int,
    goes_on: Callable[[], bool] = lambda: False,
) -> list[Asked]:
    """Every body once, `concurrency` at a time, and from the first one again for as long as it `goes_on`.

    A client that leaves closes its connection.
    """
    numbers = itertools.count()
    asked: list[Asked] = []
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=None)
    ) as session:

        async def one_after_the_other() -> None:
            end = "done"
            for number in numbers:
                if number >= len(bodies) and (end not in ("done", "left") or not goes_on()):
                    return
                client, began_s = number % len(bodies), time.monotonic()
                answer, end = await ask(session, url, bodies[client], leaving[client])
                asked.append(Asked(client, answer, end, began_s, time.monotonic()))

        await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))
    return sorted(asked, key=lambda one: one.client)


def under_way(asked: Sequence[Asked], lost_at_s: Sequence[float]) -> list[int]:
    """How many answers each loss met."""
    return [sum(one.began_s < at_s < one.ended_s for one in asked) for at_s in lost_at_s]


def most_outlived(asked: Sequence[Asked], lost_at_s: Sequence[float]) -> int:
    """How many losses the answer met that was done in spite of most of them."""
    done = [one for one in asked if one.end == "done"]
    return max((sum(one.began_s < at_s < one.ended_s for at_s in lost_at_s) for one in done), default=0)


def undisturbed_answers(
    work_dir: Path, bodies: Sequence[dict[str, Any]], flags: Sequence[str]
) -> list[Answer]:
    with LocalCluster([str(SHIPPED_MODEL), *FLAGS, *flags], log_path=work_dir / "undisturbed.log") as cluster:
        asked = asyncio.run(ask_all(cluster.url, bodies, [None] * len(bodies), 8))
    if wrong := [one.end for one in asked if one.end != "done"]:
        raise RuntimeError(f"the undisturbed run failed: {wrong[0]}")
    return [one.answer for one in asked]


class LosingNodes(threading.Thread):
    """Does to a cluster's nodes what `losses` says; ends when it is whole again after the last one."""

    def __init__(self, cluster: LocalCluster, losses: Sequence[Loss]) -> None:
        super().__init__(name="losing nodes", daemon=True)
        self._cluster = cluster
        self._losses = losses
        self._num_nodes = len(cluster.workers())
        self.lost_at_s: list[float] = []  # of time.monotonic()
        self.failure = ""

    def run(self) -> None:
        for loss in self._losses:
            time.sleep(BETWEEN_LOSSES_S)
            before = {row["id"] for row in self._cluster.workers(loss.role)}
            self._cluster.process(loss.role).send_signal(loss.number)
            self.lost_at_s.append(time.monotonic())
            deadline = time.monotonic() + REJOIN_TIMEOUT_S
            while not self._is_whole(loss.role, before):
                if time.monotonic() > deadline:
                    self.failure = (
                        f"no new {loss.role} node within {REJOIN_TIMEOUT_S:g} s of {loss.number.name}"
                    )
                    return
                time.sleep(0.1)

    def _is_whole(self, role: str, before: set[str]) -> bool:
        rows = self._cluster.workers()
        is_new = all(row["id"] not in before for row in rows if row["role"] == role)
        return is_new and len(rows) == self._num_nodes and all(row["is_ready"] for row in rows)


def run(
    work_dir: Path,
    bodies: Sequence[dict[str, Any]],
    expected: Sequence[Answer],
    *,
    num_clients: int,
    leave: float,
    concurrency: int,
    faulty: str = "",
    losses: Sequence[Loss] = (),
    seed: int = 0,
    flags: Sequence[str] = (),
) -> Tally:
    """The disturbed run, and the comparison. The cluster's log stays in `work_dir`."""
    rng = random.Random(seed)
    wanted = [bodies[number % len(bodies)] for number in range(num_clients)]
    leaving = [
        Leaving(
            rng.randrange(0, body["max_tokens"] * body["n"]),
            rng.choice((0.0, 0.02, 0.3, 30.0)) * rng.random(),
        )
        if rng.random() < leave
        else None
        for body in wanted
    ]
    arguments = [str(SHIPPED_MODEL), *FLAGS, *(["--faulty", faulty] if faulty else []), *flags]
    tally = Tally()
    log_path = work_dir / "disturbed.log"
    with LocalCluster(arguments, log_path=log_path) as cluster:
        losing = LosingNodes(cluster, losses)
        losing.start()
        started_s = time.monotonic()
        asked = asyncio.run(ask_all(cluster.url, wanted, leaving, concurrency, losing.is_alive))
        tally.duration_s = time.monotonic() - started_s
        losing.join()
        tally.num_asked = len(asked)
        tally.under_way = under_way(asked, losing.lost_at_s)
        tally.most_outlived = most_outlived(asked, losing.lost_at_s)
        if losing.failure:
            tally.failures.append(losing.failure)
        if 0 in tally.under_way:
            tally.failures.append(f"nothing was being answered at loss {tally.under_way.index(0) + 1}")
        compare(asked, leaving, expected, tally)
        try:
            cluster.wait_idle(timeout_s=IDLE_TIMEOUT_S)
            cluster.flush()
        except (TimeoutError, AssertionError) as error:
            tally.failures.append(f"not everything was given back: {error}")
        (prefill, *_) = cluster.workers("prefill")
        metrics: str = cluster.get("/metrics", prefill["url"])
        rooms = re.findall(r'pd_rooms_total\{.*outcome="(\w+)".*\} (\S+)', metrics)
        tally.rooms.update({outcome: int(float(value)) for outcome, value in rooms})
        metrics = cluster.get("/metrics")
        attempts = re.findall(r'pd_router_attempts_total\{.*code="(\w+)".*\} (\S+)', metrics)
        tally.attempts.update({outcome: int(float(value)) for outcome, value in attempts})
    log = log_path.read_text()
    tally.faults.update(_FAULT.findall(log))
    if "Traceback" in log:
        tally.failures.append(f"a traceback in {log_path}")
    return tally


def compare(
    asked: Sequence[Asked], leaving: Sequence[Leaving | None], expected: Sequence[Answer], tally: Tally
) -> None:
    for one in asked:
        right = expected[one.client % len(expected)]
        if one.end == "left" and leaving[one.client] is not None:
            tally.num_left += 1
            tally.num_early += one.answer.num_tokens == 0
            for choice, ids in one.answer.token_ids.items():
                if right.token_ids[choice][: len(ids)] != ids:
                    tally.failures.append(f"client {one.client}, who left, had seen other tokens")
        elif one.end != "done":
            tally.failures.append(f"client {one.client}: {one.end}")
        elif one.answer != right:
            tally.failures.append(f"client {one.client}: {one.answer} instead of {right}")
        else:
            tally.num_equal += 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=400, metavar="N")
    parser.add_argument(
        "--leave", type=float, default=0.0, metavar="SHARE", help="of the clients (default: 0)"
    )
    parser.add_argument(
        "--concurrency", type=int, default=256, metavar="N", help="clients at a time (default: 256)"
    )
    parser.add_argument("--faulty", default="", metavar="PLAN", help="see docs/handoff_protocol.md")
    parser.add_argument(
        "--tokens", type=int, default=0, metavar="N", help="of every answer (default: 2 to 40)"
    )
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="of the decode node, with SIGKILL")
    parser.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="rounds of SIGTERM to every node"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", default="", metavar="DIR", help="where the clusters' logs are kept")
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = Path(options.log_dir or temporary)
        work_dir.mkdir(parents=True, exist_ok=True)
        bodies = make_bodies(options.seed, options.tokens)[: options.clients]
        tally = run(
            work_dir,
            bodies,
            undisturbed_answers(work_dir, bodies, flags),
            num_clients=options.clients,
            leave=options.leave,
            concurrency=options.concurrency,
            faulty=options.faulty,
            losses=planned_losses(options.kills, options.restarts),
            seed=options.seed,
            flags=flags,
        )
    for failure in tally.failures[:20]:
        print(failure[:1000], file=sys.stderr)
    print(f"rooms {dict(tally.rooms)}, attempts {dict(tally.attempts)}, faults {dict(tally.faults)}")
    if tally.under_way:
        print(
            f"{len(tally.under_way)} nodes lost, {min(tally.under_way)} to {max(tally.under_way)} answers "
            f"under way at each; one outlived {tally.most_outlived} of them"
        )
    print(
        f"{tally.duration_s:.0f} s ASKED {tally.num_asked} EQUAL {tally.num_equal} LEFT {tally.num_left} "
        f"({tally.num_early} before the first token) FAILURES {len(tally.failures)}"
    )
    return 1 if tally.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
