"""Who may register and remove nodes, over real HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from pdserve.api.http.membership_guard import MembershipGuard, offered_nonce, proof_header
from pdserve.front.member_calls import MemberCalls, RouterAnswer
from pdserve.runtime.process import NO_KEYS, AccessKeys
from pdserve.runtime.timing import UNSCALED
from pdserve.tests.unit.api.conftest import Api
from pdserve.tests.unit.api.fakes import ENTRY

SECRET, OTHER = "s" * 32, "o" * 32
NODE = {"url": ENTRY.url, "entry": msgspec.structs.asdict(ENTRY)}
BODY = json.dumps(NODE).encode()
REMOVAL = f"/workers/{ENTRY.url}"
WITH_SECRET = [AccessKeys(("k1",), "root", SECRET)]
REGISTERED = ("register", ENTRY.url, ENTRY)


@dataclass(frozen=True)
class Answer:
    status: int
    code: str
    message: str
    nonce: str


async def ask(api: Api, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    async with api.http.request(method, f"{api.url}{quote(path)}", data=body, headers=headers) as answer:
        content: dict[str, Any] = await answer.json()
        error = content.get("error", {"code": "", "message": ""})
        return Answer(answer.status, error["code"], error["message"], offered_nonce(answer.headers))


async def prove(
    api: Api, method: str, path: str, body: bytes = b"", *, nonce: str, secret: str = SECRET
) -> Answer:
    header = proof_header(secret, nonce, method, path, body)
    return await ask(api, method, path, body, authorization=header)


def members_of(api: Api, keys: AccessKeys, root: str = "") -> MemberCalls:
    return MemberCalls(api.http, f"{api.url}{root}", keys)


# ---- with a secret --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", WITH_SECRET)
@pytest.mark.parametrize(
    "authorization", ["", "Bearer k1", "Bearer wrong", "Cluster-Secret x", f"Bearer {SECRET}"]
)
async def test_an_ordinary_key_neither_adds_nor_takes_away(api: Api, authorization: str) -> None:
    for method, path, body in (
        ("POST", "/workers", BODY),
        ("DELETE", REMOVAL, b""),
        ("DELETE", "/workers/p-1", b""),
    ):
        answer = await ask(api, method, path, body, authorization=authorization)
        assert (answer.status, answer.code) == (401, "not_of_this_cluster")
        assert "--cluster-secret-file FILE (or PDSERVE_CLUSTER_SECRET)" in answer.message
        assert answer.nonce
    assert api.admin.calls == []


@pytest.mark.parametrize("keys", WITH_SECRET)
async def test_the_admin_key_is_enough(api: Api) -> None:
    assert (await ask(api, "POST", "/workers", BODY, authorization="Bearer root")).status == 200
    assert (await ask(api, "DELETE", REMOVAL, authorization="Bearer root")).status == 200
    assert api.admin.calls == [REGISTERED, ("remove", ENTRY.url)]


@pytest.mark.parametrize("keys", WITH_SECRET)
async def test_who_is_known_still_needs_an_ordinary_key(api: Api) -> None:
    assert (await ask(api, "GET", "/workers")).code == "invalid_api_key"
    assert (await ask(api, "GET", "/workers", authorization="Bearer k1")).status == 200
    nonce = (await ask(api, "POST", "/workers", BODY)).nonce
    assert (await prove(api, "GET", "/workers", nonce=nonce)).code == "invalid_api_key"


@pytest.mark.parametrize("keys", WITH_SECRET)
async def test_a_proof_is_taken_once_and_brings_the_next_nonce(api: Api) -> None:
    first = (await ask(api, "POST", "/workers", BODY)).nonce
    answer = await prove(api, "POST", "/workers", BODY, nonce=first)
    assert (answer.status, api.admin.calls) == (200, [REGISTERED])
    replayed = await prove(api, "POST", "/workers", BODY, nonce=first)
    assert (replayed.status, "used before" in replayed.message) == (401, True)
    removed = await prove(api, "DELETE", REMOVAL, nonce=answer.nonce)
    assert (removed.status, api.admin.calls) == (200, [REGISTERED, ("remove", ENTRY.url)])


@pytest.mark.parametrize("keys", WITH_SECRET)
async def test_a_proof_is_not_for_another_request(api: Api) -> None:
    nonce = (await ask(api, "POST", "/workers", BODY)).nonce
    header = proof_header(SECRET, nonce, "POST", "/workers", BODY)
    altered = BODY.replace(b"8100", b"8101")
    for method, path, body in (
        ("POST", "/workers", altered),
        ("DELETE", REMOVAL, BODY),
        ("DELETE", REMOVAL, b""),
    ):
        answer = await ask(api, method, path, body, authorization=header)
        assert (answer.status, "no proof of this router's cluster secret" in answer.message) == (401, True)
    answer = await prove(api, "POST", "/workers", BODY, nonce=nonce, secret=OTHER)
    assert (answer.status, api.admin.calls) == (401, [])


@pytest.mark.parametrize("keys", WITH_SECRET)
async def test_a_body_that_is_no_registration_is_not_kept_in_memory(api: Api) -> None:
    assert (await ask(api, "POST", "/workers", b" " * 70_000)).status == 413


@pytest.mark.parametrize("keys", WITH_SECRET)
@pytest.mark.parametrize("root_path", ["/llm"])
@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_a_member_behind_a_proxy(api: Api, keys: AccessKeys, prefix: str) -> None:
    assert (await members_of(api, keys, prefix).ask("POST", "/workers", BODY)).problem == ""
    assert (await members_of(api, NO_KEYS, prefix).ask("POST", "/workers", BODY)).status == 401


class Trips(aiohttp.TraceConfig):
    """Counts the requests of a session."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0
        self.authorizations: list[str] = []
        self.on_request_start.append(self._count)

    async def _count(self, _: object, __: object, started: aiohttp.TraceRequestStartParams) -> None:
        self.num += 1
        self.authorizations.append(started.headers.get("authorization", ""))


