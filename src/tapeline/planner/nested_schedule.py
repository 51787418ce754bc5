"""A step with nested recomputation as a list of operations, and the count that confirms its time and its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tapeline.planner.route import Route
from tapeline.planner.stage import Stage

FORWARD, SAVE, CHECKPOINT, LOSS, BACKWARD = "forward", "save", "checkpoint", "loss", "backward"


class Operation(NamedTuple):
    """One thing that a schedule does."""

    kind: str
    """``forward`` of a stage that saves nothing, ``save``: a forward that saves what an option keeps, ``checkpoint``: keep the
    input of a stage, which is there, ``loss``, ``backward``: with what was saved, or from the input alone."""
    stage: int
    option: int = -1
    """Of ``save`` and ``backward``."""
    is_without_input: bool = False
    """Of ``save``: the input is not kept though the option does; it is made again before the backward."""

    def __str__(self) -> str:
        option = f" option {self.option}" if self.option >= 0 else ""
        return f"{self.kind} {self.stage}{option}{' without its input' if self.is_without_input else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Nested:
    """A schedule for one step."""

    seconds: float
    """Of the step."""
    device_peak: float
    """Bytes."""
    operations: tuple[Operation, ...] = field(repr=False)

    @property
    def num_forwards(self) -> int:
        """Forwards of stages, the first of each included."""
        return sum(operation.kind in (FORWARD, SAVE) for operation in self.operations)


def replay(route: Route, nested: Nested) -> tuple[float, float]:
    """Run a schedule on paper, operation by operation.

    Args:
        route: the step.
        nested: what to run.

    Returns:
        Its seconds, and the most bytes alive on the device.

    Raises:
        ValueError: if an operation needs what is not there, or a backward is missing.
    """
    return run(route, nested.operations)


def run(route: Route, operations: Sequence[Operation]) -> tuple[float, float]:
    """The seconds and the peak of a list of operations, as `replay`."""
    replayed = _Replay(route)
    for operation in operations:
        getattr(replayed, operation.kind)(operation)
    if replayed.next_backward != route.num_frozen - 1 or not replayed.is_lost:
        raise ValueError("the schedule ends before the backward does")
    replayed.count(route.gradient_bytes[-1] + route.optimizer_bytes)
    return replayed.seconds + route.optimizer_seconds, replayed.peak


def forward_bytes(stage: Stage, kept: frozenset[int]) -> int:
    """Bytes alive at the peak of a forward, its input included, if these values stay."""
    live = peak = stage.sizes[0]
    for place, op in enumerate(stage.ops):
        live += sum(stage.sizes[value] for value in op.makes)
        peak = max(peak, live + op.temporary_bytes)
        for value in {*op.reads, *op.makes} - kept - {len(stage.sizes) - 1}:
            live -= stage.sizes[value] if stage.last_use[value] == place else 0
    return peak


def _kept(route: Route, stage: int, option: int) -> frozenset[int]:
    """What an option keeps; a value without bytes may as well be moved."""
    options = route.choices[stage]
    if options.moved_bytes[option]:
        raise ValueError(f"option {option} of stage {stage} moves values, and there is nowhere to move them to")
    return options.kept[option] | options.moved[option]


class _Replay:
    """What is on the device, by stage; `current` is the stage whose input the last forward made."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.current: int | None = 0
        self.next_backward = len(route.stages) - 1
        self.is_lost = False
        self.passed: set[int] = set()
        self.inputs: set[int] = set()
        self.saved: dict[int, tuple[int, frozenset[int]]] = {}
        self.seconds = 0.0
        self.peak = 0.0
        self._forwards: dict[tuple[int, frozenset[int]], int] = {}

    def count(self, extra: float, *, without: int | None = None) -> None:
        """Note the bytes alive: the base, what is stored (but for stage `without`), and `extra`."""
        sizes = [stage.sizes for stage in self.route.stages]
        stored = sum(sizes[number][0] for number in self.inputs if number != without)
        stored += sum(
            sizes[number][value] for number, (_, kept) in self.saved.items() if number != without for value in kept
        )
        self.peak = max(self.peak, self.route.base_bytes + stored + extra)

    def forward(self, operation: Operation) -> None:
        """A forward that saves nothing; an input that is stored stays."""
        number = operation.stage
        is_stored = self._find_input(number)
        kept = frozenset({0}) if is_stored else frozenset[int]()
        self._run_forward(number, kept, stored=self.route.stages[number].sizes[0] if is_stored else 0)

    def save(self, operation: Operation) -> None:
        """A forward that saves; a stored input becomes part of what is saved, or goes."""
        number, option = operation.stage, operation.option
        if number in self.saved or number < self.route.num_frozen:
            raise ValueError(f"{operation}: saved already, or nothing to save for")
        is_stored = self._find_input(number)
        kept = _kept(self.route, number, option) - ({0} if operation.is_without_input else set())
        self._run_forward(number, kept, stored=self.route.stages[number].sizes[0] if is_stored else 0)
        self.inputs.discard(number)
        self.saved[number] = option, kept

    def checkpoint(self, operation: Operation) -> None:
        if self.current != operation.stage:
            raise ValueError(f"{operation}: its input is not there")
        self.inputs.add(operation.stage)

    def loss(self, operation: Operation) -> None:
        if self.current != len(self.route.stages) or self.is_lost:
            raise ValueError("the loss comes once, after the last stage")
        self.count(self.route.boundary_bytes + self.route.loss_bytes)
        self.seconds += self.route.loss_seconds
        self.current, self.is_lost = None, True

    def backward(self, operation: Operation) -> None:
        number, option = operation.stage, operation.option
        if number != self.next_backward or not self.is_lost:
            raise ValueError(f"{operation}: not its turn")
        stage, options = self.route.stages[number], self.route.choices[number]
        wanted = _kept(self.route, number, option)
        saved, there = self.saved.get(number, (option, frozenset[int]()))
        if number in self.inputs or self.current == number:
            there |= {0}
        if saved != option or not wanted <= there:
            raise ValueError(f"{operation}: what it needs was not saved")
        plan = options.rebuilds[option]
        for place, moment in enumerate(plan.moments):
            held = {value for value in wanted if plan.last_need.get(value, -1) >= place}
            alive = sum(stage.sizes[value] for value in moment.alive - wanted | held)
            self.count(alive + moment.extra_bytes + self.route.gradient_bytes[number], without=number)
            self.seconds += moment.seconds
        self.saved.pop(number, None)
        self.inputs.discard(number)
        self.current, self.next_backward = None, number - 1

    def _find_input(self, number: int) -> bool:
        """Whether the input of a stage is stored; otherwise the last forward has made it."""
        is_stored = number in self.inputs or 0 in self.saved.get(number, (0, frozenset[int]()))[1]
        if not is_stored and self.current != number:
            raise ValueError(f"forward {number}: its input is not there")
        return is_stored

    def _run_forward(self, number: int, kept: frozenset[int], *, stored: int) -> None:
        stage = self.route.stages[number]
        if number in self.passed and not all(op.can_replay for op in stage.ops):
            raise ValueError(f"forward {number}: it must not be run again")
        self.passed.add(number)
        if (number, kept) not in self._forwards:
            self._forwards[number, kept] = forward_bytes(stage, kept)
        waiting = 0
        if self.is_lost:  # the gradient at the output of the stage whose turn it is, and those of the weights after it
            after = self.next_backward + 1
            waiting = self.route.stages[self.next_backward].sizes[-1]
            waiting += self.route.gradient_bytes[after] if after < len(self.route.stages) else 0
        self.count(self._forwards[number, kept] - stored + waiting)
        self.seconds += sum(op.seconds for op in stage.ops)
        self.current = number + 1
