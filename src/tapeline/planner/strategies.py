"""The settings that people know, as placements: what each would need and take on the same route."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tapeline.planner.placements import Options, Pair, placements
from tapeline.planner.route import Budgets, Links, Route
from tapeline.planner.stage import Stage
from tapeline.planner.timeline import DoesNotFit, Timeline, simulate

_SMALL = 1024
_UNLIMITED = 1e18


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a setting takes; without a timeline it does not fit."""

    name: str
    words: str
    """How it is asked for elsewhere."""
    device_bytes: float
    """Peak of the device, nothing fetched earlier than one value ahead of its need."""
    free_seconds: float
    """Time of a step on a device that is large enough."""
    timeline: Timeline | None
    """Under the budgets; ``None`` if it does not fit."""


def _none(stage: Stage) -> Pair:
    return stage.held | frozenset(stage.needed), frozenset()


def _recompute(stage: Stage) -> Pair:
    return stage.held | {0}, frozenset()


def _offload(stage: Stage) -> Pair:
    return stage.held, frozenset((0,))


def _offload_all(stage: Stage) -> Pair:
    moved = frozenset(v for v in stage.needed if stage.sizes[v] >= _SMALL) - stage.held
    return stage.held | (frozenset(stage.needed) - moved), moved


STRATEGIES: dict[str, tuple[str, Callable[[Stage], Pair]]] = {
    "none": ("no activation checkpointing", _none),
    "recompute": ("transformers activation_checkpointing=True", _recompute),
    "offload": ('"unsloth": block inputs on the host', _offload),
    "offload everything": ("TRL activation_offloading=True", _offload_all),
}
"""By name: how it is asked for elsewhere, and what it keeps and moves of a stage."""


def outcomes(route: Route, budgets: Budgets, links: Links) -> list[Outcome]:
    """Every known setting on a route, run on paper."""
    return [outcome(route, name, budgets, links) for name in STRATEGIES]


def outcome(route: Route, name: str, budgets: Budgets, links: Links) -> Outcome:
    """One setting on a route.

    Args:
        route: the step.
        name: of `STRATEGIES`.
        budgets: bytes of each tier.
        links: bytes per second.
    """
    words, place = STRATEGIES[name]
    options: dict[int, Options] = {}
    for stage in route.stages:
        if id(stage) not in options:
            pair = (frozenset[int](), frozenset[int]()) if stage.is_frozen else place(stage)
            options[id(stage)] = placements(stage, only=[pair], is_lazy=False)
    fixed = replace(route, options=tuple(options[id(stage)] for stage in route.stages))
    chosen = (0,) * len(route.stages)
    try:
        timeline = simulate(fixed, chosen, budgets, links)
    except DoesNotFit:
        timeline = None
    free = simulate(fixed, chosen, Budgets(device=_UNLIMITED), links)
    least = _least(fixed, chosen, links, free.device_peak)
    return Outcome(name=name, words=words, device_bytes=least, free_seconds=free.seconds, timeline=timeline)


def _least(route: Route, chosen: tuple[int, ...], links: Links, most: float) -> float:
    """The smallest device budget under which a plan runs, found between 0 and one that is enough."""
    low, high = 0.0, most
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        try:
            high = simulate(route, chosen, Budgets(device=middle), links).device_peak
        except DoesNotFit:
            low = middle
    return high