@pytest.fixture
async def trips(api: Api) -> AsyncIterator[Trips]:
    """Of the session that members ask by."""
    trips = Trips()
    ordinary = api.http
    async with aiohttp.ClientSession(trace_configs=[trips]) as session:
        api.http = session
        yield trips
        api.http = ordinary


@pytest.mark.parametrize("keys", WITH_SECRET)
async def test_a_renewal_takes_one_trip_and_shows_no_key(api: Api, keys: AccessKeys, trips: Trips) -> None:
    member = members_of(api, keys)
    for _ in range(3):
        assert (await member.ask("POST", "/workers", BODY)).problem == ""
    assert trips.num == 4
    assert (await member.ask("DELETE", REMOVAL)).problem == ""
    assert trips.num == 5
    assert not any("Bearer" in sent or SECRET in sent for sent in trips.authorizations)
    assert api.admin.calls == [REGISTERED, REGISTERED, REGISTERED, ("remove", ENTRY.url)]


@pytest.mark.parametrize("keys", WITH_SECRET)
async def test_a_router_that_was_started_again_is_answered_anew(
    api: Api, keys: AccessKeys, trips: Trips
) -> None:
    member = members_of(api, keys)
    member._nonce = "of-the-router-before"
    assert (await member.ask("POST", "/workers", BODY)).problem == ""
    assert trips.num == 2


@pytest.mark.parametrize("keys", WITH_SECRET)
async def test_who_is_not_of_the_cluster_is_told_what_to_do(api: Api, trips: Trips) -> None:
    for other in (AccessKeys(cluster_secret=OTHER), NO_KEYS, AccessKeys(("k1",))):
        answer = await members_of(api, other).ask("POST", "/workers", BODY)
        assert answer.problem.startswith("401: ")
        assert "start" in answer.problem
        assert "--cluster-secret-file" in answer.problem
    assert (trips.num, api.admin.calls) == (4, [])


