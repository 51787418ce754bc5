"""Putting seams into one model instance, and taking them out again without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from tapeline.planner.schema import BlockPlan
from tapeline.runtime.block import BlockSeam
from tapeline.runtime.blocks import is_transformers_layer
from tapeline.runtime.inputs import Chain

_MISSING = object()


class Patches:
    """Instance attributes that were set, and what they were before."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []
        self._expected: list[tuple[Any, str, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute of this one object."""
        self._undo.append((target, name, vars(target).get(name, _MISSING)))
        self._expected.append((target, name, value))
        setattr(target, name, value)

    def replaced(self) -> list[str]:
        """Attributes that somebody else has set since, as ``Class.attribute``."""
        return [f"{type(t).__name__}.{name}" for t, name, value in self._expected if getattr(t, name, None) != value]

    def undo(self) -> None:
        """Put everything back; safe to call twice."""
        while self._undo:
            target, name, before = self._undo.pop()
            if before is _MISSING:
                vars(target).pop(name, None)
            else:
                setattr(target, name, before)
        self._expected.clear()


class InstanceForward:
    """The `forward` of one instance, run through its seam. Copies with its module."""

    def __init__(self, module: nn.Module, seam: BlockSeam, before: Any = None) -> None:
        self.module, self.seam, self.before = module, seam, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.before if self.before is not None else self._class_forward
        return self.seam(forward, *args, **kwargs)

    def _class_forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


def install_blocks(patches: Patches, model: nn.Module, blocks: Sequence[BlockPlan]) -> dict[str, BlockSeam]:
    """Put a plan's blocks in force on `model`; returns the seams of the blocks that are recomputed."""
    switch_off_checkpointing(patches, model)
    recomputed = [block for block in blocks if block.saved == "recompute"]
    if not recomputed:
        return {}
    switch_off_cache(patches, model)
    droppers = {block.name for block in recomputed if block.input == "recompute"}
    following = {block.name: after.name for block, after in pairwise(blocks)}
    chain = Chain()
    seams = {}
    for block in recomputed:
        module = model.get_submodule(block.name)
        seam = BlockSeam(
            block.name,
            module,
            chain,
            drops_input=block.name in droppers,
            feeds_next=following.get(block.name) in droppers,
        )
        install_seam(patches, module, seam)
        seams[block.name] = seam
    return seams


def managed_module(model: nn.Module) -> str | None:
    """The name of a block that already runs through a seam, if there is one."""
    name: str
    for name, module in model.named_modules():
        function = vars(module).get("_gradient_checkpointing_func")
        if isinstance(getattr(function, "__self__", None), BlockSeam):
            return name
        if isinstance(vars(module).get("forward"), InstanceForward):
            return name
    return None


def install_seam(patches: Patches, module: nn.Module, seam: BlockSeam) -> None:
    """Make `module` run through `seam`, by the per-layer function of transformers or by its own `forward`."""
    if is_transformers_layer(module):
        patches.set(module, "_gradient_checkpointing_func", seam.from_partial)
        patches.set(module, "gradient_checkpointing", True)
    else:
        patches.set(module, "forward", InstanceForward(module, seam, vars(module).get("forward")))


def switch_off_checkpointing(patches: Patches, model: nn.Module) -> list[nn.Module]:
    """Switch off what transformers itself was told to checkpoint, so that the plan decides alone."""
    switched = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    for module in switched:
        patches.set(module, "gradient_checkpointing", False)
    return switched


def switch_off_cache(patches: Patches, model: nn.Module) -> None:
    """Set ``use_cache=False`` in every configuration of the model: a cache written twice would be wrong."""
    for config in _configs(model):
        if getattr(config, "use_cache", False):
            patches.set(config, "use_cache", False)


def _configs(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    pending = [module.config for module in model.modules() if hasattr(module, "config")]
    while pending:
        config = pending.pop()
        if id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        yield config
        pending += [value for value in vars(config).values() if hasattr(value, "use_cache")]
