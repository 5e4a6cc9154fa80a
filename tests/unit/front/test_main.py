from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import zmq.asyncio
from aiohttp import web

from pdserve.api.generation import AdminReply
from pdserve.front.main import serve_node_front
from pdserve.front.registrar import Registrar
from pdserve.links.entry_lookup import HttpEntryLookup, NoNodeError
from pdserve.messages.link_guard import LinkKeys
from pdserve.messages.node import (
    AssertPeerDeath,
    FlushCache,
    Ping,
)
from pdserve.messages.operation import CloseSession, PauseGeneration, SlowDown
from pdserve.messages.weights import CommitWeights, DiscardWeights, FromTensors, PrepareWeights, StageWeights
from pdserve.runtime.process import NO_KEYS, AccessKeys
from pdserve.runtime.timing import UNSCALED
from pdserve.runtime.tls import SYSTEM_TRUST, TlsFiles, Trust
from pdserve.tests.certificates import Certificates
from pdserve.tests.deadline import DEADLINE_S
from pdserve.tests.unit.api.conftest import Api, eventually
from pdserve.tests.unit.api.fakes import ENTRY
from pdserve.tests.unit.api.scheduler import FakeScheduler

QUICK = replace(
    UNSCALED,
    front_ping_interval_s=0.02,
    front_ping_timeout_s=0.2,
    front_reconnect_s=0.02,
    scheduler_gone_s=0.1,
)


