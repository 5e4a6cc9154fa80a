"""The tree of a session's turns, as the router keeps it."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.api.generation import SessionTurn, TurnParams
from pdserve.router.sessions import SessionTable
from pdserve.runtime.errors import RequestError


@pytest.fixture
def table() -> SessionTable:
    return SessionTable(max_sessions=2, idle_timeout_s=60.0)


def open_(table: SessionTable, session_id: str = "s", **options: Any) -> str:  # noqa: ANN401
    fields: dict[str, Any] = {
        "home": "d-1",
        "address": "host:8200",
        "capacity": 0,
        "idle_timeout_s": None,
        "now": 100.0,
    }
    return table.open(session_id, **{**fields, **options})


def begin(table: SessionTable, rid: str, *new_ids: int, **params: Any) -> SessionTurn:  # noqa: ANN401
    """`after`: the id of the turn that it continues."""
    after = params.pop("after", None)
    return table.begin(TurnParams(id="s", rid=after, **params), rid, new_ids, 100.0)


def turn(
    table: SessionTable,
    rid: str,
    *new_ids: int,
    output: tuple[int, ...],
    **params: Any,  # noqa: ANN401
) -> tuple[int, ...]:
    """Its whole prompt."""
    begun = begin(table, rid, *new_ids, **params)
    table.finish(begun, output, 100.0)
    return begun.prompt_ids


def test_turns_append_branch_and_begin_anew(table: SessionTable) -> None:
    open_(table)
    assert turn(table, "a", 1, 2, output=(3, 4)) == (1, 2)
    assert turn(table, "b", 5, after="a", output=(6,)) == (1, 2, 3, 4, 5)
    assert turn(table, "c", 7, after="b", output=()) == (1, 2, 3, 4, 5, 6, 7)
    assert turn(table, "d", 8, after="a", output=(9,)) == (1, 2, 3, 4, 8)
    assert turn(table, "e", 5, 5, output=()) == (5, 5)
    assert begin(table, "f", after="d").prompt_ids == (1, 2, 3, 4, 8, 9)


def test_offsets_and_dropped_outputs(table: SessionTable) -> None:
    open_(table)
    turn(table, "a", 1, 2, output=(3, 4))
    turn(table, "b", 5, after="a", output=(6, 7))
    assert begin(table, "x", 9, after="b", offset=3).prompt_ids == (1, 2, 3, 9)
    assert begin(table, "x", 9, after="b", offset=0).prompt_ids == (1, 2, 3, 4, 5, 6, 7, 9)
    assert begin(table, "x", 9, after="b", drop_previous_output=True).prompt_ids == (1, 2, 3, 4, 5, 9)
    assert turn(table, "c", 9, after="b", offset=1, output=(8,)) == (1, 9)
    assert begin(table, "x", after="c").prompt_ids == (1, 9, 8)
    assert turn(table, "d", 9, after="b", drop_previous_output=True, output=(8,)) == (1, 2, 3, 4, 5, 9)
    assert begin(table, "x", after="d").prompt_ids == (1, 2, 3, 4, 5, 9, 8)


def test_replacing_forgets_what_continued_the_turn_once_the_new_one_has_ended(table: SessionTable) -> None:
    open_(table)
    turn(table, "a", 1, output=(2,))
    turn(table, "b", 3, after="a", output=(4,))
    turn(table, "c", 5, after="b", output=(6,))
    replacing = begin(table, "d", 7, after="a", replace=True)
    assert begin(table, "x", after="c").prompt_ids == (1, 2, 3, 4, 5, 6), "it has not ended yet"
    late = begin(table, "late", after="b")
    table.finish(replacing, (8,), 100.0)
    for gone in ("b", "c"):
        with pytest.raises(RequestError, match=f"no turn '{gone}'"):
            begin(table, "x", after=gone)
    table.finish(late, (9,), 100.0)
    with pytest.raises(RequestError, match="no turn 'late'"):
        begin(table, "x", after="late")
    assert begin(table, "x", after="d").prompt_ids == (1, 2, 7, 8)
    turn(table, "e", 4, output=(4,), replace=True)
    with pytest.raises(RequestError, match="no turn 'a'"):
        begin(table, "x", after="a")


def test_a_turn_that_did_not_end_has_not_happened(table: SessionTable) -> None:
    open_(table)
    begin(table, "a", 1)
    with pytest.raises(RequestError, match="no turn 'a' that has ended"):
        begin(table, "b", after="a")
    assert turn(table, "a", 1, output=(2,)) == (1,)
    with pytest.raises(RequestError, match="has a turn 'a' already"):
        begin(table, "a", 3)


@pytest.mark.parametrize("offset", [-1, 4])
def test_an_offset_outside_is_refused(table: SessionTable, offset: int) -> None:
    open_(table)
    turn(table, "a", 1, 2, output=(3,))
    with pytest.raises(RequestError) as refused:
        begin(table, "b", after="a", offset=offset)
    assert refused.value.param == "session_params.offset"


def test_ids_name_the_node_and_are_unique(table: SessionTable) -> None:
    first = open_(table, "")
    assert first.endswith("@host:8200")
    with pytest.raises(RequestError, match="open already"):
        open_(table, first)
    open_(table, "mine")
    with pytest.raises(RequestError) as full:
        open_(table, "third")
    assert full.value.status == 429
    assert table.close("mine")
    assert not table.close("mine")
    open_(table, "third")


def test_a_session_is_closed_when_it_was_idle_for_too_long(table: SessionTable) -> None:
    open_(table)
    open_(table, "short", idle_timeout_s=5.0)
    assert table.expire(104.9, ()) == []
    assert table.expire(105.0, {"short"}) == []
    assert table.expire(110.0, ()) == ["short"]
    begun = begin(table, "a", 1)
    assert table.expire(159.9, ()) == []
    table.finish(begun, (2,), 159.9)
    assert table.expire(200.0, ()) == []
    assert table.expire(220.0, ()) == ["s"]
    with pytest.raises(RequestError) as gone:
        begin(table, "b", after="a")
    assert (gone.value.param, gone.value.code) == ("session_params.id", "session_not_found")
    table.finish(begun, (2,), 230.0)
    assert len(table) == 0


def test_a_full_session_takes_no_turn(table: SessionTable) -> None:
    open_(table, capacity=5)
    turn(table, "a", 1, 2, output=(3,))
    with pytest.raises(RequestError, match="5 tokens at most"):
        begin(table, "b", 4, 5, 6, after="a")
    assert turn(table, "b", 4, after="a", output=(5,)) == (1, 2, 3, 4)


def test_where_its_kv_is(table: SessionTable) -> None:
    open_(table)
    assert (table.home("s"), table.home("other")) == ("d-1", "")
    table.moved("s", "d-2")
    table.moved("other", "d-2")
    assert table.home("s") == "d-2"
    assert (table.num_at("d-1"), table.num_at("d-2")) == (0, 1)
