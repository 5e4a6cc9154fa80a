"""Conversations that the router keeps between turns: their tokens, and the decode node that has their KV.

A session is a tree of turns. A turn is named by its request's id and holds its prompt's new tokens and its
output; what precedes them is another turn, whole or up to an offset. A turn joins the tree when it has ended
well: one that failed, or whose client left, has not happened.

The tokens are here, so a session outlives its decode node; it does not outlive this router. Values and the
time in, decisions out.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from ..api.generation import SessionHold, SessionTurn, TurnParams
from ..runtime.errors import RequestError

MAX_TOKENS = 1 << 20  # kept of one session


@dataclass(slots=True)
class _Turn:
    before: str | None  # the id of the turn that it continues
    num_kept: int  # tokens of that, prompt and output
    prompt_ids: tuple[int, ...]  # behind these
    output_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)


@dataclass(slots=True)
class _Session:
    home: str  # incarnation of the decode node that holds its KV
    idle_timeout_s: float
    max_tokens: int
    idle_since: float
    turns: dict[str, _Turn] = field(default_factory=dict)  # by request id

    @property
    def num_tokens(self) -> int:
        return sum(turn.num_tokens for turn in self.turns.values())


class SessionTable:
    def __init__(self, *, max_sessions: int, idle_timeout_s: float) -> None:
        self._max_sessions = max_sessions
        self._idle_timeout_s = idle_timeout_s
        self._sessions: dict[str, _Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def num_at(self, home: str) -> int:
        return sum(session.home == home for session in self._sessions.values())

    def open(
        self,
        session_id: str,
        *,
        home: str,
        address: str,
        capacity: int,
        idle_timeout_s: float | None,
        now: float,
    ) -> str:
        """Its id: the given one, or a new one that names the node by its `address`. `capacity`: the most
        tokens that it keeps; 0: as many as any."""
        if session_id in self._sessions:
            raise _refused("session_id", f"The session {session_id!r} is open already.", "session_exists")
        if len(self._sessions) >= self._max_sessions:
            raise RequestError(
                f"{self._max_sessions} sessions are open; close one, or try again later",
                status=429,
                code="too_many_sessions",
                error_type="rate_limit_error",
                retry_after_s=1.0,
            )
        chosen = session_id or f"{uuid.uuid4().hex}@{address}"
        timeout_s = self._idle_timeout_s if idle_timeout_s is None else idle_timeout_s
        self._sessions[chosen] = _Session(home, timeout_s, min(capacity or MAX_TOKENS, MAX_TOKENS), now)
        return chosen

    def close(self, session_id: str) -> bool:
        return self._sessions.pop(session_id, None) is not None

    def expire(self, now: float, busy: Collection[str]) -> list[str]:
        """Close the sessions that were idle for too long; those in `busy` are not idle."""
        expired = []
        for session_id, session in self._sessions.items():
            if session_id in busy:
                session.idle_since = now
            elif now - session.idle_since >= session.idle_timeout_s:
                expired.append(session_id)
        for session_id in expired:
            self.close(session_id)
        return expired

    # ---- where its KV is ----------------------------------------------------------------------------

    def home(self, session_id: str) -> str:
        """Empty: no such session."""
        session = self._sessions.get(session_id)
        return "" if session is None else session.home

    def moved(self, session_id: str, home: str) -> None:
        if (session := self._sessions.get(session_id)) is not None:
            session.home = home

    # ---- turns --------------------------------------------------------------------------------------

    def begin(self, params: TurnParams, request_id: str, new_ids: tuple[int, ...], now: float) -> SessionTurn:
        """What a turn's prompt is. Raises RequestError that names what is wrong with `params`."""
        session = self._sessions.get(params.id)
        if session is None:
            message = f"There is no session {params.id!r}: it was closed, or is another router's."
            raise _refused("session_params.id", message, "session_not_found")
        session.idle_since = now
        if request_id in session.turns:
            raise _refused("rid", f"The session has a turn {request_id!r} already.", "invalid_value")
        before: tuple[int, ...] = ()
        if params.rid is not None:
            turn = session.turns.get(params.rid)
            if turn is None:
                message = f"The session has no turn {params.rid!r} that has ended."
                raise _refused("session_params.rid", message, "invalid_value")
            before = _tokens(session, params.rid)
            if params.drop_previous_output:
                before = before[: len(before) - len(turn.output_ids)]
        if params.offset:
            if not 0 < params.offset <= len(before):
                message = f"`offset` must be 0 to {len(before)}, the tokens before this turn."
                raise _refused("session_params.offset", message, "invalid_value")
            before = before[: params.offset]
        if session.num_tokens + len(new_ids) > session.max_tokens:
            message = f"The session keeps {session.max_tokens} tokens at most; replace turns, or close it."
            raise _refused("session_params.id", message, "session_full")
        return SessionTurn(
            hold=SessionHold(params.id, session.idle_timeout_s),
            request_id=request_id,
            before=params.rid,
            num_kept=len(before),
            new_ids=new_ids,
            prompt_ids=(*before, *new_ids),
            replaces=params.replace,
        )

    def finish(self, turn: SessionTurn, output_ids: tuple[int, ...], now: float) -> None:
        """It has ended well. Nothing is kept where the session, or what the turn continues, is gone."""
        session = self._sessions.get(turn.hold.session_id)
        if session is None or (turn.before is not None and turn.before not in session.turns):
            return
        session.idle_since = now
        if turn.replaces:
            for request_id in list(_behind(session, turn.before)):
                del session.turns[request_id]
        session.turns[turn.request_id] = _Turn(turn.before, turn.num_kept, turn.new_ids, output_ids)


def _tokens(session: _Session, request_id: str) -> tuple[int, ...]:
    """Prompt and output of a turn, with all before it."""
    path: list[_Turn] = []
    at: str | None = request_id
    while at is not None:
        path.append(session.turns[at])
        at = path[-1].before
    tokens: tuple[int, ...] = ()
    for turn in reversed(path):
        tokens = (*tokens[: turn.num_kept], *turn.prompt_ids, *turn.output_ids)
    return tokens


def _behind(session: _Session, request_id: str | None) -> Iterator[str]:
    """The turns that continue this one, at any distance; all turns of the session behind None."""
    behind = {request_id}
    for other, turn in session.turns.items():  # what a turn continues is before it
        if turn.before in behind:
            behind.add(other)
            yield other


def _refused(param: str, message: str, code: str) -> RequestError:
    return RequestError(message, param=param, code=code)
