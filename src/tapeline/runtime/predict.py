"""Prediction by execution: the real runtime, on a weightless copy of the model, under the ledger."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import _default_to_fused_or_foreach
from torch.utils._pytree import tree_leaves

from tapeline.compat import autocast_state
from tapeline.cost.device import nominal_rates
from tapeline.errors import TapelineError, UnsupportedModelError, UsageError, did_you_mean
from tapeline.ledger import OPTIMIZER, Ledger
from tapeline.planner.profile import StepProfile
from tapeline.planner.schema import BlockPlan
from tapeline.runtime.block import BlockSeam
from tapeline.runtime.blocks import start_training
from tapeline.runtime.install import Patches, install_blocks, managed_module, place_blocks
from tapeline.runtime.library import Library
from tapeline.runtime.moving import Mover
from tapeline.runtime.step import LossFn, StepMeter, model_loss, track_training_state
from tapeline.runtime.tiers.engine import Engine
from tapeline.runtime.tiers.opening import ALIGNMENTS
from tapeline.runtime.tiers.shadow import ShadowMachine, ShadowStore
from tapeline.runtime.tiers.tier import Tier
from tapeline.tape.beside import Beside, Demand, no_draws, own_autocast
from tapeline.tape.fake import ShapeMode, fake_batch, fake_copy, preserved_random_state
from tapeline.tape.kernels import without_launches
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
        self.draws_numbers = False
        """Whether a run has drawn from a generator that the process shares."""
        self._autocast = autocast_state()
        self._holds_casts = torch.is_autocast_cache_enabled()
        with self.mode:
            self.others = [torch.empty(-(-reserve_bytes // 4), dtype=torch.float32, device=self.device)]
        self.optimizer = self._copy_optimizer(optimizer, model, memo)

    def run(
        self,
        blocks: Sequence[BlockPlan],
        *,
        micro_batches: Sequence[Any] = (),
        placements: Sequence[Sequence[BlockPlan]] = (),
        in_flight_bytes: int = 0,
        is_first: bool = False,
        records: bool = False,
    ) -> StepProfile:
        """Run one step with the blocks placed as given, with the optimizer's state in place.

        Args:
            blocks: placements; an empty sequence runs the untouched model.
            micro_batches: others than the one given at first, `accumulation` times.
            placements: those of each micro-batch, instead of `blocks`.
            in_flight_bytes: as in `Plan`.
            is_first: record every block anew, as the first step of a session does.
            records: record also blocks that keep everything.
        """
        library = self.library
        if is_first:
            library = Library(self.library.rates, self.library.rules)
            library.groups = self.library.groups
        patches = Patches()
        real = list(micro_batches) or [self.batch] * self.accumulation
        fakes = [fake_batch(self.mode, batch) for batch in real]
        guard = no_draws() if records and self.mode.beside is not None else nullcontext()
        with self._environment(), _explained(type(self.model).__name__), guard:
            try:
                every = bool(placements)
                library.mover = self._mover(in_flight_bytes)
                seams = install_blocks(patches, self.model, blocks, library, records=records, every=every)
                self._warm_up()
                meter = StepMeter(self.model, self.block_names, self.device)
                profile = meter.run(
                    fakes,
                    optimizer=self.optimizer,
                    loss_fn=self.loss_fn,
                    seams=seams,
                    optimizer_step=self._optimizer_step,
                    others=self.others,
                    before_batch=partial(_place, seams, placements, library) if every else None,
                )
                return _with_moves(profile, library.mover)
            finally:
                library.mover = None
                patches.undo()
                self.model.zero_grad(set_to_none=True)

    def _mover(self, in_flight_bytes: int) -> Mover:
        """What does to the device's memory what moving would do to it."""
        like = torch.empty(0, device=self.device)
        tiers = {
            name: Tier(
                name=name,
                device=like.device,
                engine=Engine(ShadowMachine(like), ShadowStore(size), most_in_flight=in_flight_bytes),
            )
            for name, size in ALIGNMENTS.items()
        }
        return Mover(tiers, self.model)

    def record(self, blocks: Sequence[BlockPlan]) -> StepProfile:
        """Run one step with everything kept, and record every block on the way; `library` has the tapes afterwards."""
        return self.run(blocks, records=True)

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """Fake tensors on; random state, grad mode and other libraries' one-time warnings as they were."""
        with (
            torch.inference_mode(mode=False),
            preserved_random_state(self._note_draw) if self.mode.beside is None else own_autocast(self._autocast),
            self.mode,
            without_launches(),
            torch.enable_grad(),
            _quiet("transformers", "torch._subclasses.fake_tensor"),
        ):
            yield

    @contextmanager
    def beside_training(self, demand: Callable[[], Demand]) -> Iterator[None]:
        """Let runs take place in this thread while a training step may be running in another.

        Args:
            demand: asked before every op; if there is none, the run ends in a `CancelledError`.
        """
        self.mode.beside = Beside(holds_casts=self._holds_casts, demand=demand)
        try:
            yield
        finally:
            self.mode.beside = None

    def fake_batch(self) -> Any:
        """The batch without bytes; small integer tensors, at which models look, are copied."""
        return fake_batch(self.mode, self.batch)

    def _note_draw(self) -> None:
        self.draws_numbers = True

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


def _with_moves(profile: StepProfile, mover: Mover) -> StepProfile:
    """The profile of a run with what it has moved."""
    engines = {name: tier.engine for name, tier in mover.tiers.items() if tier.engine.bytes_out}
    return replace(
        profile,
        moved_bytes={name: engine.bytes_out for name, engine in engines.items()},
        room_bytes={name: engine.store.regions.most_end for name, engine in engines.items()},
    )


def _place(
    seams: Mapping[str, BlockSeam], placements: Sequence[Sequence[BlockPlan]], library: Library, number: int
) -> None:
    place_blocks(seams, placements[number], library)


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
    """Nothing below critical comes out of these loggers and those below them, as far as this thread is concerned."""
    here = threading.get_ident()
    prefixes = tuple(f"{name}." for name in names)

    def is_let_through(record: logging.LogRecord) -> bool:
        is_ours = record.thread == here and (record.name in names or record.name.startswith(prefixes))
        return not is_ours or record.levelno >= logging.CRITICAL

    handlers = {handler for name in names for handler in _handlers(name)}
    for handler in handlers:
        handler.addFilter(is_let_through)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_let_through)


def _handlers(name: str) -> Iterator[logging.Handler]:
    """What a record of this logger may come to."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None
    if logging.lastResort is not None:
        yield logging.lastResort
