"""The operator's routes on a router: what they take, what they hand on, and the request log."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from pdserve.api.generation import AdminReply
from pdserve.messages.operation import ConfigureLogging, FreezeGc, SetInternalState, SlowDown, StartProfile
from pdserve.tests.unit.api.conftest import Api

pytestmark = pytest.mark.usefixtures("logging_as_it_was")


@pytest.mark.parametrize(
    ("path", "body", "operation"),
    [
        ("/slow_down", {"forward_sleep_time": 0.5}, SlowDown(forward_sleep_s=0.5)),
        ("/slow_down", {"forward_sleep_time": None}, SlowDown(forward_sleep_s=0.0)),
        ("/slow_down", {"forward_sleep_time": -1}, SlowDown(forward_sleep_s=0.0)),
        ("/freeze_gc", {}, FreezeGc()),
        ("/configure_logging", {"log_level": "debug"}, ConfigureLogging(log_level="debug")),
        (
            "/set_internal_state",
            {"server_args": {"max_queued_prefills": 4}},
            SetInternalState(settings={"max_queued_prefills": 4}),
        ),
        (
            "/start_profile",
            {
                "output_dir": "/d",
                "num_steps": 3,
                "profile_by_stage": True,
                "profile_id": "x",
                "with_stack": True,
            },
            StartProfile(profile_id="x", output_dir="/d", num_steps=3, by_stage=True, with_stack=True),
        ),
    ],
)
async def test_what_is_asked_is_handed_on_and_a_failure_is_an_answer(
    api: Api, path: str, body: dict[str, Any], operation: object
) -> None:
    assert await api.post(path, body) == (200, {"success": True, "message": "done"})
    assert api.admin.calls == [("operate", operation)]
    api.admin.reply = AdminReply(False, "a node said no")
    assert await api.post(path, body) == (400, {"success": False, "message": "a node said no"})


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/slow_down", {"forward_sleep_time": 61}, "forward_sleep_time"),
        ("/slow_down", {"forward_sleep_time": "long"}, "forward_sleep_time"),
        ("/configure_logging", {"log_level": "loud"}, "log_level"),
        ("/configure_logging", {"log_requests_level": 4}, "log_requests_level"),
        ("/configure_logging", {"crash_dump_folder": "/x"}, "crash_dump_folder"),
        ("/set_internal_state", {"server_args": {}}, "server_args"),
        ("/set_internal_state", {"server_args": {"page_size": "x"}}, "server_args"),
        ("/pause_generation", {"mode": "freeze"}, "mode"),
        ("/start_profile", {"num_steps": 0}, "num_steps"),
        ("/start_profile", {"num_steps": 2**70}, "num_steps"),
        ("/start_profile", {"num_steps": 257}, "num_steps"),
        ("/start_profile", {"output_dir": "/tmp/\0"}, "output_dir"),
        ("/set_internal_state", {"server_args": {"max_queued_prefills": 2**70}}, "server_args"),
        ("/start_profile", {"activities": ["MEM"]}, "activities"),
        ("/start_profile", {"profile_id": "../x"}, "profile_id"),
    ],
)
async def test_wrong_input_reaches_no_node(api: Api, path: str, body: dict[str, Any], param: str) -> None:
    status, answer = await api.post(path, body)
    assert status == 400
    assert answer["error"]["param"].startswith(param)
    assert api.admin.calls == []


@pytest.mark.parametrize(
    ("body", "call"),
    [
        ({}, ("pause", "abort", False)),
        ({"mode": "retract"}, ("pause", "retract", False)),
        ({"mode": "in_place"}, ("pause", "in_place", False)),
        ({"mode": "keep"}, ("pause", "in_place", False)),
        ({"mode": "wait"}, ("pause", "in_place", True)),
    ],
)
async def test_pause_knows_both_sets_of_names(api: Api, body: dict[str, Any], call: tuple[Any, ...]) -> None:
    assert (await api.post("/pause_generation", body))[0] == 200
    assert (await api.post("/continue_generation", {}))[0] == 200
    assert api.admin.calls == [call, ("continue",)]
    api.admin.reply = AdminReply(False, "a node did not answer")
    assert (await api.post("/pause_generation", body))[0] == 400


async def test_state_and_the_end_of_a_profile(api: Api) -> None:
    assert await api.get("/get_internal_state") == (200, {"internal_states": [{"role": "prefill"}]})
    assert (await api.post("/stop_profile", {}))[0] == 200
    api.admin.reply = AdminReply(False, "no profile is running")
    status, answer = await api.post("/stop_profile", {})
    assert (status, answer["message"]) == (400, "no profile is running")


async def test_requests_are_logged_as_detailed_as_is_asked(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pdserve")
    body = {"text": "The", "sampling_params": {"max_new_tokens": 2, "temperature": 0.25}, "rid": "mine"}

    async def lines(**fields: object) -> list[str]:
        caplog.clear()
        assert (await api.post("/configure_logging", fields))[0] == 200
        assert (await api.post("/generate", body))[0] == 200
        return [record.message for record in caplog.records if "request mine" in record.message]

    assert await lines() == [], "off unless it is asked for"
    begin, end = await lines(log_requests=True, log_requests_level=0)
    assert begin == "request mine: 1 prompt tokens, 1 choices"
    assert end.startswith("request mine: choice 0: length after ")
    assert end.endswith(" s, 2 tokens")
    begin, end = await lines(log_requests_level=1)
    assert '"temperature":0.25' in begin
    assert "ids" not in begin + end
    begin, end = await lines(log_requests_level=2)
    assert "ids [" in begin
    assert "ids [" in end
    assert await lines(log_requests=False) == []
    assert api.admin.calls == [], "no node is asked for what is the router's alone"
