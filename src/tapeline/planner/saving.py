"""The numbers of a chain whose stages save on the device or not at all: what programmes without other tiers choose from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tapeline.errors import InfeasibleBudgetError, UsageError
from tapeline.planner.nested_schedule import BACKWARD, FORWARD, LOSS, SAVE, Operation, forward_bytes
from tapeline.planner.placements import Floats, Options
from tapeline.planner.route import Route
from tapeline.planner.stage import Stage

Amounts = NDArray[np.float64] | NDArray[np.intp]
"""Bytes, or slots of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """What a stage with a backward may save, one row each; and what it takes when it saves nothing."""

    rows: NDArray[np.intp] = field(repr=False)
    """Places among the options of the stage."""
    kept: Floats
    """Bytes saved."""
    inner: Floats
    """Bytes saved besides the input."""
    keeps_input: NDArray[np.bool_]
    """Whether the input is among what is saved."""
    is_input_only: NDArray[np.bool_]
    """Whether nothing else is saved: backward may then run without a forward before it."""
    seconds: Floats
    """Recomputation within the stage."""
    forward: Floats
    """Bytes alive in the forward, what is saved included."""
    inner_forward: Floats
    """The same if the input is not kept."""
    backward: Floats
    """Bytes alive in the backward, what is saved included until it is no longer needed."""
    plain_forward: float
    """Bytes alive in a forward that saves nothing."""
    held_forward: float
    """The same if the input is kept."""
    input_bytes: float
    output_bytes: float
    again_seconds: float
    """Another forward; infinite if there must be none."""
    gradient_bytes: float
    """Gradients of weights that the backward leaves, if they are not in the base."""

    def key(self) -> bytes:
        """Equal for stages with equal numbers."""
        arrays = (
            self.kept,
            self.inner,
            self.keeps_input,
            self.seconds,
            self.forward,
            self.inner_forward,
            self.backward,
        )
        scalars = (self.plain_forward, self.held_forward, self.input_bytes, self.output_bytes)
        rest = np.array([*scalars, self.again_seconds, self.gradient_bytes])
        return b"".join(array.tobytes() for array in (self.rows, *arrays, rest))


