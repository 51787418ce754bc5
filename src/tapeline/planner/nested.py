"""Nested recomputation: what still saves memory below "all inputs on the device" when no other tier may hold them.

A stage's input is kept while the stages after it run forward without saving, run backward, and give their memory back; then
the stages before are run again from it. The fastest schedule of this kind is found; one that drops an input early
and makes it again later can be a little faster still.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from tapeline.planner.nested_intervals import Least, Slots
from tapeline.planner.nested_schedule import Nested, Operation, replay, run
from tapeline.planner.route import Route
from tapeline.planner.saving import Line, check_budget, does_not_fit
from tapeline.planner.segments import Segments, find_segments, smallest_segments, solve_segments

__all__ = ["Nested", "Operation", "Segments", "replay", "smallest_nested", "solve_nested", "solve_segments"]


def solve_nested(route: Route, device_bytes: float, *, slots: int = 500) -> Nested:
    """The fastest schedule on the device alone, with stages run forward as often as that takes.

    Args:
        route: the step.
        device_bytes: what the device may hold.
        slots: into how many parts memory is divided; more are more exact and take longer.

    Raises:
        InfeasibleBudgetError: if no schedule fits; it says which budget is the smallest.
        UsageError: if the budget is negative.
    """
    check_budget(device_bytes, slots)
    found = min(_schedules(Line(route), device_bytes, slots), key=lambda nested: nested.seconds, default=None)
    if found is None:
        raise does_not_fit(device_bytes, smallest_nested(route))
    return found


def smallest_nested(route: Route) -> int:
    """The fewest bytes on the device for which there is a schedule, to the byte."""
    line = Line(route)
    if not line.savings:
        return math.ceil(line.fixed_peak)
    least = [Least(line).bytes + route.base_bytes, smallest_segments(route), smallest_segments(route, rebuilds="once")]
    return math.ceil(max(min(least), line.fixed_peak))


def _schedules(line: Line, device_bytes: float, slots: int) -> Iterator[Nested]:
    """Schedules within the budget; only the one that recomputes nothing if that is among them."""
    if line.fixed_peak > device_bytes:
        return
    again = sum(float(saving.seconds[0]) for saving in line.savings)
    fastest = _nested(line, again, line.single_pass([0] * len(line.savings)))
    if fastest.device_peak <= device_bytes:
        yield fastest
        return
    for slot, count in line.grids(device_bytes, slots):
        table = Slots(line, slot, count)
        if math.isfinite(table.seconds):
            yield _nested(line, table.seconds, table.recursion.operations(count))
    least, free = Least(line), device_bytes - line.route.base_bytes
    if least.bytes <= free:
        operations = least.recursion.operations(free)
        yield _nested(line, run(line.route, operations)[0] - line.route.base_seconds, operations)
    for rebuilds in ("each", "once"):
        segments = find_segments(line, device_bytes, slots, rebuilds)
        if segments is not None:
            yield segments.schedule


def _nested(line: Line, again: float, operations: tuple[Operation, ...]) -> Nested:
    """A schedule that spends `again` seconds on running again."""
    peak = run(line.route, operations)[1]
    return Nested(seconds=line.route.base_seconds + again, device_peak=peak, operations=operations)
