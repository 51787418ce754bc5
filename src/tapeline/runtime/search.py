"""Choosing a placement for every block: run the extremes on fake tensors, solve, and run the answer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from tapeline.cost.device import available_bytes
from tapeline.errors import InfeasibleBudgetError, UnsupportedModelError, UsageError
from tapeline.planner.schema import Plan
from tapeline.runtime.below import Below, below
from tapeline.runtime.blocks import find_blocks
from tapeline.runtime.candidates import Candidates
from tapeline.runtime.choosing import choose, finished, smallest_peak
from tapeline.runtime.predict import FakeStep, OptimizerSpec
from tapeline.runtime.shapes import Shape, named_tensors, shape_of
from tapeline.runtime.step import LossFn, model_loss
from tapeline.runtime.wanted import Wanted
from tapeline.tape.beside import has_outer_state
from tapeline.units import Budget, is_zero, parse_budget

logger = logging.getLogger(__name__)

_MARGIN = "5%"
_MAX_CORRECTIONS = 6
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def plan(
    model: nn.Module,
    batch: Any,
    budget: str | int | float | Budget | None = None,
    *,
    mode: str | bool = "auto",
    blocks: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    optimizer: OptimizerSpec = None,
    loss_fn: LossFn = model_loss,
    accumulation: int = 1,
    margin: str | int | None = None,
    reserve: str | int = 0,
    on_infeasible: Literal["error", "warn"] = "error",
    host_budget: str | int | None = None,
    disk_budget: str | int | None = None,
) -> Plan:
    """Predict the peak of a training step and choose what to recompute. Nothing runs and nothing changes.

    The step (forward, backward, optimizer) is executed on fake tensors under a byte ledger: as it is, and under
    each candidate. An autocast context around this call counts as part of the step.

    Args:
        model: any module; Hugging Face models and PEFT models are taken as they are.
        batch: one micro-batch as the model gets it: a mapping is passed as keyword arguments. Its shape is what
            the plan holds for: give the largest.
        budget: bytes, ``"22GiB"``, ``"60%"`` of the predicted peak of the untouched model, or ``"auto"``, what this
            process may use. Default: ``"auto"`` in mode ``auto``, no limit in the other modes.
        mode: ``"auto"``: the fewest recomputed operations that fit the budget. ``"none"``: keep everything.
            ``"cheap"``: drop only what replays without a matrix product or attention. ``"recompute"``: keep each block's
            input and recompute the rest. ``"segments"`` or ``"segments:k"``: keep every k-th block input (k about the
            square root of the number of blocks). ``"offload"``: recompute as well, with each block's input on the tier below:
            the host, or from a CPU the disk. ``"least"``: the smallest peak, whatever it costs.
        blocks: names of the modules to manage, with ``*`` for one part of a name. Default: found by structure.
        keep: what to keep in every block whatever the mode: names of submodules (``"self_attn"``, ``"mlp.act_fn"``), of
            operations (``"softmax"``, ``"mm"``), or ``"matmul"``, ``"attention"``. What they make, and backward
            needs, stays on the device.
        drop: what to drop in every block whatever the mode, named in the same way.
        optimizer: counted in the prediction: an optimizer of `model`, the name of a class of `torch.optim`, or a
            function from parameters to an optimizer. ``None``: no optimizer state is counted.
        loss_fn: called as ``loss_fn(model, batch)``, returns a scalar. Default: the model's own loss.
        accumulation: micro-batches per optimizer step; above 1, gradients are alive during the forward.
        margin: bytes, or a share such as ``"5%"`` of the budget, to stay below it. Default: 5 % for an automatic budget, and
            on an accelerator, whose allocator reserves more than tensors have; none for a budget named for a CPU.
        reserve: bytes on the device that something else holds all the time (an averaged copy of the weights, say); they
            count in every prediction.
        on_infeasible: ``"error"``, or ``"warn"`` to get the plan with the smallest peak instead.
        host_budget: bytes of this machine's memory that what leaves an accelerator may take; processes of a job that share the
            machine have equal parts. Default: none; in mode ``offload`` without a disk, most of what is free. On a CPU there is
            no such tier: it is the same memory.
        disk_budget: the same of a disk: from an accelerator for what the host has no room for, from a CPU for all. Default: none.

    Returns:
        A frozen `Plan`.

    Raises:
        InfeasibleBudgetError: if nothing fits; carries the smallest feasible budget.
        UnsupportedModelError: if there are no blocks, or shapes depend on the values of activations.
        UsageError: for arguments that make no sense.

    Example:
        >>> import torch, tapeline
        >>> layers = [torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)) for _ in range(4)]
        >>> model = torch.nn.Sequential(*layers)
        >>> plan = tapeline.plan(model, torch.zeros(512, 64), "60%", loss_fn=lambda m, x: m(x).sum())
        >>> plan.peak_bytes <= plan.budget_bytes
        True
    """
    wanted = Wanted(
        mode=mode,
        blocks=blocks,
        keep=keep,
        drop=drop,
        optimizer=optimizer,
        loss_fn=loss_fn,
        accumulation=accumulation,
        margin=margin,
        reserve=reserve,
        on_infeasible=on_infeasible,
        host_budget=host_budget,
        disk_budget=disk_budget,
    )
    return Search(model, batch, budget, wanted).plan()


class Search:
    """A model and a budget to make plans for.

    Args:
        model: as in `plan`.
        batch: as in `plan`.
        budget: as in `plan`.
        wanted: the other arguments of `plan`.

    Raises:
        UsageError: as in `plan`.
    """

    def __init__(self, model: nn.Module, batch: Any, budget: str | int | float | Budget | None, wanted: Wanted) -> None:
        self.wanted = wanted
        self.budget = parse_budget(budget) or (Budget(auto=True) if wanted.name == "auto" else None)
        if wanted.margin is not None and self.budget is None:
            raise UsageError(
                f"margin={wanted.margin!r} has no budget to stay below: mode {wanted.name!r} was given none."
            )
        self.limit: int | None = None
        """What the peak may reach, in bytes; known once there is a plan."""
        self.spare = 0
        """What is left of the budget beyond that."""
        self.calls: list[dict[str, tuple[int, ...]]] = []
        """The shapes of the tensors of each call of the model in a micro-batch, by name."""
        self._call_shape: Shape | None = None
        self._below: Below | None = None
        names = _block_names(model, wanted.blocks, wanted.name)
        self.batch = batch
        self.step = FakeStep(
            model,
            batch,
            names,
            optimizer=wanted.optimizer,
            loss_fn=wanted.loss_fn,
            accumulation=wanted.accumulation,
            reserve_bytes=wanted.reserve_bytes,
            rules=wanted.rules(),
        )

    def plan(self) -> Plan:
        """The plan for the batch that was given."""
        with self._noted_calls():
            candidates = Candidates(self.step, below(self.step.device, self.wanted))
        self.step.library.rules.check()
        self.limit, self.spare = _limit(candidates, self.budget, self.wanted.margin)
        plan = self._plan(candidates)
        self._below = None if candidates.below is None else candidates.below.opened(plan)
        self.step.library.groups = {name: candidates.group(name) for name in candidates.names}
        return plan

    def plan_for(self, batch: Any) -> Plan:
        """The plan for another batch, which comes later, in as many bytes; not for several threads at once.

        Raises:
            InfeasibleBudgetError: if nothing fits.
            UnsupportedModelError: if the step cannot be run with this batch.
        """
        self.step.batch = batch
        return self._plan(Candidates(self.step, self._below, is_later=True))

    def obstacle_beside_training(self) -> str | None:
        """Why plans for other shapes cannot be made beside training; ``None`` if they can."""
        return next(self._obstacles(), None)

    def _obstacles(self) -> Iterator[str]:
        shape, found = shape_of(self.batch), self._call_shape
        if shape is None:
            yield "the batch has none: no tensor in it has a dimension"
        if self.step.draws_numbers:
            yield "this model draws numbers in Python, NumPy or on the CPU that decide what it does: planning would draw too"
        if len(self.calls) != 1:
            yield f"the loss calls the model {len(self.calls)} times: what one call needs does not say what the step does"
        elif found is None or found[:2] != (shape or ())[:2]:
            yield f"the loss calls the model with other shapes ({found}) than the batch's ({shape})"
        if has_outer_state(self.step.loss_fn):
            yield "loss_fn has variables of a function or an object around it, which planning would write into too"
        hooks = (hook for m in self.step.model.modules() for name in _HOOKS for hook in getattr(m, name).values())
        if any(has_outer_state(hook, may_be_method=True) for hook in hooks):
            yield "a hook on the model has variables of the function around it, which planning would write into too"

    @contextmanager
    def _noted_calls(self) -> Iterator[None]:
        """Note what the model is called with in each micro-batch."""
        step, loss_fn = self.step, self.step.loss_fn

        def noted(model: nn.Module, batch: Any) -> torch.Tensor:
            self.calls.clear()
            return loss_fn(model, batch)

        def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            tensors = named_tensors(args, kwargs)
            self.calls.append({name: tuple(tensor.shape) for name, tensor in tensors.items()})
            self._call_shape = shape_of(tensors)

        handle = step.model.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
        step.loss_fn = noted
        try:
            yield
        finally:
            step.loss_fn = loss_fn
            handle.remove()

    def _plan(self, candidates: Candidates) -> Plan:
        wanted = self.wanted
        try:
            chosen = choose(candidates, wanted.name, wanted.segment_length, self.limit)
        except InfeasibleBudgetError as error:
            if wanted.on_infeasible == "error":
                raise
            warnings.warn(f"{error} Using the plan with the smallest peak.", stacklevel=4)
            chosen = smallest_peak(candidates)
        return replace(finished(candidates, wanted.mode_text, chosen, self.limit), margin_bytes=self.spare)


def _limit(candidates: Candidates, budget: Budget | None, margin: str | int | None) -> tuple[int | None, int]:
    """The budget in bytes, less the margin; and the margin."""
    if budget is None:
        return None, 0
    if budget.num_bytes is not None:
        limit = budget.num_bytes
    elif budget.fraction is not None:
        limit = int(budget.fraction * candidates.kept.peak_bytes)
    else:
        limit = available_bytes(candidates.step.device) + candidates.kept.points[0].start_bytes
    if margin is None and (budget.auto or candidates.step.device.type != "cpu"):
        margin = _MARGIN  # an allocator reserves more than tensors have
    spare = None if margin is None or is_zero(margin) else parse_budget(margin)
    if spare is None:
        return limit, 0
    if spare.auto:
        raise UsageError('margin must be a size or a share of the budget, such as "512MiB" or "5%".')
    kept_free = spare.num_bytes if spare.num_bytes is not None else int((spare.fraction or 0) * limit)
    return limit - kept_free, kept_free


def _block_names(model: nn.Module, blocks: Sequence[str] | None, mode: str) -> list[str]:
    try:
        return find_blocks(model, blocks)
    except UnsupportedModelError:
        if mode == "none":
            return []
        raise
