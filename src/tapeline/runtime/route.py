"""From a step recorded on tensors without data to a route of the planner over tiers.

The tapes say what each block computes and saves; the ledger says what their formulas leave out: bytes that Python variables and
temporaries hold, the head and the loss, weights and optimizer state. A model of two layers of each kind stands for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tapeline.cost.catalogue import Device
from tapeline.cost.rates import Rates
from tapeline.errors import UnsupportedModelError
from tapeline.ledger import BACKWARD, FORWARD
from tapeline.planner.placements import placements
from tapeline.planner.profile import Point, StepProfile
from tapeline.planner.route import Route
from tapeline.planner.stage import Stage
from tapeline.runtime.candidates import Candidates
from tapeline.tape.graph import Source, Tape
from tapeline.tape.stage import stage_of

_OPTIMIZER_PASSES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """The model that a recorded one stands for."""

    layers: tuple[int, ...]
    """For each layer, the index of its equal among the recorded blocks."""
    weight_bytes: int
    trainable_bytes: int
    num_frozen: int = 0
    """Layers at the beginning in which, and below which, nothing is trained."""
    accumulation: int = 1
    """Micro-batches in an optimizer step; the route is one of them."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A route, and what fills the device beside it."""

    route: Route
    memory: dict[str, int]
    """Bytes all the time, by kind."""
    head_bytes: int
    """What the head and the loss need at their peak."""
    head_forward_bytes: int
    """The same in forward alone."""


def workload(candidates: Candidates, device: Device, dtype: str, whole: Whole | None = None) -> Workload:
    """The route of a recorded step on a device.

    Args:
        candidates: the recorded step.
        device: where it is to run.
        dtype: of the model's matrix products.
        whole: the model that the recorded one stands for; default: itself.

    Raises:
        UnsupportedModelError: if a block has no tape, or is called more than once in a step.
    """
    rates = device.rates(dtype)
    profile, model = candidates.recorded, candidates.step.model
    stages = _stages(candidates, profile, rates)
    whole = whole or Whole(layers=tuple(range(len(stages))), weight_bytes=0, trainable_bytes=0)
    short_trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    trainable = whole.trainable_bytes or short_trainable
    short_state = _state_bytes(candidates.step.optimizer)
    state = short_state * trainable // max(1, short_trainable)
    weights = whole.weight_bytes or profile.memory["weights"]
    shared = {id(stage): stage for stage in stages}
    if whole.accumulation > 1:
        shared = {key: _accumulating(stage, model) for key, stage in shared.items()}
    frozen = {key: replace(s, is_frozen=True, held=frozenset(), gradient_bytes=0) for key, s in shared.items()}
    chain = tuple(
        (frozen if number < whole.num_frozen else shared)[id(stages[layer])]
        for number, layer in enumerate(whole.layers)
    )
    in_blocks = sum(stage.gradient_bytes for stage in chain)
    first, head, head_forward = _outside(profile, stages, short_state)
    memory = {
        "context": device.context_bytes,
        "weights": weights,
        "optimizer": state,
        "batch and tables": profile.memory["batch"] + first,
        "gradients": trainable if whole.accumulation > 1 else 0,
    }
    moved = _OPTIMIZER_PASSES * (trainable + state)
    options = {id(stage): placements(stage) for stage in {id(s): s for s in chain}.values()}
    route = Route(
        stages=chain,
        options=tuple(options[id(stage)] for stage in chain),
        loss_seconds=profile.outside_flops / rates.matmul_flops,
        loss_bytes=max(0, head - 2 * chain[-1].sizes[-1]),
        base_bytes=sum(memory.values()),
        outside_gradient_bytes=max(0, trainable - in_blocks),
        optimizer_seconds=moved / rates.memory_bytes / whole.accumulation if trainable else 0.0,
        keeps_gradients=whole.accumulation > 1,
    )
    return Workload(route=route, memory=memory, head_bytes=head, head_forward_bytes=head_forward)


def _accumulating(stage: Stage, model: nn.Module) -> Stage:
    """The stage where gradients are there already: each new one is there beside its sum until it is added."""
    largest = max((p.nbytes for p in model.parameters() if p.requires_grad), default=0)
    extra = min(stage.gradient_bytes, largest)
    ops = tuple(replace(op, backward_bytes=op.backward_bytes + extra) for op in stage.ops)
    return replace(stage, ops=ops)