@dataclass
class Front:
    url: str
    scheduler: FakeScheduler
    http: aiohttp.ClientSession
    stop: asyncio.Event
    task: asyncio.Task[None]
    node_goes_on: asyncio.Event

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(self.url + path) as answer:
            return answer.status, await answer.json()

    async def post(self, path: str, body: object) -> tuple[int, Any]:
        async with self.http.post(self.url + path, json=body) as answer:
            return answer.status, await answer.json()

    async def answers(self, path: str, status: int) -> Any:  # noqa: ANN401  JSON is what it is
        """Its first answer of this status."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                given, answer = await self.get(path)
                if given == status:
                    return answer
                await asyncio.sleep(0.005)

    async def pings(self, num_more: int) -> None:
        """It has asked its scheduler so many times from now on, and is done with all but the last."""
        num_before = self._num_pings()
        await eventually(lambda: self._num_pings() >= num_before + num_more)

    def _num_pings(self) -> int:
        return sum(isinstance(message, Ping) for message in self.scheduler.received)


@pytest_asyncio.fixture
async def front(api: Api) -> AsyncIterator[Front]:
    """A node front registered with the router that ``api`` is."""
    context = zmq.asyncio.Context()
    scheduler = FakeScheduler(context)
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    stop, node_goes_on = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(
        serve_node_front(
            zmq_address=scheduler.address,
            listener=listener,
            url=url,
            router_urls=[f"{api.url}/"],
            timing=QUICK,
            stop=stop,
            node_ends=lambda: not node_goes_on.is_set(),
        )
    )
    async with aiohttp.ClientSession() as http:
        front = Front(url, scheduler, http, stop, task, node_goes_on)
        await front.answers("/health", 200)
        yield front
    stop.set()
    await asyncio.wait_for(task, DEADLINE_S)
    await scheduler.close()
    context.destroy(linger=0)


async def test_it_registers_while_the_scheduler_answers(api: Api, front: Front) -> None:
    await eventually(lambda: len(api.admin.calls) >= 2)
    kind, url, entry = api.admin.calls[0]
    assert (kind, url, entry.url, entry.incarnation) == ("register", front.url, front.url, "d-1")
    front.scheduler.is_silent = True
    await front.pings(2)
    num_calls = len(api.admin.calls)
    await front.pings(2)
    assert len(api.admin.calls) == num_calls
    await front.answers("/health", 503)
    assert (await front.get("/live"))[0] == 200
    front.scheduler.is_silent = False
    await eventually(lambda: len(api.admin.calls) > num_calls)
    front.stop.set()
    await asyncio.wait_for(front.task, DEADLINE_S)
    assert api.admin.calls[-1] == ("remove", front.url)


async def test_a_front_that_ends_alone_leaves_its_node_where_it_is(api: Api, front: Front) -> None:
    """Routers take no more registrations of who has left."""
    front.node_goes_on.set()
    front.stop.set()
    await asyncio.wait_for(front.task, DEADLINE_S)
    assert {kind for kind, *_ in api.admin.calls} == {"register"}


async def test_a_draining_node_does_not_renew_its_lease(api: Api, front: Front) -> None:
    front.scheduler.is_draining = True
    await front.pings(2)
    num_calls = len(api.admin.calls)
    await front.pings(5)
    assert len(api.admin.calls) == num_calls
    assert (await front.answers("/ready", 503))["error"]["code"] == "draining"
    await front.answers("/health", 200)


async def test_f3_a_node_that_cannot_register_says_why(
    api: Api, front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    await front.answers("/ready", 200)
    api.admin.reply = AdminReply(False, "it does not fit")
    num_calls = len(api.admin.calls)
    await eventually(lambda: len(api.admin.calls) >= num_calls + 5)
    answer = await front.answers("/ready", 503)
    assert answer["error"]["code"] == "not_registered"
    assert f"No router has this node: {api.url}: 400: " in answer["error"]["message"]
    assert "it does not fit" in answer["error"]["message"]
    await front.answers("/health", 200)
    warnings = [message for message in caplog.messages if message.startswith("registration with ")]
    assert len(warnings) == 1, "at once, and then rarely"
    api.admin.reply = AdminReply(True)
    num_calls = len(api.admin.calls)
    await eventually(lambda: len(api.admin.calls) >= num_calls + 2)
    await front.answers("/ready", 200)


async def test_f3_nobody_at_the_router_s_url_is_said_at_once(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    registrar = Registrar("http://node", [url], NO_KEYS, UNSCALED)
    assert registrar.problem == f"{url}: it was not asked yet"
    await registrar.renew(ENTRY)
    await registrar.renew(ENTRY)
    assert f"{url}: ClientConnectorError: Cannot connect to host 127.0.0.1" in registrar.problem
    (warning,) = caplog.messages
    assert warning.startswith(f"registration with {url} failed, it is tried each second: ClientConn")
    await registrar.leave()
    await registrar.close()


async def test_a_router_that_had_the_node_may_be_away_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    """It is started again, or the cluster ends: nobody has to read of that."""
    now = 0.0

    async def register(_: web.Request) -> web.Response:
        return web.json_response({})

    app = web.Application()
    app.router.add_post("/workers", register)
    router = web.AppRunner(app)
    await router.setup()
    await web.TCPSite(router, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{router.addresses[0][1]}"
    registrar = Registrar("http://node", [url], NO_KEYS, UNSCALED, clock=lambda: now)
    await registrar.renew(ENTRY)
    assert registrar.problem == ""
    await router.cleanup()
    now = 4.9
    await registrar.renew(ENTRY)
    assert registrar.problem
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    now = 5.1
    await registrar.renew(ENTRY)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"registration with {url} failed")
    await registrar.close()


async def test_it_ends_with_its_scheduler(front: Front) -> None:
    await front.scheduler.close()
    await asyncio.wait_for(front.task, DEADLINE_S)


async def test_a_bug_in_its_own_loop_ends_it_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    async def renew(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Registrar, "renew", renew)
    context = zmq.asyncio.Context()
    scheduler = FakeScheduler(context)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = serve_node_front(zmq_address=scheduler.address, listener=listener, url="http://h:1")
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(serving, DEADLINE_S)
    await scheduler.close()
    context.destroy(linger=0)


async def test_it_says_who_it_is_and_proves_it(front: Front) -> None:
    """To anybody who asks: without a key, and for a nonce that cannot be read in two ways."""
    assert (await front.get("/node_entry"))[1]["url"] == front.url
    entry = await HttpEntryLookup(UNSCALED)(front.url)
    assert (entry.url, entry.incarnation, entry.zmq_address) == (front.url, "d-1", front.scheduler.address)
    for bad in ("short", "n" * 257, "n" * 16 + "%0A"):
        status, answer = await front.get(f"/node_entry?nonce={bad}")
        assert (status, answer["error"]["param"]) == (400, "nonce")
    with pytest.raises(NoNodeError, match="does not prove this cluster's secret"):
        await HttpEntryLookup(UNSCALED, "s" * 32)(front.url)


async def test_a_node_with_a_secret_proves_it_and_hides_the_rest() -> None:
    """Its scheduler's link is CURVE too."""
    keys = AccessKeys(("k1",), cluster_secret="s" * 32)
    context = zmq.asyncio.Context()
    scheduler = FakeScheduler(context, LinkKeys.of(keys.cluster_secret))
    stop = asyncio.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        serving = serve_node_front(
            zmq_address=scheduler.address, listener=listener, url=url, keys=keys, stop=stop
        )
        task = asyncio.create_task(serving)
        async with asyncio.timeout(DEADLINE_S):
            entry = await HttpEntryLookup(UNSCALED, keys.cluster_secret)(url)
        assert (entry.url, entry.incarnation) == (url, "d-1")
        with pytest.raises(NoNodeError, match="does not prove this cluster's secret"):
            await HttpEntryLookup(UNSCALED, "o" * 32)(url)
        async with aiohttp.ClientSession() as http, http.get(f"{url}/server_info") as answer:
            assert answer.status == 401
        stop.set()
        await asyncio.wait_for(task, DEADLINE_S)
    await scheduler.close()
    context.destroy(linger=0)


