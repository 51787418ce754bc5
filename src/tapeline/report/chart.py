"""The chart of settings as numbers: device bytes across on a scale of octaves, slowdown up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tapeline.planner.forecast import Forecast
from tapeline.report.svg import Line, line

_LEFT, _RIGHT = 9.0, 95.0
_TOP, _BOTTOM = 36.0, 236.0
_PHONE = 340.0
_SIDES = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
_AWAY, _CLASH = 15.0, 13.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """A row of the table of settings, before it has a place."""

    number: int
    """Of its row, from 1."""
    label: str
    num_bytes: int
    slowdown: float
    fits: bool
    is_plan: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A spot in its place."""

    spot: Spot
    across: float
    down: float
    shift: tuple[float, float]
    """Pixels from the point to its number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """From bytes and slowdowns to places."""

    octaves: tuple[float, float]
    """Logarithms of the bytes at the left and at the right."""
    slowdowns: tuple[float, float]
    """At the bottom and at the top."""

    def across(self, size: float) -> float:
        """Percent of the width."""
        low, high = self.octaves
        return round(_LEFT + (_RIGHT - _LEFT) * (math.log2(max(1.0, size)) - low) / (high - low), 3)

    def down(self, slowdown: float) -> float:
        """Pixels from the top."""
        low, high = self.slowdowns
        return round(_BOTTOM - (_BOTTOM - _TOP) * (slowdown - low) / (high - low), 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Device bytes against slowdown."""

    points: tuple[Point, ...]
    sizes: tuple[tuple[float, float], ...]
    """Ticks across: where, and how many bytes."""
    slowdowns: tuple[tuple[float, float], ...]
    """Ticks down: where, and which slowdown."""
    budget: Line
    smallest: Line | None
    """The smallest budget that would do, if the plan does not fit."""
    bound: float | None
    """Where the level line of the lower bound is."""
    left: float = _LEFT
    right: float = _RIGHT
    bottom: float = _BOTTOM


def slowdown_chart(forecast: Forecast) -> Chart:
    """Every row at the smallest budget under which it runs, and the plan at the budget that it was made for."""
    spots, plan, bound = _spots(forecast), forecast.plan, forecast.bound_slowdown
    smallest = plan.device_bytes if plan.slowdown is None else None
    sizes = [forecast.budget_bytes, *(spot.num_bytes for spot in spots), *([] if smallest is None else [smallest])]
    scale = Scale(
        octaves=_octaves(sizes),
        slowdowns=_slowdowns([*(spot.slowdown for spot in spots), *([] if bound is None else [bound])]),
    )
    places = [(scale.across(spot.num_bytes), scale.down(spot.slowdown)) for spot in spots]
    points = [
        Point(spot=spot, across=across, down=down, shift=shift)
        for spot, (across, down), shift in zip(spots, places, _beside(places), strict=True)
    ]
    return Chart(
        points=tuple(points),
        sizes=tuple((scale.across(size), size) for size in _size_ticks(*scale.octaves)),
        slowdowns=tuple((scale.down(slowdown), slowdown) for slowdown in _slowdown_ticks(*scale.slowdowns)),
        budget=line(scale.across(forecast.budget_bytes), "budget", forecast.budget_bytes),
        smallest=None if smallest is None else line(scale.across(smallest), "smallest budget", smallest),
        bound=None if bound is None else scale.down(bound),
    )


def _spots(forecast: Forecast) -> list[Spot]:
    """A plan that does not fit has no slowdown: it is a line, not a spot."""
    spots = []
    for number, row in enumerate(forecast.rows, 1):
        is_plan = number == len(forecast.rows)
        if is_plan and row.slowdown is None:
            continue
        spot = Spot(
            number=number,
            label=row.name,
            num_bytes=forecast.budget_bytes if is_plan else row.device_bytes,
            slowdown=row.slowdown_if_it_fits if row.slowdown is None else row.slowdown,
            fits=row.fits,
            is_plan=is_plan,
        )
        spots.append(spot)
    return spots


def _octaves(sizes: Sequence[int]) -> tuple[float, float]:
    low, high = (math.log2(max(1, size)) for size in (min(sizes), max(sizes)))
    spare = max(0.07 * (high - low), 0.5 - (high - low) / 2)
    return low - spare, high + spare


def _slowdowns(values: Sequence[float]) -> tuple[float, float]:
    low, high = min([1.0, *values]), max([1.0, *values])
    span = max(high - low, 0.2)
    return low - 0.1 * span, low + 1.15 * span


def _size_ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Powers of two; halfway between them too where there are few."""
    found: list[float] = []
    for parts in (1, 2, 4):
        powers = range(math.floor(low), math.ceil(high) + 1)
        found = [2.0**power * (1 + part / parts) for power in powers for part in range(parts)]
        found = [size for size in found if low <= math.log2(size) <= high]
        if len(found) > 1:
            break
    return found[:: math.ceil(len(found) / most) or 1]


def _slowdown_ticks(low: float, high: float, most: int = 5) -> list[float]:
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(unit * factor for factor in (1, 2, 5, 10) if (high - low) / (unit * factor) <= most)
    return [round(step * k, 6) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _beside(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where the numbers of points stand, so that none covers a point or another number on a narrow screen."""
    taken = [(across * _PHONE / 100, down) for across, down in places]
    shifts = []
    for x, y in taken[: len(places)]:
        around = [(x + dx * _AWAY, y + dy * _AWAY) for dx, dy in _SIDES]
        free = [p for p in around if all(abs(p[0] - a) >= _CLASH or abs(p[1] - b) >= _CLASH for a, b in taken)]
        chosen = (free or around)[0]
        taken.append(chosen)
        shifts.append((round(chosen[0] - x, 1), round(chosen[1] - y, 1)))
    return shifts
