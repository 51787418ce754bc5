"""The fastest placement over device, host and disk that keeps to its budgets, with a bound below which no plan can go.

The relaxation says which mixture of options each stage should have. A plan takes one option per stage such that the running totals of
kept bytes, moved bytes and time stay close to those of the mixture (error diffusion along the chain); each candidate is run on
paper, and the fastest that fits is improved by changing single stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from tapeline.planner.placements import Floats, Options
from tapeline.planner.relaxation import Mixture, Relaxation
from tapeline.planner.route import Budgets, Links, Route
from tapeline.planner.tightest import Smallest, smallest, tightest
from tapeline.planner.timeline import DoesNotFit, Timeline, simulate

_GOAL = 0.002
_COARSE = 0.01
_MAX_PLANS = 7000
_MARGINS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
_NEAR = (0.0, 0.003, 0.01, 0.05)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hybrid:
    """A plan for a route."""

    chosen: tuple[int, ...]
    """The option of each stage."""
    timeline: Timeline = field(repr=False)
    lower_bound: float
    """Seconds that no plan within the budgets goes below."""

    @property
    def gap(self) -> float:
        """How much slower than the bound the plan is, as a share of the step."""
        return self.timeline.seconds / self.lower_bound - 1


class Infeasible(Exception):  # noqa: N818 - an answer, not a failure
    """No plan was found within the budgets; `smallest` is the plan with the smallest device peak under the other budgets."""

    def __init__(self, smallest: Smallest | None) -> None:
        needed = (
            "whatever the device has"
            if smallest is None
            else f"the smallest plan needs {smallest.device_bytes:.0f} bytes"
        )
        super().__init__(f"nothing fits: {needed}")
        self.smallest = smallest


class _Search:
    """Candidates, each run once; the fastest is remembered."""

    def __init__(self, route: Route, budgets: Budgets, links: Links) -> None:
        self.route, self.budgets, self.links = route, budgets, links
        self.best: tuple[int, ...] | None = None
        self.timeline: Timeline | None = None
        self.tried: set[tuple[int, ...]] = set()

    @property
    def seconds(self) -> float:
        return self.timeline.seconds if self.timeline is not None else float("inf")

    def try_(self, chosen: Sequence[int]) -> bool:
        """Run a candidate; whether it is the best so far."""
        key = tuple(chosen)
        if key in self.tried:
            return False
        self.tried.add(key)
        try:
            found = simulate(self.route, key, self.budgets, self.links)
        except DoesNotFit:
            return False
        if found.seconds < self.seconds:
            self.best, self.timeline = key, found
            return True
        return False


def solve(
    route: Route, budgets: Budgets, links: Links, *, tries: int = 100, also: Sequence[Sequence[int]] = ()
) -> Hybrid:
    """Place the values of a step.

    Args:
        route: the step.
        budgets: bytes of each tier.
        links: bytes per second.
        tries: changes of single stages to try while the plan is not within 0.2 % of the bound.
        also: plans to try as well, such as that of a smaller budget; the answer is not slower than those of them that fit.

    Raises:
        Infeasible: if no plan was found.
    """
    search = _Search(route, budgets, links)
    if search.try_(keep_everything(route)) and search.best is not None and search.timeline is not None:
        return Hybrid(chosen=search.best, timeline=search.timeline, lower_bound=route.base_seconds)
    bound = Relaxation(route, budgets, links, is_safe=False)
    mixture = bound.solve()
    goal = mixture.lower_bound * (1 + _GOAL)
    for candidate in also:
        search.try_(candidate)
    if not mixture.excess_bytes:
        _round_margins(search, route, bound.columns, goal)
        _improve(search, mixture, goal, tries)
        if search.seconds > mixture.lower_bound * (1 + _COARSE):  # little room for what comes early: look closer
            _round_margins(search, route.refined(), bound.columns, goal)
            _improve(search, mixture, goal, tries)
    if search.best is None:
        for candidate in tightest(route, budgets):
            search.try_(candidate)
        _improve(search, mixture, goal, tries)
    if search.best is None or search.timeline is None:
        raise Infeasible(smallest(route, budgets, links))
    return Hybrid(chosen=search.best, timeline=search.timeline, lower_bound=mixture.lower_bound)


def keep_everything(route: Route) -> tuple[int, ...]:
    """The plan that recomputes and moves nothing, with the fewest bytes for that."""
    chosen = []
    for options in route.choices:
        work = options.seconds.sum(axis=1) + options.moved_bytes
        chosen.append(int(np.lexsort((options.kept_bytes, work))[0]))
    return tuple(chosen)


def _round_margins(search: _Search, route: Route, columns: list[set[int]], goal: float) -> None:
    """Round the safe reading at the budget and a little below it: a rounded plan needs more at some points."""
    largest = max(size for stage in route.stages for size in stage.sizes)
    budgets = search.budgets
    for margin in _MARGINS:
        tighter = Budgets(device=budgets.device - margin * largest, host=budgets.host, disk=budgets.disk)
        safe = Relaxation(route, tighter, search.links, is_safe=True, columns=columns)
        mixture = safe.solve()
        if mixture.excess_bytes and search.best is not None:
            return
        for candidate in _rounded(route, mixture):
            search.try_(candidate)
        if search.seconds <= goal:
            return


def _improve(search: _Search, mixture: Mixture, goal: float, tries: int) -> None:
    """Change single stages, those options first that the bound likes best; of a short chain, try all there is.

    An option whose reduced cost is above the distance to the bound is in no better plan.
    """
    while search.best is not None and search.seconds > goal:
        before = search.seconds
        liked = [_liked(costs, before - mixture.lower_bound) for costs in mixture.reduced_costs]
        if math.prod(map(len, liked)) <= _MAX_PLANS:
            _try_all(search, mixture, liked)
            return
        moves = sorted((cost, stage, option) for stage, options in enumerate(liked) for option, cost in options.items())
        for _, stage, option in moves:
            chosen = list(search.best)
            chosen[stage] = option
            if tries == 0 or search.seconds <= goal:
                return
            tries -= tuple(chosen) not in search.tried
            search.try_(chosen)
        if search.seconds >= before:
            return


def _liked(costs: Floats, limit: float) -> dict[int, float]:
    return {int(option): float(costs[option]) for option in np.nonzero(costs < limit)[0]}


def _try_all(search: _Search, mixture: Mixture, liked: Sequence[dict[int, float]]) -> None:
    plans = ((sum(cost for _, cost in plan), plan) for plan in product(*(options.items() for options in liked)))
    for cost, plan in sorted(plans):
        if cost > search.seconds - mixture.lower_bound:
            return
        search.try_(tuple(option for option, _ in plan))


def _rounded(route: Route, mixture: Mixture) -> Iterator[tuple[int, ...]]:
    """Plans whose running totals follow the mixture's, from few options to many."""
    for near in _NEAR:
        limit = near * route.base_seconds / max(1, len(route.stages))
        for weights in ((1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (1.0, 3.0, 1.0)):
            yield _diffused(route, mixture, limit, np.array(weights))


def _diffused(route: Route, mixture: Mixture, limit: float, weights: Floats) -> tuple[int, ...]:
    tables = {id(options): _totals(options) for options in route.choices}
    error = np.zeros(3)
    chosen = []
    scale = np.zeros(3)
    for options, shares in zip(route.choices, mixture.shares, strict=True):
        scale += sum(share * tables[id(options)][option] for option, share in shares.items())
    scale = np.maximum(scale / max(1, len(route.stages)), 1e-12)
    for number, options in enumerate(route.choices):
        shares, table = mixture.shares[number], tables[id(options)]
        wanted = error + sum(share * table[option] for option, share in shares.items())
        candidates = np.array(
            sorted({*shares, *np.nonzero(mixture.reduced_costs[number] < limit)[0].tolist()}), dtype=np.intp
        )
        off = (wanted - table[candidates]) / scale
        pick = int(candidates[np.argmin((weights * off**2).sum(axis=1))])
        error = wanted - table[pick]
        chosen.append(pick)
    return tuple(chosen)


def _totals(options: Options) -> Floats:
    return np.stack([options.kept_bytes, options.moved_bytes, options.seconds.sum(axis=1)], axis=1)
