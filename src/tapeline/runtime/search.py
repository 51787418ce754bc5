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
from tapeline.planner.chain import smallest, solve
from tapeline.planner.policy import CHEAP, KEEP, LEAST, RECOMPUTE
from tapeline.planner.schema import Alternative, Plan, parse_mode
from tapeline.runtime.blocks import find_blocks
from tapeline.runtime.candidates import Blocks, Candidates
from tapeline.runtime.predict import FakeStep, OptimizerSpec
from tapeline.runtime.shapes import Shape, named_tensors, shape_of
from tapeline.runtime.step import LossFn, model_loss
from tapeline.tape.beside import has_outer_state
from tapeline.tape.rules import Rules
from tapeline.units import Budget, format_bytes, parse_budget, parse_bytes

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
            square root of the number of blocks). ``"least"``: the smallest peak, whatever it costs.
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
    return Search(
        model,
        batch,
        budget,
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
    ).plan()


class Search:
    """A model and a budget to make plans for; arguments and errors as in `plan`."""

    def __init__(
        self,
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
    ) -> None:
        self.name, self.segment_length = parse_mode(mode)
        if accumulation < 1:
            raise UsageError(f"accumulation must be at least 1, got {accumulation}.")
        if on_infeasible not in ("error", "warn"):
            raise UsageError(f"on_infeasible must be 'error' or 'warn', got {on_infeasible!r}.")
        self.mode = mode if isinstance(mode, str) else self.name
        self.on_infeasible = on_infeasible
        self.wanted = parse_budget(budget) or (Budget(auto=True) if self.name == "auto" else None)
        if margin is not None and self.wanted is None:
            raise UsageError(f"margin={margin!r} has no budget to stay below: mode {self.name!r} was given none.")
        self.margin = margin
        self.limit: int | None = None
        """What the peak may reach, in bytes; known once there is a plan."""
        self.spare = 0
        """What is left of the budget beyond that."""
        self.calls: list[dict[str, tuple[int, ...]]] = []
        """The shapes of the tensors of each call of the model in a micro-batch, by name."""
        self._call_shape: Shape | None = None
        names = _block_names(model, blocks, self.name)
        rules = Rules(_names("keep", keep), _names("drop", drop))
        self.batch = batch
        self.step = FakeStep(
            model,
            batch,
            names,
            optimizer=optimizer,
            loss_fn=loss_fn,
            accumulation=accumulation,
            reserve_bytes=parse_bytes(str(reserve)) if reserve else 0,
            rules=rules,
        )

    def plan(self) -> Plan:
        """The plan for the batch that was given."""
        with self._noted_calls():
            candidates = Candidates(self.step)
        self.step.library.rules.check()
        self.limit, self.spare = _limit(candidates, self.wanted, self.margin)
        plan = self._plan(candidates)
        self.step.library.groups = {name: candidates.group(name) for name in candidates.names}
        return plan

    def plan_for(self, batch: Any) -> Plan:
        """The plan for another batch, which comes later, in as many bytes; not for several threads at once.

        Raises:
            InfeasibleBudgetError: if nothing fits.
            UnsupportedModelError: if the step cannot be run with this batch.
        """
        self.step.batch = batch
        return self._plan(Candidates(self.step, is_later=True))

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
        try:
            chosen = _choose(candidates, self.name, self.segment_length, self.limit)
        except InfeasibleBudgetError as error:
            if self.on_infeasible == "error":
                raise
            warnings.warn(f"{error} Using the plan with the smallest peak.", stacklevel=4)
            chosen = _smallest(candidates)
        return replace(_finish(candidates, self.mode, chosen, self.limit), margin_bytes=self.spare)


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
    spare = parse_budget(margin)
    if spare is None:
        return limit, 0
    if spare.auto:
        raise UsageError('margin must be a size or a share of the budget, such as "512MiB" or "5%".')
    kept_free = spare.num_bytes if spare.num_bytes is not None else int((spare.fraction or 0) * limit)
    return limit - kept_free, kept_free


def _choose(candidates: Candidates, mode: str, segment_length: int | None, limit: int | None) -> Blocks:
    if mode == "auto":
        assert limit is not None, "mode auto has a budget"
        return _cheapest(candidates, limit)
    if mode == "segments":
        blocks = candidates.segments(segment_length or candidates.default_segment_length())
    elif mode == "least":
        blocks = _smallest(candidates)
    else:
        blocks = candidates.uniform({"none": KEEP, "cheap": CHEAP, "recompute": RECOMPUTE}[mode])
    if limit is not None and candidates.peak(blocks) > limit:
        raise _infeasible(candidates, limit, f"mode {mode!r} needs {format_bytes(candidates.peak(blocks))}, ")
    return blocks


