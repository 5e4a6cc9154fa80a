"""What another host can do to a cluster: tried, from a second network namespace, against three clusters.

    scripts/dev second_host      # as root: `ip netns` makes the hosts, and takes them away at the end

1. with a cluster secret, which the other host does not have, on an address that it reaches;
2. without a secret, so on loopback alone;
3. with --insecure-cluster, where what is tried must work: an attempt that never does would show nothing.

Each attempt is made as whoever has no key and as a client with an ordinary API key. Prints a Markdown table;
the exit status is 1 when something got in that should not, or when an attempt got in nowhere, 77 when nothing
was tried.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, TypeAlias
from urllib.parse import quote, urlsplit

import msgspec
import psutil
import zmq

from pdserve.messages.channel import ClientChannel, ServerChannel
from pdserve.messages.link_guard import LinkKeys
from pdserve.messages.malformed import MalformedMessage
from pdserve.messages.node import (
    AttemptFailed,
    ClientToNode,
    GenerateRequest,
    NodeEntry,
    NodeLoad,
    NodeToClient,
    Ping,
    Pong,
    TokenOutputs,
)
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.weights import (
    CommitWeights,
    FromDisk,
    OpenWeights,
    PrepareWeights,
    ReadWeights,
    WeightBytesReply,
    WeightImageReply,
)
from pdserve.messages.work import Work
from pdserve.runtime.cluster_secret import SECRET_VARIABLE, new_secret
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.direct_http import open_url
from pdserve.runtime.process import end

Case: TypeAlias = Literal["secret", "loopback", "insecure"]
CASES: Mapping[Case, str] = {
    "secret": "with a cluster secret",
    "loopback": "without one",
    "insecure": "with --insecure-cluster",
}
CLIENT_KEY, ADMIN_KEY = "a-client", "the-operator"
ADDRESSES = ("10.203.77.1", "10.203.77.2")  # of the host with the cluster, of the other one
SKIPPED = 77
NUM_MADE_UP = 3000
REPLY_S = 3.0
READY_S = 240.0
WEIGHTS_S = 60.0
OPEN = "**got in**"


# ---- two hosts ------------------------------------------------------------------------------------------


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces with a cable between them. They go with the block."""
    names = (f"pdserve-{os.getpid()}-a", f"pdserve-{os.getpid()}-b")
    with ExitStack() as undo:
        for name in names:
            ip("netns", "add", name)
            undo.callback(ip, "netns", "del", name)  # and its end of the cable
        ends = (f"pda{os.getpid()}", f"pdb{os.getpid()}")
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", ends[1], "netns", names[1])
        for name, cable, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names


def on_host(name: str, *arguments: str) -> list[str]:
    """The command line of this script in another role, on one of the hosts."""
    return ["ip", "netns", "exec", name, sys.executable, "-P", str(Path(__file__).resolve()), *arguments]


def environment(**more: str) -> dict[str, str]:
    """Ours, without any secret that it holds."""
    return {**{name: value for name, value in os.environ.items() if name != SECRET_VARIABLE}, **more}


# ---- the host with the cluster --------------------------------------------------------------------------


class Facts(msgspec.Struct):
    """What the other host is told of the cluster; it could find out most of it by itself."""

    router: str  # URL
    nodes: list[NodeEntry]
    ports: list[int]  # that somebody listens on, whatever the address


def run_cluster(case: Case) -> int:
    """Prints the facts on one line, and ends the cluster when its standard input ends."""
    host = "127.0.0.1" if case == "loopback" else ADDRESSES[0]
    router = f"http://{host}:8000"
    keys = ["--api-key", CLIENT_KEY, "--admin-api-key", ADMIN_KEY] if case == "secret" else []
    flags = [str(SHIPPED_MODEL), "--host", host, *keys]
    if case == "insecure":
        flags.append("--insecure-cluster")
    roles = {"router": [], "prefill": ["--router", router], "decode": ["--router", router]}
    processes = []
    try:
        for role, more in roles.items():
            pool = [] if role == "router" else ["--kv-cache-gb", "0.05", "--num-threads", "1"]
            command = [sys.executable, "-P", "-m", "pdserve", role, *flags, *more, *pool]
            processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr))
        facts = wait_for_facts(router, ADMIN_KEY, processes)
        print(msgspec.json.encode(facts).decode(), flush=True)
        sys.stdin.read()
    finally:
        for process in reversed(processes):
            end(process, grace_s=10.0)
    return 0


