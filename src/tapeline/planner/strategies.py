"""The settings that people know, as placements: what each would need and take on the same route."""

from __future__ import annotations

import math
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """A setting that people know."""

    words: str
    """How it is asked for."""
    place: Callable[[Stage], Pair]
    """What it keeps and moves of a stage."""
    every: int = 1
    """It takes every so manieth stage, the first among them; the others keep everything."""
    is_in_turn: bool = False
    """Copies run on the compute stream: nothing else goes on meanwhile."""


_TRANSFORMERS = "transformers activation_checkpointing"
STRATEGIES: dict[str, Strategy] = {
    "none": Strategy(words="no activation checkpointing", place=_none),
    "every 4th": Strategy(words=f'{_TRANSFORMERS}_kwargs={{"every_n_layers": 4}}', place=_recompute, every=4),
    "every 2nd": Strategy(words=f'{_TRANSFORMERS}_kwargs={{"every_n_layers": 2}}', place=_recompute, every=2),
    "recompute": Strategy(words=f"{_TRANSFORMERS}=True", place=_recompute),
    "offload in turn": Strategy(words=f'{_TRANSFORMERS}_kwargs={{"offload": True}}', place=_offload, is_in_turn=True),
    "offload": Strategy(words='"unsloth": block inputs on the host', place=_offload),
    "offload everything": Strategy(words="TRL activation_offloading=True", place=_offload_all),
}
"""By name, those that keep most first."""


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
    strategy = STRATEGIES[name]
    known: dict[tuple[int, bool], Options] = {}
    options = []
    for number, stage in enumerate(route.stages):
        is_taken = number % strategy.every == 0
        key = id(stage), is_taken
        if key not in known:
            known[key] = _options(stage, strategy, links, is_taken=is_taken)
        options.append(known[key])
    fixed = replace(route, stages=tuple(one.stage for one in options), options=tuple(options))
    if strategy.is_in_turn:
        links = replace(links, to_host=math.inf, to_device=math.inf, latency=0.0)  # the stages wait themselves
    chosen = (0,) * len(route.stages)
    try:
        timeline = simulate(fixed, chosen, budgets, links)
    except DoesNotFit:
        timeline = None
    free = simulate(fixed, chosen, Budgets(device=_UNLIMITED), links)
    least = _least(fixed, chosen, links, free.device_peak)
    return Outcome(name=name, words=strategy.words, device_bytes=least, free_seconds=free.seconds, timeline=timeline)


def _options(stage: Stage, strategy: Strategy, links: Links, *, is_taken: bool) -> Options:
    if stage.is_frozen:
        return placements(stage, only=[(frozenset(), frozenset())], is_lazy=False)
    kept, moved = strategy.place(stage) if is_taken else _none(stage)
    if strategy.is_in_turn and moved:
        stage = _waiting(stage, sum(stage.sizes[value] for value in moved), links)
    return placements(stage, only=[(kept, moved)], is_lazy=False)


def _waiting(stage: Stage, num_bytes: int, links: Links) -> Stage:
    """The stage with the time of its copies: out at the end of its forward, back at the beginning of its backward."""
    last = stage.ops[-1]
    out, back = (num_bytes / rate + links.latency for rate in (links.to_host, links.to_device))
    waiting = replace(last, seconds=last.seconds + out, backward_seconds=last.backward_seconds + back)
    return replace(stage, ops=(*stage.ops[:-1], waiting))


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
