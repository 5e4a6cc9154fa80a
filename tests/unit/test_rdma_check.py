"""The RDMA check, over TCP: it passes, goes on when a link breaks, finds what it is there to find."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.tests.scripts import FOLDER

pytestmark = pytest.mark.process

# Each is run at the start of both processes of the check.
LINK_BREAKS_UNDER_THE_FIRST_ROOM = """
import time
from pdserve.transfer.decode_rooms import DecodeRooms
open_room = DecodeRooms.open_room

def open_and_break(self, address, **request):
    room, actions = open_room(self, address, **request)
    if room.counter == 1:
        (epoch,) = [action.message.epoch for action in actions]
        actions += self.on_link_down(address, epoch, time.monotonic())
    return room, actions

DecodeRooms.open_room = open_and_break
"""
PAGES_ARE_FREE_AT_ONCE = """
from pdserve.transfer.decode_rooms import DecodeRooms
DecodeRooms._settle = lambda self, room, now: self._release(room)
"""
ABORTED_ROOM_IS_FREE_AT_ONCE = """
from pdserve.transfer.decode_rooms import DecodeRooms
DecodeRooms.abort = lambda self, room_id, now: [
    *self._send_abort(self._rooms[room_id], now), *self._release(self._rooms[room_id])
]
"""
HEADS_CHANGE_PLACES = """
import dataclasses
from pdserve.transfer import head_slices, prefill_rooms

def plan(layout, source_tp, dest_tp):
    slices = head_slices.plan_head_slices(layout, source_tp, dest_tp)
    if source_tp == dest_tp:
        return slices
    first, second = slices
    return (
        dataclasses.replace(first, source_offset=second.source_offset, dest_offset=second.dest_offset),
        dataclasses.replace(second, source_offset=first.source_offset, dest_offset=first.dest_offset),
    )

prefill_rooms.plan_head_slices = plan
"""
CACHED_PAGES_ARE_SENT = """
from pdserve.transfer.prefill_rooms import PrefillRooms
on_request = PrefillRooms._on_request

def forget_what_is_cached(self, link, request, now, queue_has_room):
    actions = on_request(self, link, request, now, queue_has_room)
    self._rooms[request.room].next_page = 0
    return actions

PrefillRooms._on_request = forget_what_is_cached
"""


def check(tmp_path: Path, planted: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(planted)
    return subprocess.run(
        [sys.executable, "-P", FOLDER / "rdma_check.py", "--transport", "tcp"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_it_passes_and_a_room_that_lost_its_link_is_tried_again(tmp_path: Path) -> None:
    result = check(tmp_path, LINK_BREAKS_UNDER_THE_FIRST_ROOM)
    assert result.returncode == 0, result.stdout + result.stderr
    tried = re.search(r"(\d+) rooms: late", result.stdout)
    assert tried is not None
    assert int(tried[1]) > 4, "the first of each decode node is tried again"
    last = result.stdout.splitlines()[-1]
    assert last.startswith(
        "OK over tcp, prefill TP 1 and 2 to decode TP 1 and 2: 8 rooms handed over, 44 pages"
    )
    assert "8 aborted and 4 whose writes landed after they had failed" in last


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (PAGES_ARE_FREE_AT_ONCE, "was written, and is|is written in part"),
        (ABORTED_ROOM_IS_FREE_AT_ONCE, "overtaken room, prefill TP 1 delay=1,delay_s=1 -> decode TP 1"),
        (HEADS_CHANGE_PLACES, "holds other bytes"),
        (CACHED_PAGES_ARE_SENT, "was written, and is private to"),
    ],
)
def test_it_finds_what_is_wrong(tmp_path: Path, planted: str, found: str) -> None:
    result = check(tmp_path, planted)
    assert result.returncode == 1, result.stdout + result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith("FAILED: ")
    assert re.search(found, last), last
