"""What the router asks of every node at once: prepare all, then commit all or discard all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from ...links.node_calls import NodeCalls, NodeUnavailableError
from ...messages.node import CallReply
from ...messages.weights import WeightSource

COMMIT_AGAIN_S = 0.1


class Reply(Protocol):
    @property
    def success(self) -> bool: ...
    @property
    def message(self) -> str: ...


R = TypeVar("R", bound=Reply)


@dataclass(frozen=True, slots=True)
class NodeAnswer(Generic[R]):
    url: str
    success: bool
    message: str
    reply: R | None = None  # none: the node did not answer, and may have done it or not

    def __str__(self) -> str:
        return f"{self.url}: {self.message or ('done' if self.success else 'failed')}"


async def ask_all(
    links: Mapping[str, NodeCalls], ask: Callable[[NodeCalls], Awaitable[R]]
) -> list[NodeAnswer[R]]:
    """Ask every node (url -> link) the same at once. A node that does not answer has failed."""
    return list(await asyncio.gather(*(ask_one(url, link, ask) for url, link in links.items())))


async def ask_one(url: str, link: NodeCalls, ask: Callable[[NodeCalls], Awaitable[R]]) -> NodeAnswer[R]:
    try:
        reply = await ask(link)
    except NodeUnavailableError as error:
        return NodeAnswer(url, False, str(error))
    return NodeAnswer(url, reply.success, reply.message, reply)


def failures(answers: Iterable[NodeAnswer[Any]]) -> str:
    return "; ".join(str(answer) for answer in answers if not answer.success)


async def prepare_all(
    links: Mapping[str, NodeCalls], update_id: str, source: WeightSource, weight_version: str
) -> list[NodeAnswer[CallReply]]:
    return await ask_all(links, lambda link: link.prepare_weights(update_id, source, weight_version))


async def discard_all(links: Mapping[str, NodeCalls], update_id: str) -> None:
    """A node that does not hear it rolls back when its lease ends."""
    await ask_all(links, lambda link: link.discard_weights(update_id))


async def commit_all(
    links: Mapping[str, NodeCalls], update_id: str, patience_s: float
) -> list[NodeAnswer[CallReply]]:
    """A node that is not idle yet says no and keeps the update: it is asked again for `patience_s`.

    What a client left behind may still be on the wire when no request runs any more. A node that has not
    prepared it, or prepared another router's since, is not asked again.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_s
    answers: dict[str, NodeAnswer[CallReply]] = {}
    pending = dict(links)
    while True:
        for answer in await ask_all(pending, lambda link: link.commit_weights(update_id)):
            answers[answer.url] = answer
            if answer.success or answer.reply is None or is_not_prepared(answer):
                del pending[answer.url]
        if not pending or loop.time() >= deadline:
            return list(answers.values())
        await asyncio.sleep(COMMIT_AGAIN_S)


def is_not_prepared(answer: NodeAnswer[CallReply]) -> bool:
    return answer.reply is not None and answer.reply.code == "not_prepared"
