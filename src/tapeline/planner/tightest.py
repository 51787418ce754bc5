"""The placements that need the least of the device, whatever time they take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tapeline.planner.route import Budgets, Links, Route
from tapeline.planner.timeline import DoesNotFit, Timeline, simulate

_PRICES = (0.0, 0.01, 0.1, 0.3, 0.6, 1.0, 2.0, 10.0)
_PRECISION = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Smallest:
    """The plan with the smallest device peak."""

    device_bytes: float
    """A device budget that it fits; a little less and nothing does."""
    chosen: tuple[int, ...]
    timeline: Timeline = field(repr=False)


def tightest(route: Route, budgets: Budgets) -> Iterator[tuple[int, ...]]:
    """Plans that fit the device if any does, from those that move what they can to those that move little.

    Stage by stage, the option that leaves the least behind among those whose working sets fit on top of what is there already:
    keeping less never makes it worse for the stages after. What it costs the host is priced.
    """
    for price in _PRICES if budgets.host + budgets.disk > 0 else (math.inf,):
        chosen = _least_kept(route, budgets.device, price)
        if chosen is not None:
            yield chosen


def smallest(route: Route, budgets: Budgets, links: Links) -> Smallest | None:
    """The plan with the smallest device peak under the budgets of the other tiers; ``None`` if those cannot be kept to."""
    best: Smallest | None = None
    for price in _PRICES if budgets.host + budgets.disk > 0 else (math.inf,):
        low, high = 0.0, 2.0 * _upper(route)
        while high - low > _PRECISION * high:
            middle = (low + high) / 2
            limit = Budgets(device=middle, host=budgets.host, disk=budgets.disk)
            chosen = _least_kept(route, middle, price)
            found = _run(route, chosen, limit, links) if chosen is not None else None
            if chosen is None or found is None:
                low = middle
                continue
            high = middle
            if best is None or middle < best.device_bytes:
                best = Smallest(device_bytes=middle, chosen=chosen, timeline=found)
    return best


def _run(route: Route, chosen: tuple[int, ...], budgets: Budgets, links: Links) -> Timeline | None:
    try:
        return simulate(route, chosen, budgets, links)
    except DoesNotFit:
        return None


def _least_kept(route: Route, device: float, price: float) -> tuple[int, ...] | None:
    limit, kept = device - route.base_bytes, 0.0
    chosen = []
    for number, options in enumerate(route.choices):
        forward = kept + options.forward_peak.max(axis=1) <= limit
        backward = kept + options.kept_bytes + options.backward_peak.max(axis=1) + route.gradient_bytes[number] <= limit
        fits = forward & (backward | route.stages[number].is_frozen)
        cost = options.kept_bytes + (0.0 if math.isinf(price) else price * options.moved_bytes)
        allowed = np.nonzero(fits & (options.moved_bytes == 0) if math.isinf(price) else fits)[0]
        if not len(allowed):
            return None
        times = options.seconds.sum(axis=1)
        pick = allowed[np.lexsort((times[allowed], cost[allowed]))[0]]
        kept += float(options.kept_bytes[pick])
        chosen.append(int(pick))
    return tuple(chosen)


def _upper(route: Route) -> float:
    """Bytes that any plan fits."""
    blocks = sum(sum(stage.sizes) for stage in route.stages)
    running = max(
        (op.backward_bytes + op.temporary_bytes + op.incoming_bytes for stage in route.stages for op in stage.ops),
        default=0,
    )
    fixed = route.base_bytes + route.loss_bytes + route.boundary_bytes + route.optimizer_bytes
    return 1.0 + fixed + blocks + running + max(route.gradient_bytes)
