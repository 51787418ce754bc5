"""What one option of a stage does in order, in pieces that are long enough to matter in time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tapeline.planner.rebuild import Rebuild
from tapeline.planner.stage import Stage

_SHARE = 0.03


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardPiece:
    """Some operations of a forward."""

    name: str
    seconds: float
    peak_bytes: int
    """Most bytes alive within, beyond what was alive before."""
    left_bytes: int
    """Bytes that it leaves, beyond what was alive before; fewer than none if it lets go of more than it makes."""
    moved: tuple[int, ...]
    """Values that are copied away once they are made."""
    released: tuple[int, ...]
    """Values being moved that the forward no longer reads afterwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardPiece:
    """Some moments of a backward."""

    name: str
    seconds: float
    replay_seconds: float
    """Of them, for running operations again."""
    num_bytes: int
    """Most bytes alive within, beyond what other stages hold."""
    fetched: tuple[int, ...]
    """Moved values that must be there from its beginning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """One option of a stage."""

    forward: tuple[ForwardPiece, ...]
    backward: tuple[BackwardPiece, ...]


def schedule(
    stage: Stage, plan: Rebuild, kept: frozenset[int], moved: frozenset[int], *, is_detailed: bool = False
) -> Schedule:
    """Cut an option into pieces.

    Args:
        stage: the block.
        plan: its backward under the option.
        kept: values kept on the device.
        moved: values moved to a tier.
        is_detailed: one piece per operation.
    """
    share = 0.0 if is_detailed else _SHARE
    forward = sum(op.seconds for op in stage.ops) * share
    backward = sum(moment.seconds for moment in plan.moments) * share
    return Schedule(
        forward=tuple(_forward(stage, part, kept, moved) for part in _forward_parts(stage, forward)),
        backward=tuple(
            _backward(stage, plan, part, kept, moved) for part in _backward_parts(stage, plan, moved, backward)
        ),
    )


def _forward_parts(stage: Stage, least: float) -> Iterator[range]:
    first, seconds = 0, 0.0
    for number, op in enumerate(stage.ops):
        seconds += op.seconds
        if seconds >= least or number + 1 == len(stage.ops):
            yield range(first, number + 1)
            first, seconds = number + 1, 0.0


def _forward(stage: Stage, part: range, kept: frozenset[int], moved: frozenset[int]) -> ForwardPiece:
    output = len(stage.sizes) - 1
    live = peak = 0
    released: list[int] = []
    for number in part:
        op = stage.ops[number]
        live += sum(stage.sizes[value] for value in op.makes)
        peak = max(peak, live + op.temporary_bytes)
        for value in {*op.reads, *op.makes}:
            if stage.last_use[value] != number or value in kept or value == output:
                continue
            if value in moved:
                released.append(value)
            else:
                live -= stage.sizes[value]
    ops = [stage.ops[number] for number in part]
    return ForwardPiece(
        name=max(ops, key=lambda op: op.seconds).name,
        seconds=sum(op.seconds for op in ops),
        peak_bytes=peak,
        left_bytes=live,
        moved=tuple(value for op in ops for value in op.makes if value in moved),
        released=tuple(released),
    )


def _backward_parts(stage: Stage, plan: Rebuild, moved: frozenset[int], least: float) -> Iterator[range]:
    """Runs of moments; one that is the first to need a moved value begins a run, one of another part too."""
    needs = {place for value, place in plan.first_need.items() if value in moved}
    first, seconds = 0, 0.0
    for number, moment in enumerate(plan.moments):
        begins = number in needs or stage.part_of[moment.op] != stage.part_of[plan.moments[first].op]
        if number > first and (begins or seconds >= least):
            yield range(first, number)
            first, seconds = number, 0.0
        seconds += moment.seconds
    if plan.moments:
        yield range(first, len(plan.moments))


def _backward(stage: Stage, plan: Rebuild, part: range, kept: frozenset[int], moved: frozenset[int]) -> BackwardPiece:
    moments = [plan.moments[number] for number in part]
    longest = max(moments, key=lambda moment: moment.seconds)
    return BackwardPiece(
        name=stage.ops[longest.op if longest.replays is None else longest.replays].name,
        seconds=sum(moment.seconds for moment in moments),
        replay_seconds=sum(moment.seconds for moment in moments if moment.replays is not None),
        num_bytes=max(_alive(stage, plan, number, kept) for number in part),
        fetched=tuple(value for value, place in plan.first_need.items() if value in moved and place == part.start),
    )


def _alive(stage: Stage, plan: Rebuild, number: int, kept: frozenset[int]) -> int:
    moment = plan.moments[number]
    there = {value for value in kept if plan.last_need.get(value, -1) >= number} | moment.alive
    return moment.extra_bytes + _total(stage, there)


def _total(stage: Stage, values: Sequence[int] | set[int]) -> int:
    return sum(stage.sizes[value] for value in values)