def _cheapest(candidates: Candidates, limit: int) -> Blocks:
    """The placements with the fewest recomputed operations that fit, checked by running them."""
    if candidates.fits(candidates.keep_all(), limit):
        return candidates.keep_all()
    target = limit
    for _ in range(_MAX_CORRECTIONS):
        found = solve(candidates.chain(), target)
        if found is None:
            break
        blocks = candidates.from_options(found)
        excess = candidates.peak(blocks) - limit
        if excess <= 0:
            return blocks
        logger.debug("composed plan is %d bytes above the budget when run: solving again", excess)
        target -= excess
    below = (candidates.recompute_all(), candidates.uniform(LEAST), *candidates.all_segments())
    for blocks in (*below, *candidates.all_segments(LEAST)):
        if candidates.fits(blocks, limit):
            return blocks
    raise _infeasible(candidates, limit)


def _smallest(candidates: Candidates) -> Blocks:
    """The placements with the smallest peak.

    Steps under all of them are run; the first step, which costs another run, only where it could still matter.
    """
    tried = [candidates.keep_all(), candidates.recompute_all(), candidates.uniform(LEAST)]
    tried += candidates.all_segments(LEAST)
    if candidates.has_chain:
        tried.append(candidates.from_options(smallest(candidates.chain())))
    tried.sort(key=lambda blocks: candidates.profile(blocks).peak_bytes)
    best = tried[0]
    for blocks in tried[1:]:
        if candidates.profile(blocks).peak_bytes < candidates.peak(best) > candidates.peak(blocks):
            best = blocks
    return best


def _infeasible(candidates: Candidates, limit: int, detail: str = "") -> InfeasibleBudgetError:
    blocks = _smallest(candidates)
    profile, peak = candidates.profile(blocks), candidates.peak(blocks)
    parts = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in profile.memory.items() if size)
    advice = (
        f'Mode "auto" fits {format_bytes(limit)}.'
        if peak <= limit
        else f"Raise the budget to {peak} bytes, or use shorter sequences or a smaller batch."
    )
    return InfeasibleBudgetError(
        f"Does not fit: budget {format_bytes(limit)}, {detail}smallest possible {format_bytes(peak)} ({parts}). {advice}",
        budget_bytes=limit,
        smallest_feasible_bytes=peak,
    )


def _finish(candidates: Candidates, mode: str, chosen: Blocks, limit: int | None) -> Plan:
    """Put a choice and what it costs into a plan."""
    step, kept, profile = candidates.step, candidates.kept, candidates.profile(chosen)
    notes = list(candidates.notes())
    if step.optimizer is None:
        notes.append("no optimizer was given: its state is not counted")
    if not candidates.names:
        notes.append("no blocks were found: nothing is managed")
    return Plan(
        mode=mode,
        device=str(step.device),
        budget_bytes=limit,
        peak_bytes=profile.peak_bytes,
        first_step_peak_bytes=candidates.first_peak(chosen),
        untouched_peak_bytes=kept.peak_bytes,
        flops=profile.flops,
        untouched_flops=kept.flops,
        memory=profile.memory,
        untouched_memory=kept.memory,
        blocks=candidates.described(chosen),
        alternatives=_alternatives(candidates, mode, chosen, limit),
        keep=step.library.rules.keep,
        drop=step.library.rules.drop,
        notes=tuple(notes),
    )


def _alternatives(candidates: Candidates, mode: str, chosen: Blocks, limit: int | None) -> tuple[Alternative, ...]:
    named = {"none": candidates.keep_all(), "recompute": candidates.recompute_all()}
    named[mode if mode in named else f"{mode} (this plan)"] = chosen
    rows = []
    for name, blocks in named.items():
        profile = candidates.profile(blocks)
        fits = None if limit is None else profile.peak_bytes <= limit
        rows.append(Alternative(name=name, peak_bytes=profile.peak_bytes, flops=profile.flops, fits=fits))
    return tuple(rows)


def _names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise UsageError(f"{argument} must be a list of names, got the string {names!r}: use {argument}=[{names!r}].")
    return tuple(names)


def _block_names(model: nn.Module, blocks: Sequence[str] | None, mode: str) -> list[str]:
    try:
        return find_blocks(model, blocks)
    except UnsupportedModelError:
        if mode == "none":
            return []
        raise
