"""Choosing a placement for every block: run the extremes on fake tensors, solve, and run the answer."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import nn

from tapeline.cost.device import available_bytes
from tapeline.errors import InfeasibleBudgetError, UnsupportedModelError, UsageError
from tapeline.planner.chain import Chain, smallest, solve
from tapeline.planner.profile import StepProfile, build_chain, held_bytes
from tapeline.planner.schema import Alternative, BlockPlan, Plan, parse_mode
from tapeline.runtime.blocks import find_blocks
from tapeline.runtime.predict import FakeStep, OptimizerSpec
from tapeline.runtime.step import LossFn, model_loss
from tapeline.units import Budget, format_bytes, parse_budget

logger = logging.getLogger(__name__)

_AUTO_MARGIN = "5%"
_MAX_CORRECTIONS = 6
_SEGMENT_LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24)
_WRITES_BUFFERS = "writes its own buffers in forward: recomputing would change them twice"
_NOT_RECORDED = "autograd records nothing here"

Blocks = tuple[BlockPlan, ...]


def plan(
    model: nn.Module,
    batch: Any,
    budget: str | int | float | Budget | None = None,
    *,
    mode: str | bool = "auto",
    blocks: Sequence[str] | None = None,
    optimizer: OptimizerSpec = None,
    loss_fn: LossFn = model_loss,
    accumulation: int = 1,
    margin: str | int | None = None,
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
            ``"recompute"``: keep each block's input and recompute the rest. ``"segments"`` or ``"segments:k"``: keep every
            k-th block input (k about the square root of the number of blocks).
        blocks: names of the modules to manage, with ``*`` for one part of a name. Default: found by structure.
        optimizer: counted in the prediction: an optimizer of `model`, the name of a class of `torch.optim`, or a
            function from parameters to an optimizer. ``None``: no optimizer state is counted.
        loss_fn: called as ``loss_fn(model, batch)``, returns a scalar. Default: the model's own loss.
        accumulation: micro-batches per optimizer step; above 1, gradients are alive during the forward.
        margin: bytes, or a share such as ``"5%"`` of the budget, to stay below it. Default: 5 % for an
            automatic budget, none for one that was named.
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
    name, segment_length = parse_mode(mode)
    if accumulation < 1:
        raise UsageError(f"accumulation must be at least 1, got {accumulation}.")
    if on_infeasible not in ("error", "warn"):
        raise UsageError(f"on_infeasible must be 'error' or 'warn', got {on_infeasible!r}.")
    wanted = parse_budget(budget) or (Budget(auto=True) if name == "auto" else None)
    search = Search(model, batch, _block_names(model, blocks, name), optimizer, loss_fn, accumulation)
    limit = search.limit(wanted, margin)
    try:
        chosen = search.choose(name, segment_length, limit)
    except InfeasibleBudgetError as error:
        if on_infeasible == "error":
            raise
        warnings.warn(f"{error} Using the plan with the smallest peak.", stacklevel=2)
        chosen = search.smallest()
    return search.finish(str(mode) if isinstance(mode, str) else name, chosen, limit)


class Search:
    """The candidates for one model and batch; each is run once on fake tensors."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        names: list[str],
        optimizer: OptimizerSpec,
        loss_fn: LossFn,
        accumulation: int,
    ) -> None:
        self.kinds = {name: type(model.get_submodule(name)).__name__ for name in names}
        self.step = FakeStep(model, batch, names, optimizer=optimizer, loss_fn=loss_fn, accumulation=accumulation)
        self.accumulation = accumulation
        self._profiles: dict[Blocks, StepProfile] = {}
        self.kept = self.step.run(())
        self.names = _in_order_of_execution(names, self.kept)
        probe = [self._block(n, "device" if self.kept.blocks[n].writes_buffers else "recompute") for n in self.names]
        self.recomputed = self.step.run(probe)
        self.held = held_bytes(self.kept, self.recomputed)
        self._chain: Chain | None = None

    def limit(self, budget: Budget | None, margin: str | int | None) -> int | None:
        """The budget in bytes, less the margin."""
        if budget is None:
            return None
        if budget.num_bytes is not None:
            limit = budget.num_bytes
        elif budget.fraction is not None:
            limit = int(budget.fraction * self.kept.peak_bytes)
        else:
            limit = available_bytes(self.step.device) + self.kept.points[0].start_bytes
            margin = _AUTO_MARGIN if margin is None else margin
        spare = parse_budget(margin)
        if spare is None:
            return limit
        if spare.auto:
            raise UsageError('margin must be a size or a share of the budget, such as "512MiB" or "5%".')
        return limit - (spare.num_bytes if spare.num_bytes is not None else int((spare.fraction or 0) * limit))

    def choose(self, mode: str, segment_length: int | None, limit: int | None) -> Blocks:
        """The placements of a mode.

        Raises:
            InfeasibleBudgetError: if the mode's peak is above the limit.
        """
        if mode == "auto":
            assert limit is not None, "mode auto has a budget"
            return self._cheapest(limit)
        if mode == "none":
            blocks = self.keep_all()
        elif mode == "recompute":
            blocks = self.recompute_all()
        else:
            blocks = self.segments(segment_length or self.default_segment_length())
        if limit is not None and self.profile(blocks).peak_bytes > limit:
            raise self._infeasible(limit)
        return blocks

    def profile(self, blocks: Blocks) -> StepProfile:
        """The step under these placements, run once."""
        if blocks not in self._profiles:
            self._profiles[blocks] = self.kept if _keeps_all(blocks) else self.step.run(blocks)
        return self._profiles[blocks]

    def keep_all(self) -> Blocks:
        return tuple(self._block(name, "device") for name in self.names)

    def recompute_all(self) -> Blocks:
        return tuple(self._block(name, "recompute") for name in self.names)

    def segments(self, length: int) -> Blocks:
        """Recompute everything, and keep only every `length`-th input of each run of chained blocks."""
        blocks = []
        position = 0
        for name in self.names:
            position = position + 1 if self._is_chained(name) else 0
            drops = position % length != 0
            blocks.append(self._block(name, "recompute", "recompute" if drops else "device"))
            if blocks[-1].saved == "device":
                position = -1
        return tuple(blocks)

    def default_segment_length(self) -> int:
        return max(2, round(math.sqrt(len(self.names))))

    def smallest(self) -> Blocks:
        """The placements with the smallest peak."""
        candidates = [self.keep_all(), self.recompute_all(), *self._segment_candidates()]
        candidates.append(self._from_chain(smallest(self.chain())))
        return min(candidates, key=lambda blocks: self.profile(blocks).peak_bytes)

    def chain(self) -> Chain:
        if self._chain is None:
            self._chain = build_chain(self.kept, self.recomputed, self.names)
        return self._chain

    def finish(self, mode: str, chosen: Blocks, limit: int | None) -> Plan:
        """Put a choice and what it costs into a plan."""
        profile = self.profile(chosen)
        first = self.step.run(chosen, is_first_step=True) if self.step.optimizer is not None else profile
        rows = self._alternatives(mode, chosen, limit)
        return Plan(
            mode=mode,
            device=str(self.step.device),
            budget_bytes=limit,
            peak_bytes=profile.peak_bytes,
            first_step_peak_bytes=first.peak_bytes,
            untouched_peak_bytes=self.kept.peak_bytes,
            smallest_peak_bytes=min(row.peak_bytes for row in rows),
            flops=profile.flops,
            untouched_flops=self.kept.flops,
            memory=profile.memory,
            untouched_memory=self.kept.memory,
            blocks=chosen,
            alternatives=rows,
            notes=tuple(self._notes()),
        )

    def _cheapest(self, limit: int) -> Blocks:
        if self.kept.peak_bytes <= limit:
            return self.keep_all()
        target = limit
        for _ in range(_MAX_CORRECTIONS):
            found = solve(self.chain(), target)
            if found is None:
                break
            blocks = self._from_chain(found)
            excess = self.profile(blocks).peak_bytes - limit
            if excess <= 0:
                return blocks
            logger.debug("composed plan is %d bytes above the budget when run: solving again", excess)
            target -= excess
        fitting = (
            b for b in (self.recompute_all(), *self._segment_candidates()) if self.profile(b).peak_bytes <= limit
        )
        blocks_or_none = next(fitting, None)
        if blocks_or_none is None:
            raise self._infeasible(limit)
        return blocks_or_none

    def _segment_candidates(self) -> Iterable[Blocks]:
        for length in _SEGMENT_LENGTHS:
            blocks = self.segments(length)
            if length < len(self.names) and any(block.input == "recompute" for block in blocks):
                yield blocks

    def _from_chain(self, options: Sequence[Any]) -> Blocks:
        saved = {self.names[o.block]: o.kind for o in options}
        return tuple(self._block(name, "recompute" if saved[name] == "recompute" else "device") for name in self.names)

    def _infeasible(self, limit: int) -> InfeasibleBudgetError:
        smallest_profile = self.profile(self.smallest())
        parts = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in smallest_profile.memory.items() if size)
        return InfeasibleBudgetError(
            f"Does not fit: budget {format_bytes(limit)}, smallest possible {format_bytes(smallest_profile.peak_bytes)} "
            f"({parts}). Raise the budget to {smallest_profile.peak_bytes} bytes, or use shorter sequences or a smaller batch.",
            budget_bytes=limit,
            smallest_feasible_bytes=smallest_profile.peak_bytes,
        )

    def _alternatives(self, mode: str, chosen: Blocks, limit: int | None) -> tuple[Alternative, ...]:
        length = self.default_segment_length()
        named = {
            "none": self.keep_all(),
            "recompute": self.recompute_all(),
            f"segments:{length}": self.segments(length),
        }
        named[mode if mode in named else f"{mode} (this plan)"] = chosen
        rows = []
        for name, blocks in named.items():
            profile = self.profile(blocks)
            fits = None if limit is None else profile.peak_bytes <= limit
            rows.append(Alternative(name=name, peak_bytes=profile.peak_bytes, flops=profile.flops, fits=fits))
        return tuple(rows)

    def _notes(self) -> Iterable[str]:
        buffered = [name for name in self.names if self.kept.blocks[name].writes_buffers]
        if buffered:
            yield f"{len(buffered)} blocks are kept because each {_WRITES_BUFFERS} ({_shorten(buffered)})"
        if self.step.optimizer is None:
            yield "no optimizer was given: its state is not counted"
        if not self.names:
            yield "no blocks are managed"

    def _is_chained(self, name: str) -> bool:
        facts = self.recomputed.blocks[name]
        return facts.num_calls == facts.num_chained == self.accumulation

    def _block(self, name: str, saved: str, source: str = "device") -> BlockPlan:
        reason = ""
        if self.kept.blocks[name].writes_buffers:
            saved, source, reason = "device", "device", _WRITES_BUFFERS
        elif hasattr(self, "recomputed") and self.recomputed.blocks[name].num_calls == 0:
            saved, source, reason = "device", "device", _NOT_RECORDED
        return BlockPlan(
            name=name,
            kind=self.kinds[name],
            saved="recompute" if saved == "recompute" else "device",
            input="recompute" if source == "recompute" else "device",
            held_bytes=max(0, self.held[name]) if hasattr(self, "held") else 0,
            recompute_flops=self.recomputed.blocks[name].recompute_flops if hasattr(self, "recomputed") else 0,
            reason=reason,
        )


def _block_names(model: nn.Module, blocks: Sequence[str] | None, mode: str) -> list[str]:
    try:
        return find_blocks(model, blocks)
    except UnsupportedModelError:
        if mode == "none":
            return []
        raise


def _in_order_of_execution(names: list[str], profile: StepProfile) -> list[str]:
    called = [point.block for point in profile.points if point.phase == "forward" and point.block is not None]
    order = {name: index for index, name in reversed(list(enumerate(called)))}
    return sorted(names, key=lambda name: order.get(name, len(called)))


def _keeps_all(blocks: Blocks) -> bool:
    return all(block.saved == "device" for block in blocks)


def _shorten(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
