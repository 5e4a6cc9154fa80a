"""What happens in one seed: which nodes, which requests, which faults and when. All of it can be dropped.

A plan is drawn from its seed alone. Parts of it have short names (`n1` a node, `r3` a request, `f0` a fault,
`o0` an order, `slow` a rate), by which a failing seed is shrunk and its smaller form replayed.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum

from ..api.generation import UpdateMode
from ..messages.node import Role
from .network import Latency
from .nodes import Settings
from .tokens import PAGE_SIZE, expected_tokens, prompt_of
from .wire import WireQuality

READY_S = 0.5  # the cluster is given this long before the first request
FAULTS_UNTIL_S = 5.0  # after the start: then nodes go on or are started again, and nothing fails any more
MAX_PAGES = 32  # of a decode node's pool
OVERSIZED_RATE = 0.04  # of the seeds: one of its requests fits into no pool
MAX_PROMPT_TOKENS = 36
STORM_RATE = 0.1  # of the seeds: control messages storm in on a node
ORDER_RATE = 0.2  # of the seeds: operators give a router orders


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestPlan:
    name: str
    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int
    num_choices: int
    stop_token_ids: tuple[int, ...]
    streams: bool
    timeout_s: float
    router: int
    leaves_after_s: float | None  # the client is gone then
    stops_choice_at: int | None  # the reader wants no more of choice 0 once it has so many tokens


class FaultKind(Enum):
    CRASH = "crash"
    FREEZE = "freeze"
    CUT_PEER = "cut_peer"
    STALL = "stall"  # what is sent to a prefill node from now on comes late
    CUT_ROUTER = "cut_router"
    REPLACE = "replace"  # another life begins at its address while it is frozen; then it goes on
    UPDATE = "update"
    STORM = "storm"  # control messages of any kind to it, and to others in its name


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    name: str
    kind: FaultKind
    at_s: float
    node: int
    length_s: float  # of a freeze; until a crashed node is started again
    silently: bool
    proof_after_s: float | None  # a crash: its death is proven after so long, while the cluster runs


class OrderKind(Enum):
    """What a router's operators do to it. Nodes are not told: each router has its own."""

    ABORT = "abort"
    PAUSE = "pause"
    HOLD_WAIT = "hold, wait"
    HOLD_ABORT = "hold, abort"
    HOLD_RETRACT = "hold, retract"
    LISTEN = "listen"
    STAND_STILL = "stand still"

    @property
    def mode(self) -> UpdateMode:
        """Of a hold."""
        return _MODES[self]