def _stages(candidates: Candidates, profile: StepProfile, rates: Rates) -> list[Stage]:
    """One stage for each block; blocks with equal tapes and equal trained parts share it."""
    found: dict[Any, Stage] = {}
    stages = []
    for name in candidates.names:
        facts, tapes = profile.blocks[name], candidates.tapes[name]
        if len(tapes) != 1 or facts.num_calls > 1:
            reason = facts.reason or f"it is called {facts.num_calls} times in a step"
            raise UnsupportedModelError(f"Block {name!r} cannot be planned over tiers: {reason}.")
        block: nn.Module = candidates.step.model.get_submodule(name)
        key = tapes[0].digest, tuple(p.requires_grad for p in block.parameters())
        if key not in found:
            try:
                found[key] = _calibrated(_stage(tapes[0], block, rates), profile, name)
            except ValueError as error:
                raise UnsupportedModelError(f"Block {name!r} cannot be planned over tiers: {error}.") from error
        stages.append(found[key])
    return stages


def _stage(tape: Tape, block: nn.Module, rates: Rates) -> Stage:
    def is_trained(source: Source) -> bool:
        parameter = block.get_submodule(source.module)._parameters.get(source.name)
        return parameter is not None and parameter.requires_grad

    trained = sum(p.nbytes for p in block.parameters() if p.requires_grad)
    return replace(stage_of(tape, rates, is_trained), gradient_bytes=trained)


def _calibrated(stage: Stage, profile: StepProfile, name: str) -> Stage:
    """The stage with what the ledger has seen beyond its formulas when everything was kept."""
    everything = stage.held | frozenset(stage.needed)
    kept = placements(stage, only=[(everything, frozenset())])
    forward, backward = (_point(profile, phase, name) for phase in (FORWARD, BACKWARD))
    own = stage.sizes[0]
    assert forward is not None, "its tape was recorded"
    missing = forward.peak_bytes - forward.start_bytes + own - float(kept.forward_peak.max())
    ops = [replace(op, temporary_bytes=op.temporary_bytes + max(0, int(missing))) for op in stage.ops]
    if backward is not None:
        # the block begins with the gradient of its output, and leaves those of its weights
        there = backward.peak_bytes - backward.start_bytes + stage.ops[-1].incoming_bytes - stage.gradient_bytes
        extra = max(0, int(there - float(kept.backward_peak.max())))
        ops = [
            replace(op, backward_bytes=op.backward_bytes + extra, incoming_bytes=op.incoming_bytes + extra)
            for op in ops
        ]
    return replace(stage, ops=tuple(ops))


def _point(profile: StepProfile, phase: str, name: str) -> Point | None:
    return next((point for point in profile.points if (point.phase, point.block) == (phase, name)), None)


def _state_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Of the optimizer, without what its step needs: where that is the peak, the ledger counts both as the optimizer's."""
    state = {} if optimizer is None else optimizer.state
    leaves = (leaf for entry in state.values() for leaf in tree_leaves(entry))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))


def _outside(profile: StepProfile, stages: list[Stage], state: int) -> tuple[int, int, int]:
    """Bytes beside blocks: held from before the first on; of the head and the loss at their peak, and in forward alone.

    The last two contain the last output and whatever else is there at the loss beyond what the stages keep.
    """
    fixed = profile.memory["weights"] + profile.memory["batch"] + state
    places = [i for i, point in enumerate(profile.points) if point.phase == FORWARD and point.block is not None]
    first = max(0, profile.points[places[0]].start_bytes - fixed - stages[0].sizes[0])
    kept = sum(stage.sizes[value] for stage in stages for value in stage.held | set(stage.needed))
    after = profile.points[places[-1] + 1 :]
    end = next((i for i, point in enumerate(after) if point.phase == BACKWARD and point.block is not None), len(after))
    both, forward = (
        max((point.peak_bytes - fixed - first - kept for point in after[:end] if point.phase in phases), default=0)
        for phases in ((FORWARD, BACKWARD), (FORWARD,))
    )
    return first, max(0, both), max(0, forward)