@pytest.mark.parametrize("keys", [AccessKeys(("k1",), "root", "s" * 32)])
async def test_a_node_of_another_secret_says_once_what_to_do(
    api: Api, keys: AccessKeys, caplog: pytest.LogCaptureFixture
) -> None:
    member = Registrar(ENTRY.url, [api.url], keys, UNSCALED)
    await member.renew(ENTRY)
    assert (member.problem, api.admin.calls) == ("", [("register", ENTRY.url, ENTRY)])
    await member.leave()
    await member.close()
    for stranger_keys in (AccessKeys(("k1",)), AccessKeys(("k1",), cluster_secret="o" * 32)):
        caplog.clear()
        stranger = Registrar(ENTRY.url, [api.url], stranger_keys, UNSCALED)
        for _ in range(3):
            await stranger.renew(ENTRY)
        (warning,) = caplog.messages
        assert f"registration with {api.url} failed, it is tried each second: 401: " in warning
        assert "with the same --cluster-secret-file FILE (or PDSERVE_CLUSTER_SECRET)" in warning
        assert "\n" not in warning
        await stranger.close()
    assert api.admin.calls == [("register", ENTRY.url, ENTRY), ("remove", ENTRY.url)]


async def test_facts(front: Front) -> None:
    _, info = await front.get("/server_info")
    assert info["zmq_address"] == front.scheduler.address
    assert (info["entry"]["url"], info["role"], info["disaggregation_mode"]) == (
        front.url,
        "decode",
        "decode",
    )
    assert (info["max_total_num_tokens"], info["max_running_requests"], info["page_size"]) == (160, 64, 16)
    assert (info["model"]["vocab_size"], info["served_model_name"]) == (404, "org/tiny")
    assert info["internal_states"][0]["num_running_reqs"] == 2
    assert (info["tp_size"], [rank["pid"] for rank in info["ranks"]]) == (2, [10, 11])
    assert (await front.get("/get_model_info"))[1]["model_type"] == "qwen3"
    assert (await front.get("/v1/models"))[1]["data"][0]["id"] == "org/tiny"
    assert (await front.get("/v1/models/org/tiny"))[1]["id"] == "org/tiny"
    assert (await front.get("/v1/models/org/other"))[1]["error"]["code"] == "model_not_found"
    assert (await front.get("/get_load"))[1][0]["num_reqs"] == 3
    assert (await front.get("/v1/loads"))[1]["loads"][0]["url"] == front.url
    assert (await front.get("/version"))[0] == 200
    async with front.http.get(f"{front.url}/metrics") as answer:
        text = await answer.text()
    assert text.startswith("pd_x 1\n"), "what the scheduler says"
    labels = 'endpoint="/version",method="GET",model_name="org/tiny",role="decode",status_code="200"'
    assert f"pd_http_responses_total{{{labels}}} 1.0" in text


async def test_requests(front: Front) -> None:
    assert (await front.get("/requests/known"))[1]["state"] == "decoding"
    status, answer = await front.get("/requests/other")
    assert (status, answer["error"]["code"]) == (404, "request_not_found")
    assert (await front.post("/abort_request", {"abort_all": True}))[1]["success"]
    assert (await front.post("/abort_request", {}))[0] == 400


async def test_assert_peer_death(front: Front) -> None:
    assert (await front.post("/assert_peer_death", {"incarnation": "P1"}))[0] == 200
    front.scheduler.outcome = lambda _: (False, "P1 is alive")
    assert await front.post("/assert_peer_death", {"incarnation": "P1"}) == (
        400,
        {"success": False, "message": "P1 is alive"},
    )
    sent = [message for message in front.scheduler.received if isinstance(message, AssertPeerDeath)]
    assert [message.incarnation for message in sent] == ["P1", "P1"]


async def test_close_session(front: Front) -> None:
    assert (await front.post("/close_session", {"session_id": "s"}))[0] == 200
    (sent,) = [message for message in front.scheduler.received if isinstance(message, CloseSession)]
    assert sent.session_id == "s"
    assert (await front.post("/close_session", {}))[0] == 400


async def test_flush(front: Front) -> None:
    assert (await front.post("/flush_cache?timeout=1", {}))[0] == 200
    front.scheduler.outcome = lambda _: (False, "busy")
    assert await front.post("/flush_cache", {}) == (400, {"success": False, "message": "busy"})
    sent = [message for message in front.scheduler.received if isinstance(message, FlushCache)]
    assert [message.timeout_s for message in sent] == [1.0, 0.0]


