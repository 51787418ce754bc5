"""Trying a model for real: its untouched step against the same step under each mode, bit for bit."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from tapeline.errors import TapelineError, UsageError
from tapeline.planner.diagnosis import BlockReason, Diagnosis, ModeDiagnosis
from tapeline.planner.schema import Plan, parse_mode
from tapeline.runtime.block import BlockSeam
from tapeline.runtime.blocks import find_blocks, start_training
from tapeline.runtime.candidates import NOT_RECORDED
from tapeline.runtime.install import managed_module
from tapeline.runtime.measure import make_meter
from tapeline.runtime.predict import model_device
from tapeline.runtime.search import plan as make_plan
from tapeline.runtime.session import Session
from tapeline.runtime.step import LossFn, model_loss
from tapeline.tape.fake import preserved_random_state
from tapeline.tape.verify import same_bits

logger = logging.getLogger(__name__)

MODES = ("cheap", "recompute", "least", "segments")
_SEED = 1
_MAX_NAMES = 3
_SAID_ELSEWHERE = ("not replayed from a tape: ", "block '", "no optimizer was given")
"""How notes begin that a row says in another place, or that hold for every row."""

Result = dict[str, torch.Tensor]


def diagnose(
    model: nn.Module,
    batch: Any,
    *,
    modes: Sequence[str] = MODES,
    loss_fn: LossFn = model_loss,
    blocks: Sequence[str] | None = None,
) -> Diagnosis:
    """Run a model's step untouched and under each mode, and say whether every bit is the same, and what it costs.

    The untouched step (forward and backward, in training mode, from a fixed seed) is run twice: a model that does not
    repeat its own bits cannot be checked, and the result says so. Then every mode is planned, applied and run for three
    steps, two of them measured; loss, gradients, buffers and random states of each are compared. No optimizer is run.

    The reference is the model with ``use_cache=False`` where its configuration has it: an untouched model with a key-value
    cache fills it in training too, which may change low bits of eager attention; under a plan there is no cache.

    Afterwards the model is as before: weights, buffers, gradients, flags, configuration and random state. While it runs,
    a copy of weights and buffers, and one of the gradients, are held in host memory.

    Args:
        model: any module.
        batch: one micro-batch as the model gets it.
        modes: as in `plan`: ``cheap``, ``recompute``, ``least``, ``segments`` or ``segments:k``.
        loss_fn: called as ``loss_fn(model, batch)``, returns a scalar.
        blocks: which modules are blocks, as in `plan`.

    Returns:
        A frozen `Diagnosis`: ``print`` it, or write it with ``to_json()``. A mode that cannot be tried is a row of it.

    Raises:
        UsageError: for arguments that make no sense, or if nothing is trained. What the untouched step raises is passed on.

    Example:
        >>> import torch, tapeline
        >>> layers = [torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8)) for _ in range(4)]
        >>> model, x = torch.nn.Sequential(*layers), torch.randn(16, 8)
        >>> tapeline.diagnose(model, x, loss_fn=lambda m, x: m(x).pow(2).sum()).verdict
        'exact on the tape'
    """
    names = _checked(model, modes, blocks)
    with restored(model) as trial:
        trial.batch, trial.loss_fn, trial.names = batch, loss_fn, names
        logger.info("untouched model: two steps")
        meter = make_meter(model, model_device(model))
        with _without_cache(model):
            expected = trial.step(meter.measure(None, names))
            again = trial.step()
        different = _different(again, expected)
        rows = [_try(trial, mode, blocks, expected, can_tell=not different) for mode in modes]
    assert meter.peak_bytes is not None, "the first step was measured"
    is_finite = bool(torch.isfinite(expected["loss"]).all())
    return Diagnosis(
        model=type(model).__name__,
        device=str(model_device(model)),
        num_blocks=len(names),
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        untouched_peak_bytes=meter.peak_bytes,
        is_deterministic=not different,
        num_compared=len(expected),
        num_different=len(different),
        different=tuple(different[:_MAX_NAMES]),
        rows=tuple(rows),
        notes=() if is_finite else (f"the loss is {expected['loss'].item()}: equal bits say little",),
    )


def _checked(model: nn.Module, modes: Sequence[str], blocks: Sequence[str] | None) -> list[str]:
    """Refuse what makes no sense before anything runs; returns the names of the blocks, none if none are found."""
    if isinstance(modes, str) or not modes:
        raise UsageError(f"modes must be a list of modes, got {modes!r}: use modes={list(MODES)}.")
    for mode in modes:
        name, _ = parse_mode(mode)
        if name in ("none", "auto"):
            raise UsageError(
                f"Mode {mode!r} need not drop anything, so there is nothing to try: use {', '.join(MODES)}."
            )
    if (managed := managed_module(model)) is not None:
        raise UsageError(f"A session is in force on this model (block {managed!r}): call its remove() first.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"Nothing is trained: no parameter of {type(model).__name__} requires gradients.")
    try:
        return find_blocks(model, blocks)
    except UsageError:
        raise
    except TapelineError:  # planning will say it again, in every row
        return []


def _try(trial: Trial, mode: str, blocks: Sequence[str] | None, expected: Result, *, can_tell: bool) -> ModeDiagnosis:
    """Plan a mode, run three steps under it, and compare."""
    logger.info("mode %r: planning, then three steps", mode)
    try:
        trial.start_over()
        plan = make_plan(trial.model, trial.batch, mode=mode, loss_fn=trial.loss_fn, blocks=blocks)
        with Session(trial.model, plan, measure=False, audit_every=0) as session:
            return _run(trial, session, expected, can_tell=can_tell)
    except Exception as error:  # whatever it is, the untouched step can do without
        logger.debug("mode %r", mode, exc_info=True)
        kind = "" if isinstance(error, TapelineError) else f"{type(error).__name__}: "
        return ModeDiagnosis(mode=mode, is_exact=None, error=f"{kind}{error}")


def _run(trial: Trial, session: Session, expected: Result, *, can_tell: bool) -> ModeDiagnosis:
    different: dict[str, None] = {}
    peaks = []
    for measured in (session.measure(), session.measure()):
        different |= dict.fromkeys(_different(trial.step(measured), expected))
        peaks.append(session.last_peak_bytes)
    before = {name: (seam.num_calls, seam.num_reruns) for name, seam in session._seams.items()}
    different |= dict.fromkeys(_different(trial.step(), expected))  # as in training: nothing observes it
    states = _states(session, before)
    plan, report = session.plan, session.report()
    notes = dict.fromkeys([*plan.notes, *report.notes])
    return ModeDiagnosis(
        mode=plan.mode,
        is_exact=not different if can_tell else None,
        num_compared=len(expected),
        num_different=len(different),
        different=tuple(list(different)[:_MAX_NAMES]),
        num_taped=states.count("taped"),
        num_rerun=states.count("rerun"),
        num_kept=states.count("kept"),
        num_spared=states.count("spared"),
        num_idle=states.count("idle"),
        reasons=tuple(_reasons(plan, session._seams)),
        kept_instead=report.kept_instead,
        notes=tuple(note for note in notes if not note.startswith(_SAID_ELSEWHERE)),
        predicted_first_step_peak_bytes=plan.first_step_peak_bytes,
        measured_first_step_peak_bytes=peaks[0],
        predicted_peak_bytes=plan.peak_bytes,
        measured_peak_bytes=peaks[1],
        flops_ratio=plan.slowdown,
    )


def _states(session: Session, before: dict[str, tuple[int, int]]) -> list[str]:
    """What became of each block in the last step, by its counters before that step and now."""
    states = []
    for block in session.plan.blocks:
        seam = session._seams.get(block.name)
        calls, reruns = before.get(block.name, (0, 0))
        if block.reason == NOT_RECORDED:
            states.append("idle")
        elif block.policy.keeps_all and not block.reason:
            states.append("spared")
        elif seam is None or seam.num_calls == calls:
            states.append("kept")
        elif seam.num_reruns > reruns:
            states.append("rerun")
        else:
            states.append("kept" if seam.reasons else "taped")
    return states


def _reasons(plan: Plan, seams: dict[str, BlockSeam]) -> Iterator[BlockReason]:
    """Each reason once, with the blocks that it holds for."""
    blocks_by_reason: dict[str, list[str]] = {}
    for block in plan.blocks:
        found = dict.fromkeys(seams[block.name].reasons if block.name in seams else ())
        for reason in found or ([block.reason] if block.reason and block.reason != NOT_RECORDED else []):
            blocks_by_reason.setdefault(reason, []).append(block.name)
    for reason, names in blocks_by_reason.items():
        yield BlockReason(reason=reason, blocks=tuple(names))


def _different(got: Result, expected: Result) -> list[str]:
    """Names of what is not equal, or is there on one side only."""
    names = dict.fromkeys([*expected, *got])
    return [name for name in names if not (name in got and name in expected and _is_equal(got[name], expected[name]))]


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or same_bits(one.reshape(-1), other.reshape(-1))  # NaNs with the same bits are equal


class Trial:
    """A model whose step can be run again and again from the same start."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.batch: Any = None
        self.loss_fn: LossFn = model_loss
        self.names: list[str] = []
        found = [registry for module in model.modules() for registry in (module._parameters, module._buffers)]
        self._registries: list[tuple[dict[str, Any], dict[str, Any]]] = [(one, dict(one)) for one in found]
        tensors = {id(t): t for _, before in self._registries for t in before.values() if t is not None}
        self._tensors = [(tensor, _copy(tensor)) for tensor in tensors.values() if not tensor.is_inference()]
        self._versions = [tensor._version for tensor, _ in self._tensors]
        self._flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self._training = [(module, module.training) for module in model.modules()]

    def step(self, measured: AbstractContextManager[Any] | None = None) -> Result:
        """Forward and backward; returns what is to be compared."""
        self.start_over()
        with measured or nullcontext():
            loss = self.loss_fn(self.model, self.batch)
            loss.backward()
        found = {"loss": _copy(loss)}
        found |= {f"grad of {n}": _in_host(p.grad) for n, p in self.model.named_parameters() if p.grad is not None}
        found |= {f"buffer {n}": _copy(b) for n, b in self.model.named_buffers()}
        return found | _random_states(model_device(self.model))

    def start_over(self) -> None:
        """Weights and buffers as they were, no gradients, training mode, and the same random numbers to come."""
        self._write_back()
        for parameter in self.model.parameters():
            parameter.grad = None
        start_training(self.model, self.names)
        random.seed(_SEED)
        np.random.seed(_SEED)  # noqa: NPY002 - the global state is the one models draw from
        torch.manual_seed(_SEED)

    def restore(self) -> None:
        """Everything as it was before the first step."""
        self._write_back()
        for parameter, requires_grad, grad in self._flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, is_training in self._training:
            module.training = is_training

    def _write_back(self) -> None:
        for registry, before in self._registries:
            if {n: id(t) for n, t in registry.items()} != {n: id(t) for n, t in before.items()}:
                registry.clear()
                registry.update(before)
        for number, (tensor, copied) in enumerate(self._tensors):
            # batch norm writes its statistics without a trace in their version
            if tensor._version != self._versions[number] or not isinstance(tensor, nn.Parameter):
                with torch.no_grad():
                    tensor.copy_(copied)
                self._versions[number] = tensor._version


@contextmanager
def restored(model: nn.Module) -> Iterator[Trial]:
    """A trial, with everything as before at the end, whatever happens."""
    with preserved_random_state(), torch.inference_mode(mode=False), torch.enable_grad():
        trial = Trial(model)
        try:
            yield trial
        finally:
            trial.restore()


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """``use_cache=False`` in every configuration in the model that has it on."""
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    switched = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    for config in switched:
        config.use_cache = False
    try:
        yield
    finally:
        for config in switched:
            config.use_cache = True


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, where it does not count in the peak of an accelerator."""
    return tensor.detach().clone() if tensor.device.type == "cpu" else _in_host(tensor)


def _in_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself on a CPU: nothing writes a gradient that the next step does not start from."""
    return tensor.detach().cpu()


def _random_states(device: torch.device) -> Result:
    """The states of all generators that a model may draw from."""
    numpy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    states = {
        "random state of torch": torch.get_rng_state(),
        "random state of Python": torch.tensor(random.getstate()[1]),
        "random state of NumPy": torch.tensor([*numpy["key"].tolist(), numpy["pos"]]),
    }
    if device.type != "cpu":
        states[f"random state of {device.type}"] = torch.get_device_module(device).get_rng_state(device)
    return states
