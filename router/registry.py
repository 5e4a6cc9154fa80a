"""The nodes that the router knows: leases, liveness, readiness. Values and ``now`` in, events out.

A node is *known* while its lease holds: a registration, an answer of its ``/node_entry`` or a pong renews
it. It is *healthy* while its scheduler answers pings as well, *ready* while it may be paired.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from ..api.generation import ModelCard
from ..messages.node import NodeEntry, NodeLoad, Pong, is_same_process
from ..messages.weights import is_of_cluster

MAX_NODES = 512  # known at a time: who registers made-up ones must not fill the memory
_MAX_UNFIT = 64  # URLs that are remembered
_MAX_REMOVED = 1024  # incarnations that are remembered


@dataclass(frozen=True, slots=True)
class NodeJoined:
    entry: NodeEntry


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """The same incarnation says something new of itself, e.g. another weight version."""

    old: NodeEntry
    new: NodeEntry


@dataclass(frozen=True, slots=True)
class NodeRestarted:
    """The same URL, another incarnation."""

    old: NodeEntry
    new: NodeEntry


@dataclass(frozen=True, slots=True)
class NodeSilent:
    """Suspected: no new work, and what runs there is tried elsewhere. A pong lifts it."""

    entry: NodeEntry
    reason: str


@dataclass(frozen=True, slots=True)
class NodeLost:
    entry: NodeEntry
    reason: str


NodeEvent: TypeAlias = NodeJoined | NodeChanged | NodeRestarted | NodeSilent | NodeLost


@dataclass(slots=True)
class NodeRecord:
    """What is known of one node."""

    entry: NodeEntry
    lease_until: float
    last_pong_at: float | None = None  # None: silent until the next pong
    load: NodeLoad = field(default_factory=NodeLoad)
    ready_peers: frozenset[str] = frozenset()
    refused_peers: dict[str, str] = field(default_factory=dict)
    quarantined_pages: dict[str, int] = field(default_factory=dict)
    draining: bool = False  # it says so
    leaving: bool = False  # it, or an operator, took it out: what runs there may end

    @property
    def takes_work(self) -> bool:
        return self.last_pong_at is not None and not self.draining and not self.leaving

    @property
    def incarnation(self) -> str:
        return self.entry.incarnation


def may_pair(prefill: NodeEntry, decode: NodeEntry) -> bool:
    """Same model, same weights."""
    return prefill.model_name == decode.model_name and _weights(prefill) == _weights(decode)


def _weights(entry: NodeEntry) -> tuple[str, str]:
    return entry.model_fingerprint, entry.weight_version


def why_unfit(model: ModelCard, entry: NodeEntry) -> str:
    """Why a router that serves `model` cannot use the node; empty when nothing it says is wrong."""
    if entry.vocab_size and entry.vocab_size != model.vocab_size:
        sizes = f"{entry.vocab_size} token ids, this router's {model.vocab_size}"
        return f"its model has {sizes}; start both with the same model"
    if entry.vocabulary_digest and model.vocabulary_digest not in ("", entry.vocabulary_digest):
        meanings = "its tokenizer.json gives token ids other meanings than this router's"
        return f"{meanings}; start both with the same model"
    if entry.max_model_len and entry.max_model_len < model.max_model_len:
        lengths = f"{entry.max_model_len} tokens, this router advertises {model.max_model_len}"
        return f"it takes {lengths}; start both with --max-model-len {entry.max_model_len}"
    return ""


def other_files(model: ModelCard, entry: NodeEntry) -> list[str]:
    """Names of the files by which the router makes prompts that the node has otherwise, or one of them not at
    all. The node gets token ids and works with any of them; but answers may not be those of its model."""
    ours, theirs = model.text_digests, entry.text_digests
    if not ours or not theirs:
        return []
    return [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]


class NodeRegistry:
    def __init__(self, *, lease_s: float, pong_timeout_s: float, prefill_wait_s: float = math.inf) -> None:
        self._lease_s = lease_s
        self._pong_timeout_s = pong_timeout_s
        self._prefill_wait_s = prefill_wait_s
        self._prefill_awaited_until = math.inf  # decode nodes are not left to themselves before
        self._is_prefill_awaited = True
        self._nodes: dict[str, NodeRecord] = {}  # by incarnation
        self._by_url: dict[str, str] = {}  # url -> incarnation
        self._superseded: deque[str] = deque(maxlen=256)  # by a restart: a late registration changes nothing
        # Taken out: they come back by hand or as another incarnation.
        self._removed: deque[str] = deque(maxlen=_MAX_REMOVED)
        self._unfit: dict[str, tuple[str, float]] = {}  # url -> why, until when that is worth telling

    def __iter__(self) -> Iterator[NodeRecord]:
        return iter(self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, incarnation: str) -> NodeRecord | None:
        return self._nodes.get(incarnation)

    def at_url(self, url: str) -> NodeRecord | None:
        return self._nodes.get(self._by_url.get(url, ""))

    def url_of(self, incarnation: str) -> str:
        node = self._nodes.get(incarnation)
        return node.entry.url if node is not None else incarnation

    def has_room(self, entry: NodeEntry) -> bool:
        """Whether it may be registered: it is known, takes a known one's place, or there are not too many."""
        is_known = entry.incarnation in self._nodes or entry.url in self._by_url
        return is_known or len(self._nodes) < MAX_NODES

    # ---- what happens ---------------------------------------------------------------------------

    def register(self, entry: NodeEntry, now: float, *, by_hand: bool = False) -> list[NodeEvent]:
        """A registration or an answered poll: a node joins, restarts, or its lease is renewed.

        What a known incarnation serves is learned from its pongs alone, which come from its scheduler.
        """
        if by_hand and entry.incarnation in self._removed:
            self._removed.remove(entry.incarnation)
        if entry.incarnation in self._removed or entry.incarnation in self._superseded:
            return []
        known = self._nodes.get(entry.incarnation)
        if known is not None:
            known.lease_until = now + self._lease_s
            known.leaving = False
            return []
        before = self.at_url(entry.url)
        if before is not None:
            self._drop(before)
            self._superseded.append(before.incarnation)
        self._nodes[entry.incarnation] = NodeRecord(entry=entry, lease_until=now + self._lease_s)
        self._by_url[entry.url] = entry.incarnation
        return [NodeRestarted(before.entry, entry) if before is not None else NodeJoined(entry)]

    def refuse(self, entry: NodeEntry, reason: str, now: float) -> bool:
        """It came and does not fit. Whether that is news."""
        known, _ = self._unfit.get(entry.url, ("", 0.0))
        if known or len(self._unfit) < _MAX_UNFIT:
            self._unfit[entry.url] = (reason, now + self._lease_s)
        return known != reason

    def pong(self, incarnation: str, pong: Pong, now: float) -> list[NodeEvent]:
        """``incarnation``: who was asked. A process may have become another incarnation of itself; another
        process that answers there will register itself or be polled.

        Where a node is reached is known from its registration; its scheduler may not know its URL.
        """
        node = self._nodes.get(incarnation)
        if node is None:
            return []
        old = node.entry
        new = msgspec.structs.replace(pong.entry, url=old.url, zmq_address=old.zmq_address)
        if new.incarnation != incarnation:
            if is_same_process(new.incarnation, incarnation):
                return self._renew(node, new, now)
            self._drop(node)
            self._superseded.append(incarnation)
            return [NodeLost(old, "another incarnation answers at its address")]
        node.entry = new
        node.lease_until = now + self._lease_s
        node.last_pong_at = now
        node.load = pong.load
        node.ready_peers = frozenset(pong.ready_peers)
        node.refused_peers = pong.refused_peers
        node.quarantined_pages = pong.quarantined_pages
        node.draining = pong.draining
        wait_s = 0.0 if old.role == "prefill" else self._prefill_wait_s
        self._prefill_awaited_until = min(self._prefill_awaited_until, now + wait_s)
        return [NodeChanged(old, new)] if old != new else []

    def _renew(self, node: NodeRecord, entry: NodeEntry, now: float) -> list[NodeEvent]:
        events = self.register(entry, now)
        if node.leaving:
            self.take_out(entry.url)
        return events

    def link_lost(self, incarnation: str, reason: str, now: float) -> list[NodeEvent]:
        """It has half a lease left to be heard of again."""
        node = self._nodes.get(incarnation)
        if node is None:
            return []
        was_healthy = node.last_pong_at is not None
        node.last_pong_at = None
        node.lease_until = min(node.lease_until, now + self._lease_s / 2)
        return [NodeSilent(node.entry, reason)] if was_healthy else []

    def not_connected(self, prefill: str, decode: str) -> None:
        """Decode said that it cannot use this prefill node, or itself; believed until its next pong."""
        node = self._nodes.get(decode)
        if node is not None:
            node.ready_peers -= {prefill}
            node.draining |= not prefill

    def take_out(self, url: str) -> bool:
        """No new work; its registrations count no more until it restarts or is registered by hand."""
        node = self.at_url(url)
        if node is None:
            return False
        node.leaving = True
        if node.incarnation not in self._removed:
            self._removed.append(node.incarnation)
        return True

    def forget(self, incarnation: str) -> list[NodeEvent]:
        """A leaving node has nothing to do any more."""
        node = self._nodes.get(incarnation)
        if node is None:
            return []
        self._drop(node)
        return [NodeLost(node.entry, "it was taken out")]

    def was_removed(self, incarnation: str) -> bool:
        return incarnation in self._removed

    def expire(self, now: float) -> list[NodeEvent]:
        """Nodes that fell silent, nodes whose lease ended."""
        self._is_prefill_awaited = now < self._prefill_awaited_until
        self._unfit = {url: told for url, told in self._unfit.items() if now <= told[1]}
        events: list[NodeEvent] = []
        for node in list(self._nodes.values()):
            if node.last_pong_at is not None and now - node.last_pong_at > self._pong_timeout_s:
                node.last_pong_at = None
                events.append(NodeSilent(node.entry, f"no pong for {self._pong_timeout_s:g} s"))
            if now > node.lease_until:
                self._drop(node)
                events.append(NodeLost(node.entry, "its lease ended"))
        return events

    def excuse(self, stalled_s: float, now: float) -> None:
        """The router itself stood still: nobody is to blame for what could not be heard.

        Who was heard meanwhile after all gets no more time than that.
        """
        for node in self._nodes.values():
            node.lease_until = min(node.lease_until + stalled_s, now + self._lease_s)
            if node.last_pong_at is not None:
                node.last_pong_at = min(node.last_pong_at + stalled_s, now)

    def _drop(self, node: NodeRecord) -> None:
        del self._nodes[node.incarnation]
        if self._by_url.get(node.entry.url) == node.incarnation:
            del self._by_url[node.entry.url]

    def num_kv_tokens(self) -> int | None:
        """Tokens whose KV the smallest pool holds; None while no node has told, which those of a ready pair
        have. On prefill nodes too: when a decode node is lost, they prefill what a stream has so far."""
        pools = [node.load.num_total_pages * node.load.page_size for node in self.usable()]
        return min((size for size in pools if size), default=None)

    # ---- who may work ---------------------------------------------------------------------------

    def healthy(self, node: NodeRecord) -> bool:
        return node.last_pong_at is not None

    def usable(self) -> list[NodeRecord]:
        """Nodes that may get new work, if they have a peer to do it with."""
        return [node for node in self._nodes.values() if node.takes_work]

    def num_prefilling(self) -> int:
        """Nodes that compute prompts side by side: decode nodes where there is no prefill node."""
        usable = self.usable()
        return sum(node.entry.role == "prefill" or node.entry.colocated for node in usable) or len(usable)

    def ready_pairs(self) -> list[tuple[NodeRecord, NodeRecord]]:
        """(prefill, decode) that may be given a request; a colocated decode node pairs with itself.

        So does every decode node when no prefill node takes work: answers go on, if slower. A cluster in
        which none ever answered gets `prefill_wait_s` for one to join, since nodes start in any order. Once
        one node serves an update, those with other weights that they were started with wait for theirs.
        """
        usable = self.usable()
        prefills = [node for node in usable if node.entry.role == "prefill"]
        is_decode_alone = not prefills and not self._is_prefill_awaited
        updated = {
            _weights(node.entry) for node in self._nodes.values() if is_of_cluster(node.entry.update_id)
        }
        pairs = []
        for decode in usable:
            if decode.entry.role != "decode":
                continue
            if updated and _weights(decode.entry) not in updated:
                continue  # it was started since, with the weights that it starts with
            if decode.entry.colocated or is_decode_alone:
                pairs.append((decode, decode))
            pairs.extend(
                (prefill, decode)
                for prefill in prefills
                if prefill.incarnation in decode.ready_peers and may_pair(prefill.entry, decode.entry)
            )
        return pairs

    def explain_no_pair(self) -> str:
        """What is missing, in words that a person can act on."""
        decodes = [node for node in self._nodes.values() if node.entry.role == "decode"]
        prefills = [node for node in self._nodes.values() if node.entry.role == "prefill"]
        if self._unfit:
            return "; ".join(f"{url} does not fit: {reason}" for url, (reason, _) in self._unfit.items())
        if not decodes:
            return "no decode node is registered"
        if not prefills and not any(node.entry.colocated for node in decodes):
            return "no prefill node is registered"
        for role, nodes in (("decode", decodes), ("prefill", prefills)):
            if nodes and all(node.last_pong_at is None for node in nodes):
                return f"no {role} node answers"
            if nodes and not any(node.takes_work for node in nodes):
                return f"every {role} node is draining"
        refusals = [
            f"{node.entry.url} refuses {url}: {reason}"
            for node in decodes
            for url, reason in node.refused_peers.items()
        ]
        if refusals:
            return "; ".join(refusals)
        versions = {node.entry.weight_version for node in (*decodes, *prefills)}
        if len(versions) > 1:
            return f"nodes serve different weight versions: {', '.join(sorted(versions))}"
        return "no decode node has connected to a prefill node yet"
