"""Which parts a router has, and what each stands on: in its process, and in tests."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from ..api.generation import ModelCard
from ..links.entry_lookup import EntryLookup
from .administration import Administration, SessionCalls
from .connector import Connector
from .operator import ClusterOperator
from .options import RouterOptions
from .service import RouterService
from .state import RouterState
from .updates.coordinator import WeightUpdates
from .view import RouterView


@dataclass(frozen=True, slots=True)
class Router:
    """All stand on the service, which knows none of the others."""

    service: RouterService
    operator: ClusterOperator
    weights: WeightUpdates
    administration: Administration
    sessions: SessionCalls
    view: RouterView

    def start(self) -> None:
        self.service.start()
        self.service.spawn(self.weights.keep_together())

    async def close(self) -> None:
        """What runs fails."""
        await self.service.close()


def build_router(
    options: RouterOptions,
    *,
    model: ModelCard,
    connect: Connector,
    lookup: EntryLookup,
    static_urls: Sequence[str] = (),
    metrics_registry: CollectorRegistry | None = None,
    clock: Callable[[], float] = time.monotonic,
    unix_minus_monotonic_s: float = 0.0,
) -> Router:
    """Call it in a running loop."""
    state = RouterState(
        options,
        model=model,
        router_id=uuid.uuid4().hex,
        static_urls=static_urls,
        unix_minus_monotonic_s=unix_minus_monotonic_s,
    )
    service = RouterService(
        state, connect=connect, lookup=lookup, lease_s=options.timing.lease_s, clock=clock
    )
    operator = ClusterOperator(service)
    weights = WeightUpdates(options.timing, service=service, lookup=lookup, clock=clock)
    return Router(
        service,
        operator,
        weights,
        Administration(options.timing, service=service, weights=weights, operator=operator, lookup=lookup),
        SessionCalls(service, operator, clock),
        RouterView(
            options,
            model=model,
            service=service,
            metrics_registry=metrics_registry or CollectorRegistry(),
            clock=clock,
        ),
    )
