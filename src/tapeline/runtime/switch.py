"""Which plan the calls of a model follow."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tapeline.planner.schema import Plan
from tapeline.runtime.block import BlockSeam
from tapeline.runtime.install import Inert, place_blocks
from tapeline.runtime.library import Library
from tapeline.runtime.shape_plans import ShapePlans

_MAX_CALLS = 1024


class AfterForward:
    """A forward hook of the model: its forward is over."""

    def __init__(self, switch: PlanSwitch) -> None:
        self._switch = switch

    def __call__(self, *_: Any) -> None:
        self._switch.leave()

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()


class PlanSwitch:
    """A forward pre-hook of the model: before each training forward the blocks get the plan for its shape.

    What was forwarded before, and waits for its backward, stays as it is.

    Args:
        plan: the plan for the largest shape.
        shapes: the others; ``None``: there is one plan for all.
        seams: those of all blocks.
        library: theirs.
    """

    def __init__(self, plan: Plan, shapes: ShapePlans | None, seams: Mapping[str, BlockSeam], library: Library) -> None:
        self._current, self._shapes, self._seams, self._library = plan, shapes, seams, library
        self._base = plan
        self.calls: deque[Plan] = deque(maxlen=_MAX_CALLS)
        """The plan of each training forward, the last at the end."""
        self._used: dict[int, Plan] = {}

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._shapes is None or not (module.training and torch.is_grad_enabled()):
            return
        plan = self._shapes.serve(args, kwargs)
        self.calls.append(plan)
        if plan is not self._current:
            place_blocks(self._seams, plan.blocks, self._library)
            self._current = plan
        self._used.setdefault(id(plan), plan)

    def leave(self) -> None:
        """Go back to the plan for the largest shape, which parts of the model that are called by themselves follow."""
        if self._current is not self._base:
            place_blocks(self._seams, self._base.blocks, self._library)
            self._current = self._base

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()  # a copied model belongs to no session

    @property
    def used(self) -> list[Plan]:
        """The plans that calls have followed; the one for the largest shape if there was no call."""
        return list(self._used.values()) or [self._base]

    def plans(self) -> dict[str, Plan]:
        """The plans that there are, by the largest shape that each holds for."""
        if self._shapes is None:
            return {"any": self._base}
        return {str(shape): plan for shape, plan in self._shapes.plans.items()}

    def notes(self) -> list[str]:
        """Which shapes have no plan of their own."""
        return [] if self._shapes is None else self._shapes.notes()

    def wait(self, timeout: float | None = None) -> bool:
        """As `ShapePlans.wait`."""
        return self._shapes is None or self._shapes.wait(timeout)

    def stop(self) -> None:
        """Make no more plans."""
        if self._shapes is not None:
            self._shapes.stop()
