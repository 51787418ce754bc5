"""Segments: some stages keep their input, the inputs in between are made again from the last one that was kept.

After Chen, Xu, Zhang, Guestrin 2016, "Training Deep Nets with Sublinear Memory Cost", with segments of any length and an option for
each stage. Inputs are made again each time that one is needed, which costs a segment of k stages 0 + 1 + ... + (k - 1) forwards, or
once, when backward reaches the segment: k - 1 forwards, and all its inputs are there until their backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from tapeline.planner.nested_schedule import BACKWARD, CHECKPOINT, FORWARD, LOSS, SAVE, Nested, Operation, run
from tapeline.planner.route import Route
from tapeline.planner.saving import Line, check_budget, does_not_fit
from tapeline.planner.segment_table import Least, Pick, Rebuilds, Slots


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """A plan in segments."""

    keeps_input: tuple[bool, ...]
    """Whether each stage keeps its input; stages without backward keep nothing."""
    chosen: tuple[int, ...]
    """The option of each stage; 0 for stages without backward."""
    schedule: Nested = field(repr=False)

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.schedule.seconds

    @property
    def device_peak(self) -> float:
        """Bytes."""
        return self.schedule.device_peak


def solve_segments(route: Route, device_bytes: float, *, rebuilds: Rebuilds = "each", slots: int = 500) -> Segments:
    """The fastest plan in segments on the device alone.

    Args:
        route: the step.
        device_bytes: what the device may hold.
        rebuilds: make inputs again each time that one is needed, or once for the whole segment.
        slots: into how many parts memory is divided.

    Raises:
        InfeasibleBudgetError: if no plan fits; it says which budget is the smallest.
        UsageError: if the budget is negative.
    """
    check_budget(device_bytes, slots)
    found = find_segments(Line(route), device_bytes, slots, rebuilds)
    if found is None:
        raise does_not_fit(device_bytes, smallest_segments(route, rebuilds=rebuilds))
    return found


def smallest_segments(route: Route, *, rebuilds: Rebuilds = "each") -> int:
    """The fewest bytes on the device for which there is a plan in segments, to the byte."""
    line = Line(route)
    if not line.savings:
        return math.ceil(line.fixed_peak)
    return math.ceil(max(Least(line, rebuilds).bytes + route.base_bytes, line.fixed_peak))


def find_segments(line: Line, device_bytes: float, slots: int, rebuilds: Rebuilds) -> Segments | None:
    """The fastest plan, or ``None``."""
    return min(_plans(line, device_bytes, slots, rebuilds), key=lambda plan: plan.seconds, default=None)


def _plans(line: Line, device_bytes: float, slots: int, rebuilds: Rebuilds) -> Iterator[Segments]:
    if line.fixed_peak > device_bytes:
        return
    stages = len(line.savings)
    fastest = _segments(line, [Pick(number, 0) for number in range(stages)], rebuilds)
    if fastest.device_peak <= device_bytes:
        yield fastest
        return
    for slot, count in line.grids(device_bytes, slots):
        table = Slots(line, rebuilds, slot, count)
        if math.isfinite(table.seconds):
            yield _segments(line, table.recursion.picks(count), rebuilds)
    least, free = Least(line, rebuilds), device_bytes - line.route.base_bytes
    if least.bytes <= free:
        yield _segments(line, least.recursion.picks(free), rebuilds)


def _segments(line: Line, picks: list[Pick], rebuilds: Rebuilds) -> Segments:
    """The plan for the first stage of each stage's segment, and the row of its numbers."""
    operations = _operations(line, picks, rebuilds)
    seconds, peak = run(line.route, operations)
    frozen = line.route.num_frozen
    chosen = [int(saving.rows[row]) for saving, (_, row) in zip(line.savings, picks, strict=True)]
    pairs = enumerate(zip(line.savings, picks, strict=True))
    keeps = [head == stage and bool(saving.keeps_input[row]) for stage, (saving, (head, row)) in pairs]
    return Segments(
        keeps_input=(*[False] * frozen, *keeps),
        chosen=(*[0] * frozen, *chosen),
        schedule=Nested(seconds=seconds, device_peak=peak, operations=operations),
    )


def _operations(line: Line, picks: list[Pick], rebuilds: Rebuilds) -> tuple[Operation, ...]:
    stages = len(picks)
    done = line.frozen_forwards()
    for stage, (head, row) in enumerate(picks):
        done.append(line.operation(SAVE, stage, row, is_without_input=head < stage))
    done.append(line.operation(LOSS, stages))
    for stage in reversed(range(stages)):
        head, row = picks[stage]
        if rebuilds == "each" and head < stage and line.savings[stage].keeps_input[row]:
            done += [line.operation(FORWARD, before) for before in range(head, stage)]
        if rebuilds == "once" and head < stage and (stage + 1 == stages or picks[stage + 1][0] != head):
            for before in range(head, stage):
                done += [line.operation(FORWARD, before), line.operation(CHECKPOINT, before + 1)]
        done.append(line.operation(BACKWARD, stage, row))
    return tuple(done)
