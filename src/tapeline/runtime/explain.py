"""Explaining one block: the tape that a step records, solved for a mode, as rows with reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tapeline.errors import UsageError, did_you_mean
from tapeline.planner.explanation import Explanation, TapeExplanation
from tapeline.planner.policy import RECOMPUTE
from tapeline.planner.schema import BlockPlan
from tapeline.runtime.blocks import find_blocks
from tapeline.runtime.candidates import Candidates
from tapeline.runtime.predict import FakeStep
from tapeline.runtime.step import LossFn, model_loss
from tapeline.tape.explain import NAMED_POLICIES, explain_tape
from tapeline.tape.rules import Rules


def explain(
    model: nn.Module,
    batch: Any,
    mode: str = "cheap",
    *,
    block: str | None = None,
    blocks: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    loss_fn: LossFn = model_loss,
) -> Explanation:
    """Say for every tensor that autograd saves in one block what a mode does with it, and why.

    As in `plan`, the step runs on fake tensors: nothing runs for real and nothing changes.

    Args:
        model: any module.
        batch: one micro-batch as the model gets it.
        mode: ``"cheap"``, ``"recompute"``, ``"least"`` or ``"none"``, as in `plan`. The other modes of `plan` decide for
            the whole model, and place each block by one of these or by a point of the front.
        block: name of the block. Default: the first in which autograd records something.
        blocks: which modules are blocks, as in `plan`.
        keep: what to keep whatever the mode, as in `plan`.
        drop: what to drop whatever the mode, as in `plan`.
        loss_fn: called as ``loss_fn(model, batch)``, returns a scalar.

    Returns:
        A frozen `Explanation`: ``print`` it, or write it with ``to_json()``.

    Raises:
        UsageError: for an unknown mode, block, or name in `keep` or `drop`, or if something to drop cannot be made again.
        UnsupportedModelError: if there are no blocks, or shapes depend on the values of activations.

    Example:
        >>> import torch, tapeline
        >>> layers = [torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)) for _ in range(4)]
        >>> model = torch.nn.Sequential(*layers)
        >>> tape = tapeline.explain(model, torch.zeros(512, 64), loss_fn=lambda m, x: m(x).sum()).tapes[0]
        >>> [(row.made_by, row.placement) for row in tape.rows if row.made_by in ("addmm", "gelu")]
        [('addmm', 'device'), ('gelu', 'recompute in phase 1')]
    """
    if mode not in NAMED_POLICIES:
        known = ", ".join(NAMED_POLICIES)
        raise UsageError(f"Cannot explain mode {mode!r}{did_you_mean(mode, NAMED_POLICIES)}: use one of {known}.")
    for name, names in (("keep", keep), ("drop", drop)):
        if isinstance(names, str):
            raise UsageError(f"{name} must be a list of names, got the string {names!r}: use {name}=[{names!r}].")
    step = FakeStep(model, batch, find_blocks(model, blocks), loss_fn=loss_fn, rules=Rules(tuple(keep), tuple(drop)))
    if block is not None and block not in step.block_names:
        raise UsageError(f"No block is called {block!r}{did_you_mean(block, step.block_names)}: {_listed(step)}.")
    candidates = Candidates(step)
    step.library.rules.check()
    name = block or _first_recorded(candidates)
    placed = next(plan for plan in candidates.uniform(NAMED_POLICIES[mode]) if plan.name == name)
    return Explanation(
        block=name,
        kind=placed.kind,
        mode=mode,
        keep=step.library.rules.keep,
        drop=step.library.rules.drop,
        tapes=_tapes(candidates, name, mode),
        reason=placed.reason,
        fallback=_fallback(placed) if placed.reason and candidates.recorded.blocks[name].num_calls else "",
    )


def _tapes(candidates: Candidates, name: str, mode: str) -> tuple[TapeExplanation, ...]:
    """The tapes of a block, each once."""
    library, policy = candidates.step.library, NAMED_POLICIES[mode]
    tapes = {tape.digest: tape for tape in candidates.tapes[name]}
    for tape in tapes.values():
        library.recipe(tape, RECOMPUTE)  # raises where something to drop cannot be made again, whatever the mode
    return tuple(
        explain_tape(library.recipe(tape, policy), policy, library.rules, library.failures.get(digest, ()))
        for digest, tape in tapes.items()
    )


def _first_recorded(candidates: Candidates) -> str:
    facts = candidates.recorded.blocks
    return next((name for name in candidates.names if facts[name].num_calls), candidates.names[0])


def _fallback(placed: BlockPlan) -> str:
    if placed.policy.drops_all:
        return "Nothing is held but its input, and the whole block is run again in backward"
    return "All that autograd saves of these calls is held"


def _listed(step: FakeStep) -> str:
    shown = ", ".join(step.block_names[:3]) + (", ..." if len(step.block_names) > 3 else "")
    return f"the blocks are {shown} ({len(step.block_names)} in all)"