async def test_an_operator_asks_one_node(front: Front) -> None:
    assert (await front.get("/get_internal_state"))[1]["settings"] == {"max_queued_prefills": 32}
    assert (await front.post("/slow_down", {"forward_sleep_time": 1}))[0] == 200
    sent = [message for message in front.scheduler.received if isinstance(message, SlowDown)]
    assert [message.forward_sleep_s for message in sent] == [1.0]
    front.scheduler.outcome = lambda _: (False, "a profile is running")
    assert (await front.post("/start_profile", {}))[0] == 400
    stopped = (await front.post("/stop_profile", {}))[1]
    assert stopped["traces"] == {front.url: ["/tmp/a.trace.json.gz"]}


async def test_one_node_is_paused(front: Front) -> None:
    assert (await front.post("/pause_generation", {"mode": "keep"}))[0] == 200
    assert (await front.post("/continue_generation", {}))[0] == 200
    status, answer = await front.post("/pause_generation", {"mode": "wait"})
    assert (status, "through the router" in answer["message"]) == (400, True)
    sent = [message for message in front.scheduler.received if isinstance(message, PauseGeneration)]
    assert [message.mode for message in sent] == ["in_place"]


def weight_messages(front: Front) -> list[object]:
    """Without the pings between them."""
    kinds = (StageWeights, PrepareWeights, CommitWeights, DiscardWeights)
    return [message for message in front.scheduler.received if isinstance(message, kinds)]


def kinds_of(messages: list[object]) -> list[type]:
    return [type(message) for message in messages]


async def test_one_node_alone_is_updated_only_by_force(front: Front) -> None:
    status, answer = await front.post("/update_weights_from_disk", {"model_path": "/new"})
    assert (status, answer["success"]) == (400, False)
    assert weight_messages(front) == []
    body = {"model_path": "/new", "weight_version": "8", "force": True}
    assert (await front.post("/update_weights_from_disk", body))[0] == 200
    assert kinds_of(weight_messages(front)) == [PrepareWeights, CommitWeights]


async def test_a_failed_update_is_discarded(front: Front) -> None:
    front.scheduler.outcome = lambda message: (not isinstance(message, CommitWeights), "not idle")
    body = {"model_path": "/new", "force": True}
    status, answer = await front.post("/update_weights_from_disk", body)
    assert (status, answer["message"]) == (400, "not idle")
    assert kinds_of(weight_messages(front)) == [PrepareWeights, CommitWeights, DiscardWeights]


async def test_tensors_for_one_node_alone(front: Front) -> None:
    body = (2).to_bytes(8, "little") + b"{}" + bytes(3)
    for query, status in (("", 400), ("?force=1&weight_version=8", 200)):
        async with front.http.post(f"{front.url}/update_weights_from_tensor{query}", data=body) as answer:
            assert answer.status == status, await answer.text()
    assert kinds_of(weight_messages(front)) == [StageWeights, PrepareWeights, CommitWeights]
    staged, prepared, _ = weight_messages(front)
    assert isinstance(staged, StageWeights)
    assert (staged.offset, staged.data) == (0, body)
    assert isinstance(prepared, PrepareWeights)
    assert (prepared.source, prepared.weight_version) == (FromTensors(num_bytes=13), "8")


async def test_weights_of_one_node_can_be_read_and_checked(front: Front) -> None:
    assert await front.get("/get_weights_by_name?name=t&truncate_size=2") == (200, [0.5, 0.5])
    status, answer = await front.post("/check_weights", {"action": "checksum"})
    assert (status, answer["success"]) == (200, True)
    assert answer["nodes"][front.url]["whole"] == "cd"


async def test_a_scheduler_that_does_not_answer_is_a_503(front: Front) -> None:
    await front.scheduler.close()
    status, answer = await front.get("/server_info")
    assert (status, answer["error"]["code"]) == (503, "node_unavailable")


async def test_a_node_registers_with_a_router_that_it_trusts(certificates: Certificates) -> None:
    async def register(_: web.Request) -> web.Response:
        return web.json_response({})

    app = web.Application()
    app.router.add_post("/workers", register)
    app.router.add_delete("/workers/{url:.*}", register)
    shown = certificates.issue("127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown.certfile, shown.keyfile)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    router = f"https://127.0.0.1:{runner.addresses[0][1]}"
    for trust, problem in (
        (Trust(TlsFiles(ca_certs=certificates.ca_certs)), ""),
        (SYSTEM_TRUST, "certificate verify failed"),
    ):
        registrar = Registrar("https://127.0.0.1:1", [router], NO_KEYS, UNSCALED, trust)
        await registrar.renew(ENTRY)
        assert problem in registrar.problem
        assert bool(registrar.problem) == bool(problem)
        await registrar.leave()
        await registrar.close()
    await runner.cleanup()
