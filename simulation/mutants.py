"""Known bugs, planted one by one: a check that finds none of them would prove nothing.

Each replaces a few methods of the product while it is planted; the product itself has no switch for it. A
bracket names the family of bugs that systems of this kind are known for: 6.1 who owns a page, 6.4 control and
weights, 6.5 late, repeated and lost messages, 5 what users report of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from ..components.prefix_cache import PrefixCache
from ..components.prompt_job import PromptJob
from ..decode.handoffs import Handoffs
from ..decode.request_pages import RequestPages
from ..decode.running import Running
from ..decode.waiting import Waiting
from ..messages.order import Order
from ..messages.peer import Drained, HandoffDone, PeerRefused, PrefillRequest, RoomId
from ..messages.timeline import Span
from ..prefill.jobs import PrefillJobs
from ..prefill.scheduler import PrefillScheduler
from ..router import registry
from ..router.admission import AdmissionQueue
from ..router.attempts import RequestRecord
from ..router.ledger import Ledger
from ..router.members import Members
from ..router.registry import NodeRestarted
from ..router.requests import Requests
from ..transfer import decode_rooms, prefill_rooms
from ..transfer.actions import FirstTokenArrived, PagesReleased, RoomEnded, SendToDecode
from ..transfer.backends.base import WriteResult, WriteState
from ..transfer.decode_rooms import DecodeRooms, PeerState, RoomState
from ..transfer.prefill_rooms import PrefillRooms

Method = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Patch:
    """`replacement` takes the original, and returns what stands in its place."""

    owner: Any
    attribute: str
    replacement: Callable[[Method], Method]


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    bug: str
    patches: tuple[Patch, ...]
    flavour: str = ""  # of the seeds that find it soonest; each seed's own if none is named
    found_by: int = 0  # the seed that found it last, where it took many: the search begins there

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        originals = [getattr(patch.owner, patch.attribute) for patch in self.patches]
        for patch, original in zip(self.patches, originals, strict=True):
            setattr(patch.owner, patch.attribute, patch.replacement(original))
        try:
            yield
        finally:
            for patch, original in zip(self.patches, originals, strict=True):
                setattr(patch.owner, patch.attribute, original)


# ---- quarantine on decode ---------------------------------------------------------------------------


def _release_after_a_while(original: Method) -> Method:
    def tick_room(self: DecodeRooms, room: Any, now: float) -> Any:  # noqa: ANN401
        is_draining = room.state is RoomState.DRAINING
        if is_draining and now - room.next_abort > 0.3:
            return self._release(room)
        return original(self, room, now)

    return tick_room


def _settle_at_once(_: Method) -> Method:
    return lambda self, room, now: self._release(room)


def _count_frozen_time(original: Method) -> Method:
    def tick_room(self: DecodeRooms, room: Any, now: float) -> Any:  # noqa: ANN401
        if room.state is RoomState.SETTLING:
            room.settled_s += max(0.0, now - room.counted_at - self._timing.settle_tick_s)
        return original(self, room, now)

    return tick_room


def _never_starts_again(_: Method) -> Method:
    return lambda self, late_s, now: None


def _free_on_socket_close(_: Method) -> Method:
    def on_link_down(self: DecodeRooms, address: str, epoch: int, now: float, *reason: str) -> Any:  # noqa: ANN401
        peer = self._peers.get(address)
        if peer is None or peer.epoch != epoch:
            return []
        actions = self._lose(peer, "the connection was closed", now)
        for room in [room for room in self._rooms.values() if room.address == address]:
            actions += self._release(room)
        return actions

    return on_link_down


def _newcomer_proves_death(original: Method) -> Method:
    def on_welcome(self: DecodeRooms, peer: Any, welcome: Any, now: float) -> Any:  # noqa: ANN401
        actions = original(self, peer, welcome, now)
        for room in [room for room in self._rooms.values() if room.address == peer.address]:
            if room.incarnation != peer.incarnation:
                actions += self._settle(room, now)
        return actions

    return on_welcome


def _never_ask_again(_: Method) -> Method:
    return lambda self, room: False


def _busy_keeps_pages(original: Method) -> Method:
    def on_busy(self: DecodeRooms, room: Any) -> Any:  # noqa: ANN401
        actions = original(self, room)
        return [
            RoomEnded(each.room, each.code, each.reason, each.retriable, quarantined=True)
            if isinstance(each, RoomEnded)
            else each
            for each in actions
        ]

    return on_busy


def _first_token_twice(original: Method) -> Method:
    def on_room_message(self: DecodeRooms, room: Any, message: Any, now: float) -> Any:  # noqa: ANN401
        actions = original(self, room, message, now)
        return [*actions, *(each for each in actions if isinstance(each, FirstTokenArrived))]

    return on_room_message


def _sticky_blacklist(original: Method) -> Method:
    def tick_peer(self: DecodeRooms, peer: Any, now: float) -> Any:  # noqa: ANN401
        if peer.state is PeerState.WAITING and peer.retry_s > 0.5:
            peer.retry_at = now + 3600.0
        return original(self, peer, now)

    return tick_peer


def _busy_believed(original: Method) -> Method:
    return lambda self, peer: max(original(self, peer), peer.busy_until)


def _no_silence_before_ready(original: Method) -> Method:
    return lambda self, peer: original(self, peer) if peer.state is PeerState.READY else float("inf")


def _refusal_ignored(original: Method) -> Method:
    def on_message(self: DecodeRooms, address: str, message: Any, now: float) -> Any:  # noqa: ANN401
        if not isinstance(message, PeerRefused):
            return original(self, address, message, now)
        peer = self._peers.get(address)
        if peer is not None and message.epoch == peer.epoch:
            peer.heard = now
        return []

    return on_message


# ---- rooms on prefill -------------------------------------------------------------------------------


def _drained_too_early(original: Method) -> Method:
    def close_if_drained(self: PrefillRooms, room: Any) -> Any:  # noqa: ANN401
        link = room.decode.link
        if not room.outstanding or link is None:
            return original(self, room)
        drained = Drained(room=room.request.room, epoch=link.epoch, clean=True)
        return [SendToDecode(link.link, drained)]

    return close_if_drained


def _done_before_last_write(original: Method) -> Method:
    def first_token(self: PrefillRooms, room_id: RoomId, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        room = self._rooms.get(room_id)
        actions = original(self, room_id, *args, **options)
        if room is not None and room_id in self._rooms and room.decode.link is not None:
            link = room.decode.link
            spans = (Span("wire", 0.0, 0.0),)
            done = HandoffDone(room=room_id, epoch=link.epoch, num_bytes=0, spans=spans)
            actions.append(SendToDecode(link.link, done))
        return actions

    return first_token


def _failed_write_is_done(original: Method) -> Method:
    def on_write_result(self: PrefillRooms, result: WriteResult, now: float) -> Any:  # noqa: ANN401
        is_failed_write = result.state is WriteState.FAILED and result.handle in self._room_of_write
        return original(self, WriteResult(result.handle, WriteState.DONE) if is_failed_write else result, now)

    return on_write_result


def _clean_after_failure(original: Method) -> Method:
    def close_if_drained(self: PrefillRooms, room: Any) -> Any:  # noqa: ANN401
        room.has_failed_write = False
        return original(self, room)

    return close_if_drained


def _failed_contact_not_told(original: Method) -> Method:
    def on_met(self: PrefillRooms, link: Any, result: WriteResult, now: float) -> Any:  # noqa: ANN401
        is_current = self._decodes[link.incarnation].link is link
        return original(self, link, result, now) if result.state is WriteState.DONE or not is_current else []

    return on_met


def _no_mark(original: Method) -> Method:
    def on_abort(self: PrefillRooms, link: Any, abort: Any) -> Any:  # noqa: ANN401
        mark = link.mark
        actions = original(self, link, abort)
        link.mark = mark
        return actions

    return on_abort


def _epochs_ignored(original: Method) -> Method:
    """Any connection of a decode node is as good as its latest one."""

    def on_stranger(self: PrefillRooms, link_id: bytes, message: Any) -> Any:  # noqa: ANN401
        if not isinstance(message, PrefillRequest):
            return original(self, link_id, message)
        decode = self._decodes.get(message.room.decode_incarnation)
        if decode is None or decode.link is None:
            return []
        return self._on_request(decode.link, message, decode.link.heard, True)

    return on_stranger


def _highest_epoch_kept(original: Method) -> Method:
    """For good, whoever named it."""

    def on_hello(self: PrefillRooms, link_id: bytes, hello: Any, now: float) -> Any:  # noqa: ANN401
        highest = vars(self).setdefault("highest", {})
        if hello.epoch <= highest.get(hello.identity.incarnation, -1):
            return []
        highest[hello.identity.incarnation] = hello.epoch
        return original(self, link_id, hello, now)

    return on_hello


def _only_equal_incarnations(_: Method) -> Method:
    return lambda incarnation, other: incarnation == other


def _weights_not_compared(original: Method) -> Method:
    def refusal(prefill: Any, hello: Any) -> Any:  # noqa: ANN401
        reason = original(prefill, hello)
        return None if reason and ("weight" in reason or "model differs" in reason) else reason

    return refusal


def _any_may_pair(_: Method) -> Method:
    return lambda prefill, decode: True


def _versions_not_compared(original: Method) -> Method:
    def on_request(self: PrefillRooms, link: Any, request: Any, *args: Any) -> Any:  # noqa: ANN401
        ours = self.identity.weight_version
        return original(self, link, msgspec.structs.replace(request, weight_version=ours), *args)

    return on_request


def _nothing_crosses(_: Method) -> Method:
    return lambda self, message: False


def _any_version_accepted(original: Method) -> Method:
    def accept(self: Waiting, link: bytes, message: Any, now: float, **rest: bool) -> None:  # noqa: ANN401
        original(self, link, msgspec.structs.replace(message, weight_version=""), now, **rest)

    return accept


# ---- the schedulers ---------------------------------------------------------------------------------


def _sources_stay_locked(original: Method) -> Method:
    def release(self: PrefillScheduler, action: Any) -> None:  # noqa: ANN401
        job = self._jobs.get(action.room)
        if not action.completed and job is not None:
            job.match = None
        original(self, action)

    return release


def _sources_unlocked_early(original: Method) -> Method:
    def insert_into_cache(self: PrefillJobs, job: Any) -> None:  # noqa: ANN401
        original(self, job)
        self._unlock(job)

    return insert_into_cache


def _freed_under_a_forward(_: Method) -> Method:
    def free_if_unused(self: PrefillJobs, job: Any) -> None:  # noqa: ANN401
        self._unlock(job)
        self._allocator.free_private(job.room)
        self._jobs.pop(job.room, None)

    return free_if_unused


def _decode_frees_under_a_forward(original: Method) -> Method:
    def end(self: Running, request: Any, ended: Any) -> None:  # noqa: ANN401
        if request.key in self._prefilling:
            self._prefilling[request.key].job.num_forwards = 0
        for sequence in ended:
            sequence.in_forward = False
        original(self, request, ended)

    return end


def _cache_survives_weights(_: Method) -> Method:
    def renew(self: PrefillScheduler, identity: Any, reason: str, now: float, regions: Any) -> None:  # noqa: ANN401
        del regions
        self._act(self._rooms.set_identity(identity, reason), now)

    return renew


def _partial_page_shared(_: Method) -> Method:
    def fork(self: RequestPages, request: Any) -> None:  # noqa: ANN401
        first, *others = request.live_sequences
        for other in others:
            other.pages = list(first.pages)

    return fork


def _room_not_aborted(_: Method) -> Method:
    def drop(self: Handoffs, handoff: Any, now: float) -> None:  # noqa: ANN401
        del now
        self._remove(handoff)
        self._allocator.quarantine(handoff.room)

    return drop


def _prefix_not_locked(_: Method) -> Method:
    def lock_prefix(self: RequestPages, request: Any) -> list[int]:  # noqa: ANN401
        match = self.match(request)
        request.match, request.num_cached = None, match.num_tokens
        return match.pages

    return lock_prefix


def _delta_too_short(original: Method) -> Method:
    def on_request(self: PrefillRooms, link: Any, request: Any, *args: Any) -> Any:  # noqa: ANN401
        num_held = request.num_cached_tokens
        last_page = (len(request.dest_pages) - 1) * self.identity.layout.page_size
        if 0 < num_held < last_page:
            num_held += self.identity.layout.page_size
        return original(self, link, msgspec.structs.replace(request, num_cached_tokens=num_held), *args)

    return on_request


def _last_token_cached(original: Method) -> Method:
    def free(self: RequestPages, request: Any, sequence: Any, *, num_computed: int = 0) -> None:  # noqa: ANN401
        whole = len(sequence.token_ids)
        is_running = num_computed == whole - 1
        original(self, request, sequence, num_computed=whole if is_running else num_computed)

    return free


def _promises_forgotten(_: Any) -> Any:  # noqa: ANN401, a property
    return property(lambda self: self._allocator.num_free + self._cache.num_evictable)


def _locks_ignored(_: Method) -> Method:
    return lambda self, match: None


def _choices_tried_together(_: Any) -> Any:  # noqa: ANN401, a property
    return property(lambda self: False)


def _released_twice(original: Method) -> Method:
    def settle(self: DecodeRooms, room: Any, now: float) -> Any:  # noqa: ANN401
        pages = PagesReleased(room.room, room.exposed)
        return [pages, *original(self, room, now)] if room.settle_s else original(self, room, now)

    return settle


# ---- the stages of a request ------------------------------------------------------------------------


def _pages_free_at_once(original: Method) -> Method:
    return lambda self, room, *, quarantined: original(self, room, quarantined=False)


def _promises_kept(_: Method) -> Method:
    return lambda self, request, ended: None


def _stays_in_line(_: Method) -> Method:
    return lambda self, request: None


def _cancelled_goes_on(original: Method) -> Method:
    def apply_decoded(self: Running, request: Any, sequence: Any, *rest: Any) -> None:  # noqa: ANN401
        sequence.is_finished = False
        original(self, request, sequence, *rest)

    return apply_decoded


def _retracted_keeps_pages(_: Method) -> Method:
    def retract(self: Running, request: Any) -> None:  # noqa: ANN401
        self._outputs.fail(request, "retracted", "too few pages", retriable=True)
        self._prefilling.pop(request.key, None)
        self._decoding.pop(request.key, None)

    return retract


def _scheduled_is_computed(original: Method) -> Method:
    def chunk(self: PromptJob, *args: Any) -> None:  # noqa: ANN401
        original(self, *args)
        self.num_computed = self.num_scheduled

    return chunk


# ---- the router -------------------------------------------------------------------------------------


def _cancelled_counts_on(original: Method) -> Method:
    return lambda self, attempt, code: None if code == "cancelled" else original(self, attempt, code)


def _stays_queued(_: Method) -> Method:
    return lambda self, *args: None


def _one_retry_only(original: Method) -> Method:
    def on_failed(self: RequestRecord, failure: Any) -> Any:  # noqa: ANN401
        ended = original(self, failure)
        return type(ended)(ended.closed, ended.retries[:1])

    return on_failed


def _nothing(_: Method) -> Method:
    return lambda self, *args, **options: None


def _no_events(_: Method) -> Method:
    return lambda self, *args: []


def _deadlines_forgotten(_: Method) -> Method:
    return lambda self, now: None


def _old_link_stays(original: Method) -> Method:
    def follow(self: Members, event: Any, now: float) -> None:  # noqa: ANN401
        link = self._links.get(event.old.incarnation) if isinstance(event, NodeRestarted) else None
        original(self, event, now)
        if link is not None:
            self._links[event.old.incarnation] = link

    return follow


def _not_connected_again(original: Method) -> Method:
    def open_link(self: Members, entry: Any, now: float) -> None:  # noqa: ANN401
        if entry.incarnation not in self._connect_not_before:
            original(self, entry, now)

    return open_link


def _aborted_goes_on(original: Method) -> Method:
    def abort(self: Requests, request_ids: Any, now: float) -> None:  # noqa: ANN401
        tickets = [ticket for each in request_ids for ticket in self.queue.of_request(each)]
        original(self, request_ids, now)
        for ticket in tickets:
            self.queue._insert(ticket)

    return abort


def _told_and_not_tried_again(original: Method) -> Method:
    def fail_attempt(self: Requests, failure: Any, now: float) -> None:  # noqa: ANN401
        if failure.reason != "weights change":
            original(self, failure, now)

    return fail_attempt


MUTANTS = (
    Mutant(
        "quarantine-timeout",
        "pages leave quarantine after a while, drained or not (6.1.1)",
        (Patch(DecodeRooms, "_tick_room", _release_after_a_while),),
        flavour="replaced",
    ),
    Mutant(
        "no-settling",
        "a failed room's pages are free as soon as it is drained",
        (Patch(DecodeRooms, "_settle", _settle_at_once),),
        flavour="settling",
    ),
    Mutant(
        "settle-by-wall-clock",
        "the time for which decode was frozen counts as settling",
        (
            Patch(DecodeRooms, "_tick_room", _count_frozen_time),
            Patch(DecodeRooms, "_forgive", _never_starts_again),
        ),
        flavour="settling",
        found_by=11,
    ),
    Mutant(
        "free-on-socket-close",
        "a closed connection counts as the peer's death (6.4)",
        (Patch(DecodeRooms, "on_link_down", _free_on_socket_close),),
        flavour="replaced",
    ),
    Mutant(
        "newcomer-proves-death",
        "a new incarnation at its address counts as the death of the old one (6.5)",
        (Patch(DecodeRooms, "_on_welcome", _newcomer_proves_death),),
        flavour="replaced",
    ),
    Mutant(
        "abort-once",
        "an abort whose answer was lost is not repeated (5.9)",
        (Patch(DecodeRooms, "_can_ask", _never_ask_again),),
        flavour="stalled",
    ),
    Mutant(
        "busy-quarantines",
        "Busy sends pages into a quarantine that nobody ends",
        (Patch(DecodeRooms, "_on_busy", _busy_keeps_pages),),
    ),
    Mutant(
        "first-token-twice",
        "a first token is taken twice",
        (Patch(DecodeRooms, "_on_room_message", _first_token_twice),),
    ),
    Mutant(
        "sticky-blacklist",
        "a peer that was lost twice in a row is never tried again (5: #13054)",
        (Patch(DecodeRooms, "_tick_peer", _sticky_blacklist),),
    ),
    Mutant(
        "busy-believed",
        "a peer that announced to be busy may be silent for as long as it said, cut off or not",
        (Patch(DecodeRooms, "_silent_at", _busy_believed),),
        flavour="updated",
    ),
    Mutant(
        "no-silence-before-ready",
        "a handshake waits for its answer without a deadline",
        (Patch(DecodeRooms, "_silent_at", _no_silence_before_ready),),
    ),
    Mutant(
        "refusal-ignored",
        "a refused peer pings on in an epoch that is over",
        (Patch(DecodeRooms, "on_message", _refusal_ignored),),
        flavour="updated",
    ),
    Mutant(
        "failed-contact-not-told",
        "decode is not told that the first contact failed, and pings keep the link as it is",
        (Patch(PrefillRooms, "_on_met", _failed_contact_not_told),),
        found_by=12,
    ),
    Mutant(
        "drained-too-early",
        "Drained is said while writes are outstanding (6.1.1)",
        (Patch(PrefillRooms, "_close_if_drained", _drained_too_early),),
    ),
    Mutant(
        "done-before-last-write",
        "HandoffDone is said with the first token (6.1.2)",
        (Patch(PrefillRooms, "first_token", _done_before_last_write),),
    ),
    Mutant(
        "failed-write-is-done",
        "a write that failed counts as one that is in place (6.1.3)",
        (Patch(PrefillRooms, "on_write_result", _failed_write_is_done),),
        flavour="settling",
    ),
    Mutant(
        "clean-after-failure",
        "a room with a failed write drains clean",
        (Patch(PrefillRooms, "_close_if_drained", _clean_after_failure),),
        flavour="settling",
    ),
    Mutant(
        "old-request-opens-a-room",
        "epochs are ignored, and an abort does not raise the mark (6.1.6)",
        (Patch(PrefillRooms, "_on_stranger", _epochs_ignored), Patch(PrefillRooms, "_on_abort", _no_mark)),
        flavour="stalled",
    ),
    Mutant(
        "highest-epoch-kept",
        "who said hello in another's name keeps that node out for good (6.5)",
        (Patch(PrefillRooms, "_on_hello", _highest_epoch_kept),),
        flavour="stormy",
    ),
    Mutant(
        "renewed-not-asked",
        "a process whose memory came back is not asked what it wrote before (6.4)",
        (Patch(decode_rooms, "is_same_process", _only_equal_incarnations),),
        flavour="stormy",
        found_by=44,
    ),
    Mutant(
        "weights-not-compared",
        "a pair of different weights shakes hands (5.12)",
        (
            Patch(prefill_rooms, "refusal", _weights_not_compared),
            Patch(PrefillRooms, "_on_request", _versions_not_compared),
            Patch(DecodeRooms, "_crosses_versions", _nothing_crosses),
            Patch(Waiting, "accept", _any_version_accepted),
            Patch(registry, "may_pair", _any_may_pair),
        ),
        flavour="updated",
        found_by=12,
    ),
    Mutant(
        "sources-stay-locked",
        "an aborted prompt's cached pages stay locked (6.1.12)",
        (Patch(PrefillScheduler, "_release", _sources_stay_locked),),
    ),
    Mutant(
        "sources-unlocked-early",
        "source pages may be evicted while the last ones travel (6.1.1)",
        (Patch(PrefillJobs, "_insert_into_cache", _sources_unlocked_early),),
        flavour="crowded",
        found_by=11,
    ),
    Mutant(
        "freed-under-a-prefill",
        "an aborted prompt's pages are free while a forward writes them",
        (Patch(PrefillJobs, "_free_if_unused", _freed_under_a_forward),),
    ),
    Mutant(
        "freed-under-a-step",
        "a cancelled choice's pages are free while a step writes them",
        (Patch(Running, "_end", _decode_frees_under_a_forward),),
    ),
    Mutant(
        "cache-survives-weights",
        "the prefix cache is kept over an update of weights (6.4)",
        (Patch(PrefillScheduler, "renew", _cache_survives_weights),),
        flavour="updated",
    ),
    Mutant(
        "partial-page-shared",
        "choices share the prompt's partial page too",
        (Patch(RequestPages, "fork", _partial_page_shared),),
    ),
    Mutant(
        "room-not-aborted",
        "prefill is not told that the client has left (5: #9817)",
        (Patch(Handoffs, "_drop", _room_not_aborted),),
    ),
    Mutant(
        "locks-ignored",
        "locked prefixes can be evicted",
        (Patch(PrefixCache, "lock", _locks_ignored), Patch(PrefixCache, "unlock", _locks_ignored)),
    ),
    Mutant(
        "prefix-not-locked",
        "decode does not lock the cached prefix of a prompt that is handed off (6.1.1)",
        (Patch(RequestPages, "_lock_prefix", _prefix_not_locked),),
    ),
    Mutant(
        "delta-too-short",
        "a delta hand-off leaves out the first page that decode lacks",
        (Patch(PrefillRooms, "_on_request", _delta_too_short),),
    ),
    Mutant(
        "last-token-cached",
        "the last token's page is kept in decode's cache though its KV was never computed",
        (Patch(RequestPages, "free", _last_token_cached),),
        found_by=14,
    ),
    Mutant(
        "promises-forgotten",
        "pages that were promised to running choices are given to others",
        (Patch(RequestPages, "num_available", _promises_forgotten),),
        found_by=34,
    ),
    Mutant(
        "choices-tried-together",
        "choices that have tokens already share one new attempt",
        (Patch(RequestRecord, "has_tokens", _choices_tried_together),),
        found_by=9,
    ),
    Mutant(
        "pages-free-at-once",
        "the pages of a request that left while prefill writes them are free (6.1.1)",
        (Patch(Handoffs, "_give_up_pages", _pages_free_at_once),),
    ),
    Mutant(
        "promised-to-the-gone",
        "who leaves while it is handed off keeps what it was promised, and its prefix locked",
        (Patch(Handoffs, "_free", _promises_kept),),
    ),
    Mutant(
        "in-two-stages",
        "a request that was admitted stays in line",
        (Patch(Waiting, "remove", _stays_in_line),),
    ),
    Mutant(
        "cancelled-goes-on",
        "a choice that was cancelled in a forward goes on",
        (Patch(Running, "_apply_decoded", _cancelled_goes_on),),
    ),
    Mutant(
        "retracted-keeps-pages",
        "who is retracted takes its pages along",
        (Patch(Running, "_retract", _retracted_keeps_pages),),
        flavour="crowded",
        found_by=36,
    ),
    Mutant(
        "sent-before-computed",
        "pages travel as soon as their chunk is scheduled (6.1.2)",
        (
            Patch(PromptJob, "scheduled", _scheduled_is_computed),
            Patch(PromptJob, "computed", _scheduled_is_computed),
        ),
    ),
    Mutant(
        "cancelled-counts-on",
        "a client that left is load on its nodes for good",
        (Patch(Requests, "_close_attempt", _cancelled_counts_on),),
    ),
    Mutant(
        "sent-and-queued",
        "a request that was sent to a pair stays queued for another",
        (Patch(AdmissionQueue, "take", _stays_queued),),
    ),
    Mutant(
        "ended-request-stays-queued",
        "a request that has ended keeps its place in the queue",
        (Patch(AdmissionQueue, "remove_request", _stays_queued),),
    ),
    Mutant(
        "one-retry-only",
        "of choices that failed together only the first is tried again",
        (Patch(RequestRecord, "on_failed", _one_retry_only),),
    ),
    Mutant(
        "silence-is-waited-out",
        "what runs on a decode node that fell silent or died is not tried elsewhere",
        (Patch(Requests, "decode_suspected", _nothing),),
    ),
    Mutant(
        "deadlines-forgotten",
        "requests run, and wait, beyond their deadlines",
        (Patch(Requests, "expire", _deadlines_forgotten),),
    ),
    Mutant(
        "dead-nodes-remembered",
        "estimates of a node's load outlive the node",
        (Patch(Ledger, "forget_node", _nothing),),
    ),
    Mutant(
        "old-link-stays",
        "a node that was started again is connected under its old name too",
        (Patch(Members, "follow", _old_link_stays),),
    ),
    Mutant(
        "not-connected-again",
        "a node whose connection was lost is never connected again",
        (Patch(Members, "_open", _not_connected_again),),
    ),
    Mutant(
        "dead-connection-kept",
        "a connection on which no ping is answered is kept for good",
        (Patch(Members, "ping_unanswered", _no_events),),
    ),
    Mutant(
        "aborted-goes-on",
        "choices of an aborted request that wait for their turn are sent",
        (Patch(Requests, "abort", _aborted_goes_on),),
        flavour="ordered",
    ),
    Mutant(
        "retracted-runs-on",
        "what is retracted for new weights is told to stop and stays with its node",
        (Patch(Requests, "fail_attempt", _told_and_not_tried_again),),
        flavour="ordered",
    ),
    Mutant(
        "released-twice",
        "pages are released at Drained(failed), and once more when they have settled",
        (Patch(DecodeRooms, "_settle", _released_twice),),
    ),
    Mutant(
        "late-orders-done",
        "a node does what it was ordered when who ordered it has given up",
        (Patch(Order, "is_over", _nothing),),
        flavour="overruled",
        found_by=119,
    ),
)
