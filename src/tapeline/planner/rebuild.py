"""The backward of a block on paper: what is recomputed when, and what is alive meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tapeline.planner.stage import Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """An instant of a block's backward."""

    op: int
    """The operation whose backward runs, or is about to."""
    seconds: float
    """How long it lasts."""
    alive: frozenset[int]
    """Values that are there."""
    extra_bytes: int
    """What else is there."""
    replays: int | None = None
    """The operation that is run again; ``None``: it is the backward itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebuild:
    """How backward runs when certain values are saved."""

    saved: frozenset[int]
    moments: tuple[Moment, ...]
    """In order of time."""
    first_need: dict[int, int]
    """For each saved value that is used, the moment at which it must be there."""
    last_need: dict[int, int]
    """The moment after which it may go."""
    seconds: tuple[float, ...]
    """Time of running operations again, by part whose backward waits for it."""
    flops: int


def rebuild(stage: Stage, saved: frozenset[int], *, is_lazy: bool = True) -> Rebuild:
    """Run the backward on paper: what is recomputed when, and what is alive meanwhile.

    Args:
        stage: the block.
        saved: the values that the forward leaves, wherever they are.
        is_lazy: recompute when a value is first needed; otherwise everything at the first need.

    Raises:
        ValueError: if something cannot be recomputed from what is saved.
    """
    events = _events(stage, saved, is_lazy=is_lazy)
    alive = _alive(stage, saved, events)
    first_need: dict[int, int] = {}
    last_need: dict[int, int] = {}
    seconds = [0.0] * stage.num_parts
    moments = []
    for number, (op, replays) in enumerate(events):
        running = stage.ops[op if replays is None else replays]
        for value in running.needs if replays is None else running.reads:
            if value in saved:
                first_need.setdefault(value, number)
                last_need[value] = number
        if replays is not None:
            seconds[stage.part_of[op]] += running.seconds
        moments.append(
            Moment(
                op=op,
                seconds=running.backward_seconds if replays is None else running.seconds,
                alive=frozenset(alive[number]),
                extra_bytes=running.backward_bytes if replays is None else stage.ops[op].incoming_bytes,
                replays=replays,
            )
        )
    flops = sum(stage.ops[replays].flops for _, replays in events if replays is not None)
    return Rebuild(
        saved=saved,
        moments=tuple(moments),
        first_need=first_need,
        last_need=last_need,
        seconds=tuple(seconds),
        flops=flops,
    )


def _events(stage: Stage, saved: frozenset[int], *, is_lazy: bool) -> list[tuple[int, int | None]]:
    """What backward runs: for each operation in reverse, the operations to run again for it, then its own backward."""
    order = [] if stage.is_frozen else list(reversed(range(len(stage.ops))))
    needs_from = stage.needed_from
    there: frozenset[int] = frozenset()
    events: list[tuple[int, int | None]] = []
    for place, number in enumerate(order):
        wanted = frozenset(stage.ops[number].needs)
        if not is_lazy and not wanted <= saved | there:
            wanted = needs_from[place]
        again = _closure(stage, wanted - saved - there, saved | there)
        events += [(number, op) for op in again]
        there = (there | {value for op in again for value in stage.ops[op].makes}) & needs_from[place] - saved
        events.append((number, None))
        there &= needs_from[place + 1] if place + 1 < len(order) else frozenset()
    return events


def _closure(stage: Stage, missing: frozenset[int], there: frozenset[int]) -> list[int]:
    """The operations that make what is missing, in order."""
    found: set[int] = set()
    stack = list(missing)
    while stack:
        value = stack.pop()
        if value not in stage.producer:
            raise ValueError(f"{stage.names[value]} is given to the block and was not saved")
        op = stage.producer[value]
        if not stage.ops[op].can_replay:
            raise ValueError(f"{stage.ops[op].name} must not be run again")
        if op not in found:
            found.add(op)
            stack += [read for read in stage.ops[op].reads if read not in there]
    return sorted(found)


def _alive(stage: Stage, saved: frozenset[int], events: Sequence[tuple[int, int | None]]) -> list[set[int]]:
    """The values alive in each event: what is saved from its first use to its last, the rest from each making on."""
    reads = [stage.ops[op].needs if replays is None else stage.ops[replays].reads for op, replays in events]
    makes = [() if replays is None else stage.ops[replays].makes for _, replays in events]
    alive: list[set[int]] = [set() for _ in events]
    begin: dict[int, int] = {}
    for number in range(len(events)):
        for value in reads[number]:
            for place in range(begin.setdefault(value, number), number + 1):
                alive[place].add(value)
        for value in makes[number]:
            if value not in saved:
                begin[value] = number
            alive[number].add(value)
    return alive
