"""A training step as a chain of stages, the links that copies take, and the budgets they must keep to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from tapeline.planner.placements import Options, placements
from tapeline.planner.stage import Stage

_FINE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Bytes per second between tiers."""

    to_host: float
    """Device to host."""
    to_device: float
    """Host to device."""
    both: float = 2.0
    """Sum of the shares of the two that are reached at once: 2 is full duplex, 1 takes turns."""
    latency: float = 10e-6
    """Seconds before a copy begins to move bytes."""
    disk_write: float = 0.0
    disk_read: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """Bytes that each tier may hold of a step."""

    device: float
    host: float = math.inf
    disk: float = 0.0


class Step(NamedTuple):
    """A part of one stage, in forward or in backward, or the loss (stage ``None``)."""

    stage: int | None
    part: int
    is_backward: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Route:
    """One step: the stages in forward order, the head and the loss, the stages in reverse."""

    stages: tuple[Stage, ...]
    loss_seconds: float = 0.0
    """Head and loss, forward and backward."""
    loss_bytes: int = 0
    """What they need at their peak, beyond the last output and its gradient."""
    base_bytes: int = 0
    """Bytes on the device all the time: weights, optimizer state, workspaces."""
    optimizer_bytes: int = 0
    """What the optimizer step needs beyond gradients."""
    optimizer_seconds: float = 0.0
    outside_gradient_bytes: int = 0
    """Gradients of weights outside the stages, made by the backward of the head."""
    keeps_gradients: bool = False
    """Gradients of weights are counted in the base: they live through the forward, as in accumulation."""
    options: tuple[Options, ...] = field(default=(), repr=False)
    """Other options than the stages' own, in their order."""

    @cached_property
    def choices(self) -> tuple[Options, ...]:
        """The placements that each stage may take."""
        if self.options:
            return self.options
        found: dict[int, Options] = {}
        for stage in self.stages:
            if id(stage) not in found:
                found[id(stage)] = placements(stage)
        return tuple(found[id(stage)] for stage in self.stages)

    @cached_property
    def num_frozen(self) -> int:
        """Stages at the beginning that have no backward."""
        return next((i for i, stage in enumerate(self.stages) if not stage.is_frozen), len(self.stages))

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """Parts of stages in forward order, the loss, and parts in reverse order down to the first that is trained."""
        steps = [
            Step(stage=number, part=part, is_backward=False, seconds=stage.forward_seconds(part))
            for number, stage in enumerate(self.stages)
            for part in range(stage.num_parts)
        ]
        steps.append(Step(stage=None, part=0, is_backward=False, seconds=self.loss_seconds))
        for number in reversed(range(self.num_frozen, len(self.stages))):
            stage = self.stages[number]
            steps += [
                Step(stage=number, part=part, is_backward=True, seconds=stage.backward_seconds(part))
                for part in reversed(range(stage.num_parts))
            ]
        return tuple(steps)

    @cached_property
    def base_seconds(self) -> float:
        """Time of the step with nothing recomputed and nothing moved."""
        total = self.loss_seconds + self.optimizer_seconds
        for stage in self.stages:
            for part in range(stage.num_parts):
                total += stage.forward_seconds(part)
                total += 0.0 if stage.is_frozen else stage.backward_seconds(part)
        return total

    @cached_property
    def boundary_bytes(self) -> int:
        """The last output and its gradient, alive at the loss."""
        return 2 * self.stages[-1].sizes[-1]

    @cached_property
    def gradient_bytes(self) -> tuple[int, ...]:
        """Gradients of weights alive while each stage runs backward, its own included; last: all of them."""
        if self.keeps_gradients:
            return (0,) * (len(self.stages) + 1)
        sizes = [stage.gradient_bytes for stage in self.stages]
        outside = self.outside_gradient_bytes
        return (*(sum(sizes[i:]) + outside for i in range(len(sizes))), sum(sizes) + outside)

    def refined(self) -> Route:
        """The same step planned in finer parts; its options are the same, in the same order."""
        finer: dict[int, Options] = {}
        for options in self.choices:
            if id(options) not in finer:
                stage = replace(options.stage, halves=_fine_parts(options.stage))
                finer[id(options)] = placements(stage, only=list(options.pairs()))
        found = tuple(finer[id(options)] for options in self.choices)
        return replace(self, stages=tuple(options.stage for options in found), options=found)

    def kept_bytes(self, chosen: Sequence[int]) -> float:
        """Bytes on the device between forward and backward."""
        return sum(float(o.kept_bytes[i]) for o, i in zip(self.choices, chosen, strict=True))


def _fine_parts(stage: Stage) -> tuple[int, ...]:
    """Cuts between operations that give parts of about equal time, the stage's own cuts among them."""
    least = sum(op.seconds + op.backward_seconds for op in stage.ops) / _FINE
    cuts, seconds = set(stage.halves), 0.0
    for number, op in enumerate(stage.ops[:-1], 1):
        seconds += op.seconds + op.backward_seconds
        if seconds >= least:
            cuts.add(number)
            seconds = 0.0
    return tuple(sorted(cuts))
