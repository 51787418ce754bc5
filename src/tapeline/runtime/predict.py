"""Prediction by execution: the real runtime, on a weightless copy of the model, under the ledger."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import _default_to_fused_or_foreach
from torch.utils._pytree import tree_leaves

from tapeline.cost.device import nominal_rates
from tapeline.errors import TapelineError, UnsupportedModelError, UsageError, did_you_mean
from tapeline.ledger import OPTIMIZER, Ledger
from tapeline.planner.profile import StepProfile
from tapeline.planner.schema import BlockPlan
from tapeline.runtime.blocks import start_training
from tapeline.runtime.install import Patches, install_blocks, managed_module
from tapeline.runtime.library import Library
from tapeline.runtime.step import LossFn, StepMeter, model_loss, track_training_state
from tapeline.tape.fake import ShapeMode, fake_batch, fake_copy, preserved_random_state
from tapeline.tape.rules import Rules

OptimizerSpec = torch.optim.Optimizer | str | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None


class FakeStep:
    """A model, a batch and an optimizer without bytes, on which a step can be run under any placement.

    Args:
        model: the user's model; it is only read.
        batch: one micro-batch.
        block_names: the blocks.
        optimizer: an optimizer of the model, the name of a class of `torch.optim`, a function from parameters to
            an optimizer, or ``None`` to leave the optimizer out.
        loss_fn: called as ``loss_fn(model, batch)``.
        accumulation: number of micro-batches in a step.
        reserve_bytes: bytes on the device that something else holds all the time.
        rules: what the user insists on keeping or dropping.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        block_names: Sequence[str],
        *,
        optimizer: OptimizerSpec = None,
        loss_fn: LossFn = model_loss,
        accumulation: int = 1,
        reserve_bytes: int = 0,
        rules: Rules | None = None,
    ) -> None:
        if (name := managed_module(model)) is not None:
            raise UsageError(
                f"A session is in force on this model (block {name!r}): call session.remove() before planning."
            )
        self.mode = ShapeMode()
        self.block_names, self.loss_fn, self.accumulation = list(block_names), loss_fn, accumulation
        self.device = model_device(model)
        self.library = Library(nominal_rates(self.device), rules, verifies=False)
        memo: dict[int, Any] = {}
        self.model = fake_copy(self.mode, model, memo)
        start_training(self.model, self.block_names)
        self.batch = batch
        with self.mode:
            self.others = [torch.empty(-(-reserve_bytes // 4), dtype=torch.float32, device=self.device)]
        self.optimizer = self._copy_optimizer(optimizer, model, memo)

    def run(
        self,
        blocks: Sequence[BlockPlan],
        *,
        micro_batches: Sequence[Any] = (),
        is_first: bool = False,
        records: bool = False,
    ) -> StepProfile:
        """Run one step with the blocks placed as given, with the optimizer's state in place.

        Args:
            blocks: placements; an empty sequence runs the untouched model.
            micro_batches: others than the one given at first, `accumulation` times.
            is_first: record every block anew, as the first step of a session does.
            records: record also blocks that keep everything.
        """
        library = Library(self.library.rates, self.library.rules) if is_first else self.library
        patches = Patches()
        real = list(micro_batches) or [self.batch] * self.accumulation
        fakes = [fake_batch(self.mode, batch) for batch in real]
        with self._environment(), _explained(type(self.model).__name__):
            try:
                seams = install_blocks(patches, self.model, blocks, library, records=records)
                self._warm_up()
                meter = StepMeter(self.model, self.block_names, self.device)
                return meter.run(
                    fakes,
                    optimizer=self.optimizer,
                    loss_fn=self.loss_fn,
                    seams=seams,
                    optimizer_step=self._optimizer_step,
                    others=self.others,
                )
            finally:
                patches.undo()
                self.model.zero_grad(set_to_none=True)

    def record(self, blocks: Sequence[BlockPlan]) -> StepProfile:
        """Run one step with everything kept, and record every block on the way; `library` has the tapes afterwards."""
        return self.run(blocks, records=True)

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """Fake tensors on; random state, grad mode and other libraries' one-time warnings as they were."""
        with (
            torch.inference_mode(mode=False),
            preserved_random_state(),
            self.mode,
            torch.enable_grad(),
            _quiet("transformers", "torch._subclasses.fake_tensor"),
        ):
            yield

    def _copy_optimizer(
        self, spec: OptimizerSpec, model: nn.Module, memo: dict[int, Any]
    ) -> torch.optim.Optimizer | None:
        if spec is None:
            return None
        if isinstance(spec, torch.optim.Optimizer):
            copied = _copy_optimizer(self.mode, spec, memo)
        else:
            with self.mode:
                copied = _make_optimizer(spec, [p for p in self.model.parameters() if p.requires_grad])
        _fix_foreach(copied, [p for p in model.parameters() if p.requires_grad])
        return copied

    def first_step_peak(self, profile: StepProfile) -> int:
        """The peak of the very first step, given that of a later one: the optimizer makes its state at its end.

        Until then the state's bytes are missing; the optimizer step itself is run anew.
        """
        if self.optimizer is None:
            return profile.peak_bytes
        batch = fake_batch(self.mode, self.batch)
        with self._environment():
            ledger = Ledger(self.device)
            self.optimizer.state.clear()
            self._fill_gradients()
            track_training_state(ledger, self.model, None)
            ledger.track(self.others, "other")
            ledger.track((leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)), "batch")
            before = ledger.live_bytes()
            with ledger:
                self._optimizer_step()
            state_bytes = ledger.live_bytes() - before
            self.model.zero_grad(set_to_none=True)
        earlier = (point.peak_bytes for point in profile.points if point.phase != OPTIMIZER)
        return max(max(earlier) - state_bytes, ledger.peak_bytes())

    def _warm_up(self) -> None:
        """Give the optimizer its state, once."""
        if self.optimizer is None or self.optimizer.state:
            return
        self._fill_gradients()
        self._optimizer_step()
        self.model.zero_grad(set_to_none=True)

    def _optimizer_step(self) -> None:
        assert self.optimizer is not None, "called where there is one"
        self.mode.assumes_scalars = True
        try:
            self.optimizer.step()
        except TypeError as error:
            raise UsageError(
                f"{type(self.optimizer).__name__}.step() cannot be run without arguments ({error}): leave it out with "
                "optimizer=None, its state is then not counted."
            ) from error
        finally:
            self.mode.assumes_scalars = False

    def _fill_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None


def model_device(model: nn.Module) -> torch.device:
    """The device that holds most of the model's bytes."""
    sizes: dict[torch.device, int] = defaultdict(int)
    for tensor in (*model.parameters(), *model.buffers()):
        sizes[tensor.device] += tensor.nbytes
    if not sizes:
        raise UsageError(f"{type(model).__name__} has no parameters: there is nothing to train.")
    return max(sizes, key=lambda device: sizes[device])


def _copy_optimizer(mode: ShapeMode, real: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """A copy on fake parameters, without state, hooks, and the `step` that an lr scheduler put on the instance.

    `copy.deepcopy` of an optimizer keeps three attributes only; subclasses have more.
    """
    copied = type(real).__new__(type(real))
    memo[id(real)] = copied
    memo[id(real.state)] = defaultdict(dict)
    own = {name: value for name, value in vars(real).items() if name != "step"}
    vars(copied).update(fake_copy(mode, own, memo))
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        vars(copied)[hooks] = type(vars(copied)[hooks])()
    return copied


def _make_optimizer(
    spec: str | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer], parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    if not isinstance(spec, str):
        return spec(parameters)
    cls = getattr(torch.optim, spec, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        known = [n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type)]
        raise UsageError(f"Unknown optimizer {spec!r}{did_you_mean(spec, known)}: use a class name of torch.optim.")
    factory: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = cls
    return factory(parameters)


def _fix_foreach(optimizer: torch.optim.Optimizer, real: list[nn.Parameter]) -> None:
    """Choose the multi-tensor implementation as torch would for the real parameters: it needs more memory."""
    _, foreach = _default_to_fused_or_foreach(list(real), differentiable=False, use_fused=False)
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = foreach


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except TapelineError:
        raise
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise UnsupportedModelError(
            f"A step of {name} cannot be run on tensors without data, so its memory cannot be predicted: {error} "
            "(if a real step with this batch works, an operation of the model has no shape function)."
        ) from error


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    for logger, _ in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