_MODES: dict[OrderKind, UpdateMode] = {
    OrderKind.HOLD_WAIT: "wait",
    OrderKind.HOLD_ABORT: "abort",
    OrderKind.HOLD_RETRACT: "retract",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    name: str
    kind: OrderKind
    at_s: float
    router: int
    length_s: float  # 0 of an abort
    num_requests: int  # that an abort ends


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    seed: int
    roles: dict[int, Role]
    num_routers: int
    requests: tuple[RequestPlan, ...]
    faults: tuple[Fault, ...]
    orders: tuple[Order, ...]
    settings: Settings
    latency: Latency
    quality: WireQuality
    forward_s: float

    def parts(self) -> list[str]:
        """The names of all that can be dropped, the largest first."""
        rates = [name for name in RATES if _rate(self, name)]
        return [
            *(f"f{fault.name}" for fault in self.faults),
            *(f"o{order.name}" for order in self.orders),
            *(f"r{request.name}" for request in self.requests),
            *rates,
            *(f"n{node}" for node in self.roles),
        ]


RATES = ("late", "slow", "fail", "deliver", "twice", "contact", "freeze")
# What a seed has more of than of the rest.
FLAVOURS = (
    "mixed",
    "mixed",
    "mixed",
    "settling",
    "replaced",
    "killed",
    "stalled",
    "crowded",
    "early",
    "updated",
)
STORMY, ORDERED = "stormy", "ordered"  # beside any of them
OVERRULED = "overruled"  # stormy, and orders come when the contrary was ordered since
_BESIDE = (STORMY, ORDERED, OVERRULED)
_FIELDS = {
    "slow": "slow_rate",
    "fail": "fail_rate",
    "deliver": "fail_but_deliver_rate",
    "twice": "twice_rate",
    "contact": "contact_fail_rate",
    "freeze": "freeze_rate",
}


def _rate(plan: Plan, name: str) -> float:
    return plan.latency.late_rate if name == "late" else float(getattr(plan.quality, _FIELDS[name]))


def make_plan(seed: int, dropped: Collection[str] = (), flavour: str = "") -> Plan:
    """The seed's plan without the parts named in `dropped`, with another flavour if one is named.

    Raises ValueError for a part or a flavour that is none.
    """
    if flavour not in ("", *_BESIDE, *FLAVOURS):
        names = ", ".join(sorted({*_BESIDE, *FLAVOURS}))
        raise ValueError(f"there is no flavour {flavour!r}; there are {names}")
    draw = random.Random(f"plan/{seed}")
    roles: dict[int, Role] = {0: "prefill", 1: "decode"}
    for node in range(2, draw.choice((2, 3, 3, 4, 4))):
        roles[node] = draw.choice(("prefill", "decode"))
    num_routers = draw.choice((1, 1, 1, 2))
    is_calm = draw.random() < 0.05  # nothing fails: every request must end well
    drawn = "calm" if is_calm else draw.choice(FLAVOURS)
    flavour = flavour or drawn
    settings = Settings(
        prefill_pages=draw.randint(13, 16 if flavour == "crowded" else 28),
        decode_pages=draw.randint(14, MAX_PAGES),
        chunk_tokens=draw.choice((4, 8, 12, 16)),
        max_rows=draw.choice((2, 4, 16)),
        max_waiting=draw.choice((3, 4) if flavour == "crowded" else (1, 1, 2, 4)),
        max_running=draw.choice((3, 4, 8)),
        has_cache=draw.random() < 0.8,
        decode_has_cache=draw.random() < 0.8,
        local_prefill_threshold=draw.choice((None, 0, 6)),
        local_prefill_chunk=draw.choice((4, 8)),
        conservativeness=draw.choice((1.0, 0.3, 0.01)),
        verify_pages=draw.choice(("off", "off", "sample", "all")),
    )
    quality = WireQuality(
        usual_s=draw.choice((0.0005, 0.003, 0.02)),
        slow_rate=draw.choice((0.0, 0.05, 0.3)),
        fail_rate=draw.choice((0.0, 0.05, 0.2)),
        fail_but_deliver_rate=draw.choice((0.0, 0.05)),
        twice_rate=draw.choice((0.0, 0.2)),
        contact_fail_rate=draw.choice((0.0, 0.1)),
        freeze_rate=draw.choice((0.0, 0.5)),
        settle_s=draw.choice((0.0, 2.0, 2.0, 2.0)),
    )
    latency = Latency(
        usual_s=draw.choice((0.0002, 0.002)),
        late_rate=draw.choice((0.0, 0.05)),
        late_s=draw.choice((0.1, 0.6, 3.0)),
    )
    forward_s = 0.03 if flavour == "crowded" else draw.choice((0.002, 0.01, 0.03))
    requests = [_request(draw, index, num_routers, settings) for index in range(draw.randint(1, 8))]
    requests = [_as_next_turn(draw, request, requests[:index]) for index, request in enumerate(requests)]
    if random.Random(f"oversized/{seed}").random() < OVERSIZED_RATE:
        requests[-1] = replace(requests[-1], max_tokens=MAX_PAGES * PAGE_SIZE + 1, stop_token_ids=())
    faults = [_fault(draw, index, roles) for index in range(draw.choice((0, 1, 2, 3, 4)))]
    match flavour:
        case "calm":
            latency, quality, faults = replace(latency, late_rate=0.0), _perfect(quality), []
        case "settling":
            quality = replace(quality, fail_rate=0.3, freeze_rate=0.9, settle_s=2.0)
        case "replaced":
            quality = replace(quality, slow_rate=0.5, slow_s=3.0)
            faults.append(_replacement(draw, len(faults)))
        case "killed":
            quality = replace(quality, slow_rate=0.6, slow_s=3.0, settle_s=2.0)
            faults.append(_killing(draw, len(faults)))
        case "crowded":
            requests = [_impatient(draw, request) for request in requests]
            quality = replace(quality, slow_rate=0.5, slow_s=0.8)
            settings = replace(settings, has_cache=True, local_prefill_threshold=0)
        case "stalled":
            quality = replace(quality, settle_s=draw.choice((0.0, 0.0, 2.0)))
            faults.append(_stall(draw, len(faults)))
        case "early":
            faults.append(_early_freeze(draw, len(faults), roles))
        case "updated":
            at_s = READY_S + draw.random()
            faults = [*faults[:1], _plain_fault(len(faults[:1]), FaultKind.UPDATE, 0, at_s, 0.0)]
    storms = random.Random(f"storms/{seed}")
    if flavour == OVERRULED:
        latency = replace(latency, late_rate=0.3, late_s=6.0)
    if flavour in (STORMY, OVERRULED) or (not is_calm and storms.random() < STORM_RATE):
        faults.append(_storm(storms, len(faults), roles))
    given, orders = random.Random(f"orders/{seed}"), []
    if flavour == ORDERED or (not is_calm and given.random() < ORDER_RATE):
        orders = [_order(given, index, num_routers) for index in range(given.randint(1, 3))]
    plan = Plan(
        seed=seed,
        roles=roles,
        num_routers=num_routers,
        requests=tuple(requests),
        faults=tuple(faults),
        orders=tuple(orders),
        settings=settings,
        latency=latency,
        quality=quality,
        forward_s=forward_s,
    )
    return _without(plan, dropped) if dropped else plan


def _request(draw: random.Random, index: int, num_routers: int, settings: Settings) -> RequestPlan:
    # Few families of prompts: those of one share pages.
    prompt = prompt_of(draw.randint(1, MAX_PROMPT_TOKENS), seed=draw.choice((0, 0, 1, 2 + index)))
    max_tokens = draw.choice((1, 1, 2, 4, 6, 10, 14))
    num_choices = draw.choice((1, 1, 1, 1, 2, 3))
    stop_token_ids: tuple[int, ...] = ()
    if draw.random() < 0.2:
        stop_token_ids = (expected_tokens(prompt, max_tokens)[draw.randrange(max_tokens)],)
    leaves_after_s = None
    if draw.random() < 0.35:
        leaves_after_s = draw.expovariate(1 / draw.choice((0.002, 0.02, 0.1, 0.5)))
    stops_choice_at = None
    if draw.random() < 0.3:
        stops_choice_at = draw.randint(1, max_tokens)
    return RequestPlan(
        name=str(index),
        at_s=READY_S + draw.choice((0.0, draw.random(), 4.0 * draw.random())),
        prompt=prompt,
        max_tokens=max_tokens,
        num_choices=num_choices,
        stop_token_ids=stop_token_ids,
        streams=draw.random() < 0.7,
        timeout_s=draw.choice((3.0, 8.0, 20.0)),
        router=draw.randrange(num_routers),
        leaves_after_s=leaves_after_s,
        stops_choice_at=stops_choice_at,
    )


def _as_next_turn(draw: random.Random, request: RequestPlan, earlier: list[RequestPlan]) -> RequestPlan:
    """Now and then a request goes on with an earlier one's conversation, soon after its answer."""
    if not earlier or draw.random() < 0.7:
        return request
    before = draw.choice(earlier)
    answer = expected_tokens(before.prompt, before.max_tokens)
    prompt = (*before.prompt, *answer, *request.prompt[: draw.randint(1, 6)])
    if len(prompt) > MAX_PROMPT_TOKENS:
        return request
    at_s = before.at_s + draw.choice((0.05, 0.3, 1.0)) * (1.0 + draw.random())
    return replace(request, prompt=prompt, at_s=at_s, stop_token_ids=())


def _fault(draw: random.Random, index: int, roles: dict[int, Role]) -> Fault:
    kind = draw.choice(
        (
            FaultKind.CRASH,
            FaultKind.CRASH,
            FaultKind.FREEZE,
            FaultKind.FREEZE,
            FaultKind.FREEZE,
            FaultKind.REPLACE,
            FaultKind.CUT_PEER,
            FaultKind.CUT_PEER,
            FaultKind.STALL,
            FaultKind.CUT_ROUTER,
            FaultKind.UPDATE,
        )
    )
    return Fault(
        name=str(index),
        kind=kind,
        at_s=READY_S * 0.5 + draw.random() * draw.choice((0.6, 1.5, 4.0)),
        node=draw.choice(list(roles)),
        length_s=draw.choice((0.1, 0.24, 0.6, 2.5, 3.5)) * (0.8 + 0.4 * draw.random()),
        silently=draw.random() < 0.4,
        proof_after_s=draw.random() * 2.0 if draw.random() < 0.5 else None,
    )


def _replacement(draw: random.Random, index: int) -> Fault:
    """A prefill node in mid-write gives its address away, and goes on long after."""
    at_s, length_s = READY_S + 1.2 * draw.random(), 3.0 + 1.2 * draw.random()
    return _plain_fault(index, FaultKind.REPLACE, 0, at_s, length_s)


def _killing(draw: random.Random, index: int) -> Fault:
    """A prefill node dies in mid-write, and its death is proven soon: what it sent may still come."""
    at_s = READY_S + 1.0 * draw.random()
    crash = _plain_fault(index, FaultKind.CRASH, 0, at_s, 0.1 + draw.random())
    return replace(crash, proof_after_s=0.3 * draw.random())


def _impatient(draw: random.Random, request: RequestPlan) -> RequestPlan:
    """It comes with the others, and its client leaves while it waits."""
    at_s = READY_S + 0.05 * draw.random()
    leaves_after_s = 0.02 + 0.3 * draw.random() if draw.random() < 0.5 else request.leaves_after_s
    return replace(request, at_s=at_s, leaves_after_s=leaves_after_s)


def _stall(draw: random.Random, index: int) -> Fault:
    """What is sent to a prefill node comes after its decode node has long connected anew."""
    at_s, length_s = READY_S * (0.5 + draw.random()), 1.2 + 2.0 * draw.random()
    return _plain_fault(index, FaultKind.STALL, 0, at_s, length_s)


def _storm(draw: random.Random, index: int, roles: dict[int, Role]) -> Fault:
    """Messages storm in while requests run."""
    at_s, length_s = READY_S * (0.2 + draw.random()), 0.5 + 3.0 * draw.random()
    return _plain_fault(index, FaultKind.STORM, draw.choice(list(roles)), at_s, length_s)


def _order(draw: random.Random, index: int, num_routers: int) -> Order:
    kind = draw.choice((OrderKind.ABORT, *OrderKind))
    return Order(
        name=str(index),
        kind=kind,
        at_s=READY_S * 0.5 + draw.random() * draw.choice((0.6, 4.0)),
        router=draw.randrange(num_routers),
        length_s=0.0 if kind is OrderKind.ABORT else draw.choice((0.05, 0.4, 1.5)) * (0.5 + draw.random()),
        num_requests=draw.choice((1, 8)),
    )


def _early_freeze(draw: random.Random, index: int, roles: dict[int, Role]) -> Fault:
    """A node stands still while pairs are made."""
    at_s, length_s = 0.004 * draw.random(), 0.1 + 2.0 * draw.random()
    return _plain_fault(index, FaultKind.FREEZE, draw.choice(list(roles)), at_s, length_s)


def _plain_fault(index: int, kind: FaultKind, node: int, at_s: float, length_s: float) -> Fault:
    return Fault(
        name=str(index),
        kind=kind,
        at_s=at_s,
        node=node,
        length_s=length_s,
        silently=False,
        proof_after_s=None,
    )


def _perfect(quality: WireQuality) -> WireQuality:
    return replace(quality, **dict.fromkeys(_FIELDS.values(), 0.0))


def _without(plan: Plan, dropped: Collection[str]) -> Plan:
    unknown = set(dropped) - {*plan.parts(), *RATES}
    if unknown:
        raise ValueError(f"seed {plan.seed} has no part {', '.join(sorted(unknown))}")
    roles = {node: role for node, role in plan.roles.items() if f"n{node}" not in dropped}
    if set(roles.values()) != {"prefill", "decode"}:
        raise ValueError("a prefill and a decode node are needed")
    rates = {_FIELDS[name]: 0.0 for name in RATES if name in dropped and name != "late"}
    return Plan(
        seed=plan.seed,
        roles=roles,
        num_routers=plan.num_routers,
        requests=tuple(each for each in plan.requests if f"r{each.name}" not in dropped),
        faults=tuple(each for each in plan.faults if f"f{each.name}" not in dropped and each.node in roles),
        orders=tuple(each for each in plan.orders if f"o{each.name}" not in dropped),
        settings=plan.settings,
        latency=replace(plan.latency, late_rate=0.0) if "late" in dropped else plan.latency,
        quality=replace(plan.quality, **rates),
        forward_s=plan.forward_s,
    )


def is_calm(plan: Plan) -> bool:
    """Nothing fails in it: every request must end well, unless its client leaves."""
    return not plan.faults and not plan.orders and not any(_rate(plan, name) for name in RATES)