@dataclass(frozen=True)
class Line:
    """The stages of a route that have a backward, with their numbers; stages are counted from the first of them."""

    route: Route

    @cached_property
    def savings(self) -> tuple[Saving, ...]:
        """The numbers of each stage; the same object for stages with equal numbers."""
        route, made, known = self.route, dict[tuple[int, int], Saving](), dict[bytes, Saving]()
        for stage, options in zip(route.stages[route.num_frozen :], route.choices[route.num_frozen :], strict=True):
            if (id(stage), id(options)) not in made:
                saving = _saving(stage, options, 0 if route.keeps_gradients else stage.gradient_bytes)
                made[id(stage), id(options)] = known.setdefault(saving.key(), saving)
        pairs = zip(route.stages[route.num_frozen :], route.choices[route.num_frozen :], strict=True)
        return tuple(made[id(stage), id(options)] for stage, options in pairs)

    @cached_property
    def gradients(self) -> Floats:
        """Gradients of weights alive while each stage runs backward, its own included; nothing after the last."""
        sizes = [saving.gradient_bytes for saving in self.savings]
        return np.array([sum(sizes[i:]) for i in range(len(sizes) + 1)], dtype=float)

    @property
    def loss_bytes(self) -> float:
        """Bytes at the loss, beyond what is saved."""
        return float(self.route.boundary_bytes + self.route.loss_bytes)

    @cached_property
    def fixed_peak(self) -> float:
        """Bytes that no plan changes: the stages before the first with a backward, and the optimizer step."""
        route = self.route
        frozen = [forward_bytes(stage, frozenset()) for stage in route.stages[: route.num_frozen]]
        loss = [] if self.savings else [self.loss_bytes]
        step = route.gradient_bytes[-1] + route.optimizer_bytes
        return float(route.base_bytes + max(*frozen, *loss, step, 0, 0))

    def operation(self, kind: str, stage: int, row: int = -1, *, is_without_input: bool = False) -> Operation:
        """Something done with a stage of the line, and the option in a row of its numbers."""
        option = int(self.savings[stage].rows[row]) if row >= 0 else -1
        return Operation(kind, self.route.num_frozen + stage, option, is_without_input)

    def frozen_forwards(self) -> list[Operation]:
        """The stages before the line."""
        return [Operation(FORWARD, stage) for stage in range(self.route.num_frozen)]

    def single_pass(self, rows: Sequence[int]) -> tuple[Operation, ...]:
        """The schedule that runs every stage forward once."""
        saves = [self.operation(SAVE, stage, row) for stage, row in enumerate(rows)]
        backwards = [self.operation(BACKWARD, stage, row) for stage, row in enumerate(rows)]
        return (*self.frozen_forwards(), *saves, self.operation(LOSS, len(rows)), *reversed(backwards))

    def grids(self, device_bytes: float, slots: int) -> tuple[tuple[float, int], ...]:
        """Sizes of a slot and their numbers: the fewest bytes that give at most `slots`, and half of that up to `slots`.

        A slot is the largest input times a power of two, so that inputs take whole slots. With the finer grid beside
        it, an answer does not become worse where a larger budget makes the slots coarser.
        """
        free = device_bytes - self.route.base_bytes
        if free <= 0:
            return ()
        unit = max((saving.input_bytes for saving in self.savings), default=0.0) or 1.0
        slot = unit * 2.0 ** math.ceil(math.log2(free / (slots * unit)))
        while free / slot > slots:
            slot *= 2
        while free / (slot / 2) <= slots:
            slot /= 2
        return (slot / 2, slots), (slot, int(free // slot))


def check_budget(device_bytes: float, slots: int) -> None:
    """Refuse what is not a budget.

    Raises:
        UsageError: if the budget is negative or not a number, or there are no slots.
    """
    if math.isnan(device_bytes) or device_bytes < 0:
        raise UsageError(f"the device budget is {device_bytes} bytes; it cannot be negative")
    if slots < 1:
        raise UsageError(f"{slots} slots: memory is divided into at least one")


def does_not_fit(device_bytes: float, least: float) -> InfeasibleBudgetError:
    """The error for a budget below the smallest possible."""
    least_bytes = math.ceil(least)
    return InfeasibleBudgetError(
        f"Does not fit: budget {device_bytes:.0f} bytes, smallest possible {least_bytes} bytes on the device alone. "
        f"Give it {least_bytes - device_bytes:.0f} bytes more, a host budget, or fewer tokens.",
        budget_bytes=int(device_bytes),
        smallest_feasible_bytes=least_bytes,
    )


def _saving(stage: Stage, options: Options, gradient_bytes: int) -> Saving:
    plain = np.nonzero(options.moved_bytes == 0)[0]
    if not len(plain):
        raise UsageError(
            "every option of a stage moves something; without another tier there must be one that does not"
        )
    kept_sets = [options.kept[i] | options.moved[i] for i in plain]
    needs = np.array([0 in kept for kept in kept_sets], dtype=bool)
    kept = options.kept_bytes[plain]
    table = {
        "rows": plain,
        "kept": kept,
        "inner": kept - needs * float(stage.sizes[0]),
        "keeps_input": needs,
        "is_input_only": np.array([kept <= {0} for kept in kept_sets], dtype=bool),
        "seconds": options.seconds[plain].sum(axis=1),
        "forward": np.array([forward_bytes(stage, kept) for kept in kept_sets], dtype=float),
        "inner_forward": np.array([forward_bytes(stage, kept - {0}) for kept in kept_sets], dtype=float),
        "backward": kept + options.backward_peak[plain].max(axis=1),
    }
    columns = [table[name] for name in ("seconds", "kept", "inner", "forward", "inner_forward", "backward")]
    # an input that is kept may serve the stages after, and one alone may be all that backward needs
    best = _front(np.stack([*columns, ~table["keeps_input"], ~table["is_input_only"]], axis=1))
    return Saving(
        **{name: column[best] for name, column in table.items()},
        plain_forward=float(forward_bytes(stage, frozenset())),
        held_forward=float(forward_bytes(stage, frozenset({0}))),
        input_bytes=float(stage.sizes[0]),
        output_bytes=float(stage.sizes[-1]),
        again_seconds=sum(op.seconds if op.can_replay else math.inf for op in stage.ops),
        gradient_bytes=float(gradient_bytes),
    )


def _front(points: Floats) -> list[int]:
    """Rows that no other is at most equal to in every column, fastest first; of equal rows, the first."""
    chosen: list[int] = []
    for index in np.lexsort(points.T[::-1]):
        if not np.any(np.all(points[chosen] <= points[index], axis=1)):
            chosen.append(int(index))
    return chosen