def wait_for_facts(router: str, key: str, processes: Sequence[subprocess.Popen[bytes]]) -> Facts:
    deadline = time.monotonic() + READY_S
    while http_call("GET", f"{router}/ready").status != 200:
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            raise SystemExit("the cluster did not start; its log is above")
        time.sleep(0.2)
    rows = http_call("GET", f"{router}/workers", key=key).json()["workers"]
    infos = [http_call("GET", f"{row['url']}/server_info", key=key).json() for row in rows]
    listening = {
        entry.laddr.port
        for entry in psutil.net_connections("tcp")
        if entry.status == psutil.CONN_LISTEN and entry.laddr
    }
    nodes = [msgspec.convert(info["entry"], NodeEntry) for info in infos]
    return Facts(router=router, nodes=nodes, ports=sorted(listening))


# ---- HTTP ------------------------------------------------------------------------------------------------


class HttpOutcome(msgspec.Struct):
    status: int  # 0: nobody answered
    body: bytes = b""
    reason: str = ""

    @property
    def is_good(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> Any:  # noqa: ANN401  JSON is what it is
        return json.loads(self.body)

    def __str__(self) -> str:
        return f"HTTP {self.status}" if self.status else f"unreachable ({self.reason})"


def http_call(method: str, url: str, body: object = None, key: str = "") -> HttpOutcome:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with open_url(request, 30.0) as response:
            return HttpOutcome(response.status, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return HttpOutcome(error.code, error.read())
    except urllib.error.URLError as error:
        return HttpOutcome(0, reason=_short(error.reason))
    except (OSError, http.client.HTTPException) as error:
        return HttpOutcome(0, reason=_short(error))


def _short(reason: object) -> str:
    return (reason.strerror or str(reason)).lower() if isinstance(reason, OSError) else str(reason)


# ---- the other host --------------------------------------------------------------------------------------


class Row(msgspec.Struct):
    """What came of one attempt."""

    attempt: str
    who: str
    outcome: str
    got_in: bool
    opens: bool = True  # on a cluster that is open to all
    is_guarded: bool = True  # by the cluster itself, not by the network alone


class Attacker:
    """Knows the facts, this code, the model's files and, as a client, an ordinary API key."""

    def __init__(self, facts: Facts, key: str) -> None:
        self._facts = facts
        self._router = _seen_from_here(facts.router)
        self._key = key
        self._who = "client" if key else "stranger"
        self._rows: list[Row] = []

    def rows(self) -> list[Row]:
        """In an order in which none spoils a later one for an open cluster."""
        links = [] if self._key else answering_links(self._facts.ports)  # zmq knows no keys
        if not self._key:
            self._over_zmq("generate", links, _generates)
            self._over_zmq("read the weights", links, _reads_weights)
            self._reaches_transfer_engines()
        self._reads_prompts()
        self._is_fetched()
        self._odd_urls()
        self._admin_routes()
        self._many_made_up_nodes()
        if not self._key:
            self._over_zmq("prepare and commit other weights", links, _replaces_weights)
        self._removes_a_node()
        return self._rows

    def _tell(
        self, attempt: str, outcome: object, got_in: bool, *, opens: bool = True, is_guarded: bool = True
    ) -> None:
        self._rows.append(Row(attempt, self._who, str(outcome), got_in, opens, is_guarded))

    def _call(self, method: str, path: str, body: object = None) -> HttpOutcome:
        return http_call(method, self._router + path, body, self._key)

    def _node(self, role: str) -> NodeEntry:
        return next(node for node in self._facts.nodes if node.role == role)

    # ---- registration and removal ----

    def _reads_prompts(self) -> None:
        """A decode node of ours that claims to do everything itself, and answers pings."""
        with FakeNode(self._node("decode")) as fake:
            outcome = self._call("POST", "/workers", {"url": fake.entry.url, "entry": _built(fake.entry)})
            self._tell("register a made-up decode node", outcome, outcome.is_good)
            if outcome.is_good:
                time.sleep(3.0)  # the router greets it
            for number in range(8):
                self._call("POST", "/v1/completions", {"prompt": f"number {number}", "max_tokens": 2})
            what = f"{fake.num_prompts} of 8" if fake.num_prompts else str(outcome)
            self._tell("be given others' prompts", what, fake.num_prompts > 0)
            self._call("DELETE", f"/workers/{quote(fake.entry.url, safe='')}")

    def _is_fetched(self) -> None:
        """A URL of ours: is it asked, and with which key?"""
        with Listener() as listener:
            outcome = self._call("POST", "/workers", {"url": listener.url})
            if outcome.is_good:
                time.sleep(3.0)
            asked, keys = len(listener.paths), [key for key in listener.keys if key]
            self._tell(
                "have the router ask a URL of ours", f"asked {asked} times" if asked else outcome, asked > 0
            )
            self._tell(
                "be shown a key there", f"{len(keys)} times" if keys else outcome, bool(keys), opens=False
            )

    def _odd_urls(self) -> None:
        odd = [
            "http://127.0.0.1:22",
            "file:///etc/passwd",
            "http://user:pw@127.0.0.1:1",
            "http://[",
            "gopher://h:1",
        ]
        odd += ["http://169.254.169.254/latest/meta-data", "no url", ""]
        outcomes = [self._call("POST", "/workers", {"url": url}) for url in odd]
        took = [url for url, outcome in zip(odd, outcomes, strict=True) if outcome.is_good]
        broke = [url for url, outcome in zip(odd, outcomes, strict=True) if outcome.status == 500]
        statuses = sorted({str(outcome) for outcome in outcomes})
        self._tell(f"{len(odd)} odd URLs to register", ", ".join(statuses), bool(took or broke), opens=False)

    def _many_made_up_nodes(self) -> None:
        real = self._node("decode")
        target = urlsplit(self._router)
        num_taken, last = 0, HttpOutcome(0)
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=30)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        for number in range(NUM_MADE_UP):
            url = f"http://{ADDRESSES[1]}:{10000 + number}"
            entry = msgspec.structs.replace(real, url=url, incarnation=f"made-up-{number}")
            try:
                connection.request(
                    "POST", "/workers", json.dumps({"url": url, "entry": _built(entry)}), headers
                )
                answer = connection.getresponse()
                last = HttpOutcome(answer.status, answer.read())
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                last = HttpOutcome(0, reason=_short(error))
                if not num_taken:
                    break  # it will not be reached by the others either
            num_taken += last.is_good
        connection.close()
        outcome = str(last)
        if num_taken:
            rows = self._call("GET", "/workers").json()["workers"]
            num_known = sum(urlsplit(row["url"]).hostname == ADDRESSES[1] for row in rows)
            outcome = f"{num_taken} taken, {num_known} known at the end"
        self._tell(f"register {NUM_MADE_UP} made-up nodes", outcome, num_taken > 0)

    def _removes_a_node(self) -> None:
        outcome = self._call("DELETE", f"/workers/{quote(self._node('prefill').url, safe='')}")
        self._tell("take a real node out", outcome, outcome.is_good)

    # ---- admin routes ----

    def _admin_routes(self) -> None:
        """Of the router and of each node."""
        weights = {"model_path": str(SHIPPED_MODEL)}
        calls: Sequence[tuple[str, str, object]] = (
            ("POST", "/update_weights_from_disk", weights),
            ("POST", "/get_weights_by_name", {"name": "model.norm.weight"}),
            ("POST", "/abort_request", {"abort_all": True}),
            ("POST", "/assert_peer_death", {"incarnation": self._node("prefill").incarnation}),
        )
        places = [self._router, *(_seen_from_here(node.url) for node in self._facts.nodes)]
        outcomes = [
            http_call(method, place + path, body, self._key)
            for place in places
            for method, path, body in calls
        ]
        statuses = ", ".join(sorted({str(outcome) for outcome in outcomes}))
        self._tell(
            f"{len(calls)} admin routes of router and nodes",
            statuses,
            any(outcome.is_good for outcome in outcomes),
            opens=False,
        )

    # ---- zmq, and what else listens ----

    def _over_zmq(self, what: str, links: Sequence[OpenLink], attempt: Callable[[Link], str]) -> None:
        said = [words for port, keys in links if (words := with_link(port, keys, attempt))]
        none = f"none of {len(self._facts.ports)} ports answers"
        self._tell(f"{what} over zmq", f"{said[0]} ({len(said)} sockets)" if said else none, bool(said))

    def _reaches_transfer_engines(self) -> None:
        known = {
            urlsplit(url).port for url in (self._facts.router, *(node.url for node in self._facts.nodes))
        }
        known |= {urlsplit(node.zmq_address).port for node in self._facts.nodes}
        others = [port for port in self._facts.ports if port not in known]
        num_open = sum(_takes_connection(port) for port in others)
        outcome = f"{num_open} of {len(others)} ports take a connection"
        self._tell("reach Mooncake's ports", outcome, num_open > 0, is_guarded=False)


def _built(entry: NodeEntry) -> object:
    return msgspec.to_builtins(entry)


def _seen_from_here(url: str) -> str:
    """What listens on that host's loopback is tried at its address."""
    return f"http://{ADDRESSES[0]}:{urlsplit(url).port}"


def _takes_connection(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(REPLY_S)
        return probe.connect_ex((ADDRESSES[0], port)) == 0


Link: TypeAlias = ClientChannel[NodeToClient]
OpenLink: TypeAlias = tuple[int, LinkKeys | None]  # port, and the keys that it takes


def answering_links(ports: Sequence[int]) -> list[OpenLink]:
    """Ports where a ping is answered, in the clear or under a secret of our own."""

    def answers(link: Link) -> str:
        link.send(Ping(call_id=1))
        return "pong" if isinstance(next_message(link, REPLY_S), Pong) else ""

    choices = [(port, keys) for port in ports for keys in (None, LinkKeys.of(new_secret()))]
    return [(port, keys) for port, keys in choices if with_link(port, keys, answers)]


def with_link(port: int, keys: LinkKeys | None, attempt: Callable[[Link], str]) -> str:
    """What the attempt says on a link to this port; empty when it comes to nothing."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link: Link = ClientChannel(context, f"tcp://{ADDRESSES[0]}:{port}", NodeToClient, keys=keys)
    try:
        return attempt(link)
    finally:
        link.close()
        context.destroy(linger=0)


def next_message(link: Link, timeout_s: float) -> NodeToClient | MalformedMessage | None:
    """None when none comes in time, or the link is lost."""
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0 and not link.lost:
        for message in link.receive():
            return message
        link.socket.poll(int(1000 * min(left, 0.1)) + 1)
    return None


def _generates(link: Link) -> str:
    request = GenerateRequest(
        request_id="stranger",
        attempt=1,
        work=Work(prompt_ids=(1, 2, 3), choices=(0,), sampling=SamplingParams(max_tokens=2, ignore_eos=True)),
        prefill_incarnation="",
        deadline_s=30.0,
    )
    link.send(request)
    reply = next_message(link, 30.0)
    return "tokens came" if isinstance(reply, TokenOutputs) else ""


def _reads_weights(link: Link) -> str:
    link.send(OpenWeights(call_id=2))
    image = next_message(link, WEIGHTS_S)
    if not isinstance(image, WeightImageReply) or not image.success:
        return ""
    num_bytes = min(image.num_bytes, 1 << 20)
    link.send(ReadWeights(call_id=3, image=image.image, offset=0, num_bytes=num_bytes))
    part = next_message(link, WEIGHTS_S)
    return "they came" if isinstance(part, WeightBytesReply) and part.data else ""


def _replaces_weights(link: Link) -> str:
    source = FromDisk(model_path=str(SHIPPED_MODEL))
    link.send(PrepareWeights(call_id=2, update_id="strange", source=source, weight_version="strange"))
    prepared = next_message(link, WEIGHTS_S)
    if not getattr(prepared, "success", False):
        return ""
    link.send(CommitWeights(call_id=3, update_id="strange"))
    committed = next_message(link, WEIGHTS_S)
    return "they serve" if getattr(committed, "success", False) else ""


class FakeNode:
    """Says that it is a decode node like `real` that prefills by itself; keeps no promise."""

    def __init__(self, real: NodeEntry) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._server: ServerChannel[ClientToNode] = ServerChannel(
            self._context, ADDRESSES[1], 0, ClientToNode, keys=None
        )
        self.entry = msgspec.structs.replace(
            real,
            url=f"http://{ADDRESSES[1]}:9999",
            incarnation="made-up",
            zmq_address=f"tcp://{ADDRESSES[1]}:{self._server.port}",
            colocated=True,
        )
        self.num_prompts = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> FakeNode:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._server.close()
        self._context.destroy(linger=0)

    def _serve(self) -> None:
        while not self._stop.is_set():
            self._server.socket.poll(20)
            for link, message in self._server.receive():
                match message:
                    case Ping(call_id=call_id):
                        load = NodeLoad(
                            max_running_requests=64, num_free_pages=1000, num_total_pages=1000, page_size=16
                        )
                        pong = Pong(
                            call_id=call_id, entry=self.entry, load=load, ready_peers=(), refused_peers={}
                        )
                        self._server.send(link, pong)
                    case GenerateRequest(request_id=request_id, attempt=attempt):
                        self.num_prompts += 1
                        failed = AttemptFailed(
                            request_id=request_id,
                            attempt=attempt,
                            code="busy",
                            reason="read it",
                            retriable=True,
                        )
                        self._server.send(link, failed)
                    case _:
                        pass


class Listener:
    """Writes down who asks, and which key is shown."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                listener.paths.append(self.path)
                listener.keys.append(self.headers["Authorization"])
                self.send_error(404)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((ADDRESSES[1], 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.url = f"http://{ADDRESSES[1]}:{self._server.server_address[1]}"

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


# ---- all of it --------------------------------------------------------------------------------------------


def try_case(case: Case, hosts: tuple[str, str], log: Path) -> list[Row]:
    print(f"second_host: a cluster {CASES[case]}", file=sys.stderr, flush=True)
    secret = {SECRET_VARIABLE: new_secret()} if case == "secret" else {}
    with (
        log.open("wb") as out,
        subprocess.Popen(
            on_host(hosts[0], "--cluster", case),
            env=environment(**secret),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
        ) as cluster,
    ):
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        try:
            facts = cluster.stdout.readline()
            if not facts:
                raise SystemExit(f"{CASES[case]}: {log.read_text()[-3000:]}")
            attacker = subprocess.run(
                on_host(hosts[1], "--attack", case),
                env=environment(),
                input=facts,
                stdout=subprocess.PIPE,
                check=True,
            )
        finally:
            cluster.stdin.close()
            cluster.wait(60)
    rows = msgspec.json.decode(attacker.stdout, type=list[Row])
    return [*rows, *map(listens_openly, hosts[:1])] if case == "loopback" else rows


def listens_openly(host: str) -> Row:
    """An operator who forgets the secret, on an address that others reach."""
    arguments = [sys.executable, "-P", "-m", "pdserve", "decode", "--host", ADDRESSES[0], "--port", "0"]
    done = subprocess.run(
        ["ip", "netns", "exec", host, *arguments],
        env=environment(),
        capture_output=True,
        timeout=READY_S,
        check=False,
    )
    outcome = f"exit status {done.returncode}"
    return Row("start a node on that address", "operator", outcome, done.returncode == 0, opens=False)


def attack(case: Case) -> int:
    logging.getLogger("pdserve").setLevel(logging.ERROR)  # a link that fails is what is tried
    facts = msgspec.json.decode(sys.stdin.buffer.readline(), type=Facts)
    keys = ("", CLIENT_KEY) if case == "secret" else ("",)
    rows = [row for key in keys for row in Attacker(facts, key).rows()]
    print(msgspec.json.encode(rows).decode())
    return 0


def report(found: Mapping[Case, list[Row]]) -> int:
    """Prints the table; the exit status."""
    attempts = list(dict.fromkeys((row.attempt, row.who) for rows in found.values() for row in rows))
    print(f"| from another host | as | {' | '.join(CASES[case] for case in found)} |")
    print("|---|---|" + "---|" * len(found))
    faults = []
    for attempt, who in attempts:
        cells = []
        for case, rows in found.items():
            # Where there are no keys, a client is a stranger.
            row = next((r for r in rows if (r.attempt, r.who) == (attempt, who)), None)
            cells.append("" if row is None else f"{OPEN}: {row.outcome}" if row.got_in else row.outcome)
            if row is not None and row.got_in and row.is_guarded and case != "insecure":
                faults.append(f"{attempt}, as a {who}, {CASES[case]}: {row.outcome}")
        print(f"| {attempt} | {who} | {' | '.join(cells)} |")
    for row in found.get("insecure", ()):
        if row.opens and not row.got_in:
            faults.append(f"{row.attempt}: does not even get into an open cluster: {row.outcome}")
    print("\n" + ("\n".join(faults) or "Nothing got in that should not."))
    return 1 if faults else 0


def why_not_here() -> str:
    """Why this machine cannot show anything; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    try:
        with two_hosts():
            return ""
    except FileNotFoundError:
        return "`ip` is not installed: apt-get install iproute2"
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made here: {error.stderr.strip()}"


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise SystemExit(128 + number)  # through every `with` and `finally`


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one of the clusters")
    parser.add_argument("--cluster", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--attack", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    if options.cluster:
        return run_cluster(options.cluster)
    if options.attack:
        return attack(options.attack)
    if reason := why_not_here():
        print(f"second_host: nothing was tried: {reason}", file=sys.stderr)
        return SKIPPED
    with two_hosts() as hosts, tempfile.TemporaryDirectory(prefix="pdserve-hosts-") as folder:
        os.chdir(folder)
        cases = (options.only,) if options.only else tuple(CASES)
        found = {case: try_case(case, hosts, Path(folder) / case) for case in cases}
    return report(found)


if __name__ == "__main__":
    sys.exit(main())