def test_a_refusal_is_told_in_its_own_words() -> None:
    assert (
        RouterAnswer(400, b'{"success":false,"message":"it does not fit"}').problem == "400: it does not fit"
    )
    assert RouterAnswer(503, b'{"error":{"message":"full"}}').problem == "503: full"
    assert RouterAnswer(502, b"<html>\n bad\xff gateway").problem == "502: <html> bad� gateway"
    assert RouterAnswer(307, b"").problem == "307: "
    assert RouterAnswer(200, b"whatever").problem == ""


# ---- without one ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [AccessKeys(("k1",)), AccessKeys(("k1",), "root"), AccessKeys((), "root")])
async def test_with_keys_and_no_secret_the_admin_key_alone_is_enough(api: Api, keys: AccessKeys) -> None:
    for header in ("", "Bearer k1"):
        answer = await ask(api, "POST", "/workers", BODY, authorization=header)
        assert (answer.status, answer.code) == (401, "not_of_this_cluster")
    problem = (await members_of(api, keys).ask("POST", "/workers", BODY)).problem
    assert problem.startswith(
        "" if keys.admin else "401: Nodes are registered and removed with the admin API key"
    )
    assert api.admin.calls == ([REGISTERED] if keys.admin else [])


async def test_with_neither_this_host_may(api: Api) -> None:
    assert (await members_of(api, NO_KEYS).ask("POST", "/workers", BODY)).problem == ""
    for name in ("origin", "via", "x-forwarded-for", "forwarded"):
        answer = await ask(api, "POST", "/workers", BODY, **{name: "127.0.0.1"})
        assert (answer.status, answer.code) == (403, "not_of_this_cluster")
    assert api.admin.calls == [REGISTERED]


@pytest.mark.parametrize(
    ("client", "status"),
    [
        (("127.0.0.1", 5), 200),
        (("::1", 5), 200),
        (("::ffff:127.0.0.1", 5), 200),
        (("10.0.0.9", 5), 403),
        (("::ffff:10.0.0.9", 5), 403),
        (("testclient", 5), 403),
        (None, 403),
    ],
)
async def test_with_neither_another_host_may_not(client: tuple[str, int] | None, status: int) -> None:
    async def handler(_: Request) -> Response:
        return PlainTextResponse("")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/workers",
        "headers": [],
        "client": client,
    }
    answer = await MembershipGuard(NO_KEYS, UNSCALED).guard(handler)(Request(scope, receive))
    assert answer.status_code == status


@pytest.mark.parametrize("is_open_cluster", [True])
@pytest.mark.parametrize("keys", [AccessKeys(("k1",))])
async def test_an_insecure_cluster_asks_for_no_more_than_a_key(api: Api, keys: AccessKeys) -> None:
    assert (await ask(api, "POST", "/workers", BODY)).code == "invalid_api_key"
    assert (await members_of(api, keys).ask("POST", "/workers", BODY)).problem == ""
    assert (await ask(api, "DELETE", REMOVAL, authorization="Bearer k1")).status == 200


# ---- bad URLs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://user:pw@h:1",
        "file:///etc/passwd",
        "http://h:0",
        "http://h:x",
        "http://h:1/path",
        "http://[",
        "http://a b",
        "",
    ],
)
async def test_a_bad_url_is_refused_in_one_line(api: Api, url: str) -> None:
    for body in ({"url": url}, {"url": url, "entry": {**msgspec.structs.asdict(ENTRY), "url": url}}):
        answer = await ask(api, "POST", "/workers", json.dumps(body).encode())
        assert (answer.status, answer.code) == (400, "invalid_value")
        assert answer.message.startswith("`url`: ")
        assert "pw" not in answer.message
        assert "\n" not in answer.message
    assert api.admin.calls == []


async def test_an_entry_is_of_the_url_that_it_comes_for(api: Api) -> None:
    status, answer = await api.post("/workers", {**NODE, "url": "http://127.0.0.1:8101"})
    assert (status, answer["error"]["param"]) == (400, "entry.url")
